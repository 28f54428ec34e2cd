// Force-included by `make wheel` into every source, so that a wheel that is built on a new Linux runs on an old one: a
// symbol that is newer than glibc 2.28 or GCC 8 is replaced by its older twin, or by a definition of our own.
#pragma once

#if defined(__cplusplus) && defined(__x86_64__) && defined(__linux__)
#include <exception>
#include <new>

#if defined(__GLIBC__) && defined(__GLIBCXX__)

// 2.29 gave these versions that no longer know the error handlers of SVID. The older ones run the same code.
__asm__(".symver exp,exp@GLIBC_2.2.5");
__asm__(".symver log,log@GLIBC_2.2.5");
__asm__(".symver log2,log2@GLIBC_2.2.5");
__asm__(".symver pow,pow@GLIBC_2.2.5");

#define FUSEDLOSS_OWN __attribute__((weak, visibility("hidden")))

// 2.32: whether libstdc++ may count references without atomics. Not to is right on every system.
extern "C" {
extern FUSEDLOSS_OWN char __libc_single_threaded;
FUSEDLOSS_OWN char __libc_single_threaded = 0;

// GCC 11 made these two of std::exception_ptr public. The constructor and the destructor, which are older, do the same.
void _ZNSt15__exception_ptr13exception_ptrC1ERKS0_(void*, const void*);
void _ZNSt15__exception_ptr13exception_ptrD1Ev(void*);
FUSEDLOSS_OWN void _ZNSt15__exception_ptr13exception_ptr9_M_addrefEv(void* counted) {
    void* copy;  // never destroyed, so that the count stays one higher
    _ZNSt15__exception_ptr13exception_ptrC1ERKS0_(&copy, counted);
}
FUSEDLOSS_OWN void _ZNSt15__exception_ptr13exception_ptr10_M_releaseEv(void* counted) {
    _ZNSt15__exception_ptr13exception_ptrD1Ev(counted);
}
}

// GCC 11.
namespace std {
[[noreturn]] FUSEDLOSS_OWN void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std

#endif
#endif
