// What the threads know of the parts of a row, and how that merges: exactly, and in any order but always in the same.
#pragma once

#include <type_traits>

#include "../epilogues.h"
#include "device.h"

namespace fusedloss {
namespace cuda {

constexpr int kWarp = 32;

// What is asked of a pass beside maximum and sum. The code for it is not there where it is not asked for.
constexpr int kTop = 1, kBelow = 2, kMean = 4, kEverything = kTop | kBelow | kMean;

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <typename T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
// The maximum of no numbers: finite, since exp(-inf - -inf) would be NaN.
template <typename T>
constexpr T kLowest = std::numeric_limits<T>::lowest();

template <typename T>
struct Best {
    T value = -kInfinity<T>;
    int column = -1;  // none
};

template <typename T>
struct Picks {
    Best<T> top, second, below;

    // Whether this logit, from a column to the right, is among the largest one or two.
    FUSEDLOSS_DEVICE bool worth_a_look(T logit, int top_k) const {
        return top_k > 1 ? second.column < 0 || logit > second.value : top.column < 0 || logit > top.value;
    }
};

// Statistics of a part of a row. Sums are in double: a few additions for each tile, which keep the digits of those
// within it.
template <typename T>
struct Partial : Picks<T> {
    double rest = 0;  // sum of exp(z - max) over all but the target
    double mean = 0;  // sum of w (z - reference)
    T max = kLowest<T>;
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

template <int Asked, typename T>
FUSEDLOSS_DEVICE void merge_picks(Picks<T>& x, const Picks<T>& y) {
    if constexpr (Asked & kTop) {
        insert(x.top, x.second, y.top);
        insert(x.top, x.second, y.second);
    }
    if constexpr (Asked & kBelow) {
        if (beats(y.below, x.below)) x.below = y.below;
    }
}

template <int Asked, typename T>
FUSEDLOSS_DEVICE void merge(Partial<T>& x, const Partial<T>& y) {
    const T max = larger(x.max, y.max);
    x.rest = x.rest * std::exp(x.max - max) + y.rest * std::exp(y.max - max);
    x.max = max;
    if constexpr (Asked & kMean) x.mean += y.mean;
    merge_picks<Asked, T>(x, y);
}

template <int>
FUSEDLOSS_DEVICE void merge(ClassPartial& x, const ClassPartial& y) {
    x.rest += y.rest;
    x.loss += y.loss;
    x.slope += y.slope;
}

// combine(x, y) adds another thread's y to x, until x is of all of a warp's threads.
template <typename X, typename Combine>
FUSEDLOSS_DEVICE X over_warp(X x, const Combine& combine) {
#pragma unroll
    for (int bits = kWarp / 2; bits > 0; bits /= 2) combine(x, shuffle_xor(x, bits));
    return x;
}
FUSEDLOSS_DEVICE double sum_of_warp(double x) {
    return over_warp(x, [](double& a, double b) { a += b; });
}

// The parts of a warp's threads, for each of them. Only what is asked for is exchanged.
template <int Asked, typename T>
FUSEDLOSS_DEVICE Partial<T> merge_warp(Partial<T> part) {
    const T max = over_warp(part.max, [](T& a, T b) { a = larger(a, b); });
    part.rest = sum_of_warp(part.rest * std::exp(part.max - max));
    part.max = max;
    if constexpr (Asked & kMean) part.mean = sum_of_warp(part.mean);
    if constexpr (Asked & (kTop | kBelow)) {
        Picks<T>& picks = part;
        picks = over_warp(picks, [](Picks<T>& a, const Picks<T>& b) { merge_picks<Asked>(a, b); });
    }
    return part;
}
template <int>
FUSEDLOSS_DEVICE ClassPartial merge_warp(ClassPartial part) {
    return {sum_of_warp(part.rest), sum_of_warp(part.loss), sum_of_warp(part.slope)};
}

}  // namespace cuda
}  // namespace fusedloss
