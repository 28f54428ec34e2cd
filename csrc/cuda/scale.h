// A gradient that was made before its upstream gradient was known, times that.
#pragma once

#include "rows.h"

namespace fusedloss::cuda {

// What is 0, as in an ignored row, remains so for a factor that is not finite.
template <typename S, typename T>
FUSEDLOSS_DEVICE void scale_one(S* gradient, T factor) {
    const T g = read(*gradient);
    write(gradient, g == T(0) ? g : g * factor);
}

// Only the device knows the factor. Where it is 1, as in most training, the gradient is not looked at.
template <typename S>
FUSEDLOSS_KERNEL void scale_pass(const Launch job) {
    using T = decltype(read(S{}));
    const T factor = *static_cast<const T*>(job.upstream);
    if (factor == T(1)) return;
    S* const gradient = static_cast<S*>(job.grad);
    const bool aligned = reinterpret_cast<uintptr_t>(gradient) % sizeof(Pack<S>) == 0;
    const int64_t packs = aligned ? job.rows / Pack<S>::size : 0;
    const int64_t first = block_index() * kMaxThreads + thread_index(), step = int64_t(job.groups) * kMaxThreads;
    for (int64_t i = first; i < packs; i += step) {
        Pack<S> x = reinterpret_cast<Pack<S>*>(gradient)[i];
#pragma unroll
        for (int k = 0; k < Pack<S>::size; ++k) scale_one(&x.item[k], factor);
        reinterpret_cast<Pack<S>*>(gradient)[i] = x;
    }
    for (int64_t i = packs * Pack<S>::size + first; i < job.rows; i += step) scale_one(gradient + i, factor);
}

template <typename S>
void scale(const Launch& job) {
    launch(scale_pass<S>, job.groups, 1, 1, kMaxThreads, 0, job.stream, job);
}

}  // namespace fusedloss::cuda
