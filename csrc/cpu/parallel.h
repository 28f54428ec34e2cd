// Loops over independent items on the threads that torch uses.
//
// With OpenMP the extension shares torch's own runtime (same library name), hence its worker threads. A
// forked child has none of them: OpenMP would wait for them for ever, so a child runs serially.
#pragma once

#include <cstdint>

#if !defined(_OPENMP)
#include <thread>
#include <vector>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fusedloss {

inline bool& in_forked_child() {
    static bool forked = false;
    return forked;
}

inline void watch_forks() {
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { in_forked_child() = true; });
#endif
}

// body(begin, end) over a partition of [0, count) into one contiguous range a thread.
template <typename Body>
void parallel_for(int64_t count, int threads, const Body& body) {
    if (threads > count) threads = static_cast<int>(count);
    if (threads <= 1 || in_forked_child()) {
        if (count > 0) body(int64_t(0), count);
        return;
    }
    const auto part = [&](int64_t i) { body(count * i / threads, count * (i + 1) / threads); };
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int i = 0; i < threads; ++i) part(i);
#else
    std::vector<std::thread> workers;
    for (int i = 1; i < threads; ++i) workers.emplace_back(part, i);
    part(0);
    for (auto& worker : workers) worker.join();
#endif
}

}  // namespace fusedloss
