// What the threads know of the parts of a row, and how that merges: exactly, and in any order but always in the same.
#pragma once

#include <type_traits>

#include "../epilogues.h"
#include "device.h"

namespace fusedloss {
namespace cuda {

constexpr int kWarp = 32;

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <typename T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

template <typename T>
struct Best {
    T value = -kInfinity<T>;
    int column = -1;  // none
};

// Statistics of a part of a row. Sums are in double: a few additions for each tile, which keep the digits of those
// within it.
template <typename T>
struct Partial {
    double rest = 0;  // sum of exp(z - max) over all but the target
    double mean = 0;  // sum of w (z - reference)
    T max = -kInfinity<T>;
    Best<T> top, second, below;

    // Whether this logit, from a column to the right, is among the largest one or two.
    FUSEDLOSS_DEVICE bool worth_a_look(T logit, int top_k) const {
        return top_k > 1 ? second.column < 0 || logit > second.value : top.column < 0 || logit > top.value;
    }
};

// Sums of a class term over columns that are neither the target nor the top class.
struct ClassPartial {
    double rest = 0;   // sum of exp(z - max)
    double loss = 0;   // sum of w f(p)
    double slope = 0;  // sum of p g
};

// NaN is no number to be the largest; the sums let it through.
template <typename T>
FUSEDLOSS_DEVICE T larger(T max, T x) {
    return std::fmax(max, x);
}

template <typename T>
FUSEDLOSS_DEVICE T finite_max(T max) {
    return max == -kInfinity<T> ? T(0) : max;  // exp(-inf - -inf) would be NaN
}

// On equal values the lower column is the larger.
template <typename T>
FUSEDLOSS_DEVICE bool beats(const Best<T>& x, const Best<T>& y) {
    return x.column >= 0 && (y.column < 0 || x.value > y.value || (x.value == y.value && x.column < y.column));
}

template <typename T>
FUSEDLOSS_DEVICE void insert(Best<T>& top, Best<T>& second, const Best<T>& x) {
    if (beats(x, top)) {
        second = top;
        top = x;
    } else if (beats(x, second)) {
        second = x;
    }
}

template <typename T>
FUSEDLOSS_DEVICE void merge(Partial<T>& x, const Partial<T>& y) {
    const T max = larger(x.max, y.max), base = finite_max(max);
    x.rest = x.rest * std::exp(x.max - base) + y.rest * std::exp(y.max - base);
    x.max = max;
    x.mean += y.mean;
    insert(x.top, x.second, y.top);
    insert(x.top, x.second, y.second);
    if (beats(y.below, x.below)) x.below = y.below;
}

FUSEDLOSS_DEVICE void merge(ClassPartial& x, const ClassPartial& y) {
    x.rest += y.rest;
    x.loss += y.loss;
    x.slope += y.slope;
}

// The parts of a warp's threads; every thread has the result, but its last bits may differ.
template <typename Part>
FUSEDLOSS_DEVICE Part merge_warp(Part part) {
#pragma unroll
    for (int bits = kWarp / 2; bits > 0; bits /= 2) merge(part, shuffle_xor(part, bits));
    return part;
}

}  // namespace cuda
}  // namespace fusedloss
