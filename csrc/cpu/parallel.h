// Loops over independent items on the threads that torch uses.
//
// With OpenMP the extension shares torch's own runtime (same library name), hence its worker threads. A forked child
// has none of them, and OpenMP would wait for them for ever. A child starts threads of its own for each loop: as many
// as it was told to, and one unless it was.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fusedloss {

// 0 where the process is no forked child.
inline int& threads_after_fork() {
    static int threads = 0;
    return threads;
}

inline void watch_forks() {
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { threads_after_fork() = 1; });
#endif
}

// As many threads as are asked for, or as a forked child was told to use.
inline int threads_of(int threads) { return threads_after_fork() ? threads_after_fork() : threads; }

// Calls part(i), which must not throw, for i in [0, threads) on new threads and this one.
template <typename Part>
void on_new_threads(int threads, const Part& part) {
    std::vector<std::thread> workers;
    int started = 1;
    try {
        workers.reserve(threads - 1);
        for (; started < threads; ++started) workers.emplace_back(part, started);
    } catch (const std::exception&) {
        // There are no more threads to be had: this one does the rest.
    }
    part(0);
    for (int i = started; i < threads; ++i) part(i);
    for (auto& worker : workers) worker.join();
}

// body(begin, end) over a partition of [0, count) into one contiguous range a thread.
template <typename Body>
void parallel_for(int64_t count, int threads, const Body& body) {
    if (threads > count) threads = static_cast<int>(count);
    if (threads <= 1) {
        if (count > 0) body(int64_t(0), count);
        return;
    }
    // An exception that left a thread would end the process. The first one is thrown when all threads are done.
    std::exception_ptr failure;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    const auto part = [&](int64_t i) noexcept {
        try {
            body(count * i / threads, count * (i + 1) / threads);
        } catch (...) {
            if (!failed.test_and_set()) failure = std::current_exception();
        }
    };
#if defined(_OPENMP)
    if (threads_after_fork() == 0) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int i = 0; i < threads; ++i) part(i);
    } else {
        on_new_threads(threads, part);
    }
#else
    on_new_threads(threads, part);
#endif
    if (failure) std::rethrow_exception(failure);
}

}  // namespace fusedloss
