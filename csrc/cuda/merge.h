// What the threads know of the parts of a row, and how that merges: exactly, and in any order but always in the same.
#pragma once

#include <type_traits>

#include "../epilogues.h"
#include "device.h"

namespace fusedloss::cuda {

constexpr int kWarp = 32;

// What is asked of a pass beside maximum and sum. The code for it is not there where it is not asked for.
constexpr int kTop = 1, kBelow = 2, kMean = 4, kEverything = kTop | kBelow | kMean, kSums = 8;

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <typename T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
// The maximum of no numbers: finite, since exp(-inf - -inf) would be NaN.
template <typename T>
constexpr T kLowest = std::numeric_limits<T>::lowest();

// NaN is no number to be the largest; the sums let it through.
template <typename T>
FUSEDLOSS_DEVICE T larger(T max, T x) {
    return std::fmax(max, x);
}

// A difference of -inf, whose exponential is 0, as a number: its product with that is 0, and with a sum it is finite.
template <typename T>
FUSEDLOSS_DEVICE T bounded(T lag) {
    return larger(T(-1e30), lag);
}

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

// Statistics of a part of a row, of logits z as they lie in memory, which f multiplies. Sums are in double: a few
// additions for each tile, which keep the digits of those within it.
template <typename T>
struct Partial : Picks<T> {
    double rest = 0;    // sum of exp(f (z - max)) over all but the target; for moments, without the ties, which leaves
                        // the digits of the others
    double mean = 0;    // sum of w (z - reference)
    double excess = 0;  // sum of exp(f (z - max)) (z - max)
    double square = 0;  // sum of exp(2 f (z - max)) without the ties
    int ties = 0;       // how many but the target are the maximum; these three for moments alone
    T max = kLowest<T>;

    // The same sums by a maximum that is larger by -lag, with exp(f lag).
    FUSEDLOSS_DEVICE void shift(T lag, double factor) {
        const double all = rest + ties;
        excess = factor * (excess + double(bounded(lag)) * all);
        square = factor * factor * (square + ties);
        rest = factor * all;
        ties = 0;
    }
};

// Sums of a class term over columns that are neither the target nor the top class.
struct ClassPartial {
    double rest = 0;   // sum of exp(z - max)
    double loss = 0;   // sum of w f(p)
    double slope = 0;  // sum of p g
};

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

// Has the sums of a part be by this maximum of several.
template <int Asked, typename T>
FUSEDLOSS_DEVICE void refer(Partial<T>& x, T max, T f) {
    const T lag = x.max - max, factor = std::exp(lag * f);
    if constexpr (Asked & kSums) {
        if (x.max != max) x.shift(lag, factor);
    } else {
        x.rest *= factor;
    }
    x.max = max;
}

template <int Asked, typename T>
FUSEDLOSS_DEVICE void merge(Partial<T>& x, Partial<T> y, T f) {
    const T max = larger(x.max, y.max);
    refer<Asked>(x, max, f);
    refer<Asked>(y, max, f);
    x.rest += y.rest;
    if constexpr (Asked & kSums) {
        x.ties += y.ties;
        x.excess += y.excess;
        x.square += y.square;
    }
    if constexpr (Asked & kMean) x.mean += y.mean;
    merge_picks<Asked, T>(x, y);
}

template <int, typename T>
FUSEDLOSS_DEVICE void merge(ClassPartial& x, const ClassPartial& y, T) {
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
template <typename X>
FUSEDLOSS_DEVICE X sum_of_warp(X x) {
    return over_warp(x, [](X& a, X b) { a += b; });
}

// The parts of a warp's threads, for each of them. Only what is asked for is exchanged.
template <int Asked, typename T>
FUSEDLOSS_DEVICE Partial<T> merge_warp(Partial<T> part, T f) {
    refer<Asked>(part, over_warp(part.max, [](T& a, T b) { a = larger(a, b); }), f);
    part.rest = sum_of_warp(part.rest);
    if constexpr (Asked & kSums) {
        part.ties = sum_of_warp(part.ties);
        part.excess = sum_of_warp(part.excess);
        part.square = sum_of_warp(part.square);
    }
    if constexpr (Asked & kMean) part.mean = sum_of_warp(part.mean);
    if constexpr (Asked & (kTop | kBelow)) {
        Picks<T>& picks = part;
        picks = over_warp(picks, [](Picks<T>& a, const Picks<T>& b) { merge_picks<Asked>(a, b); });
    }
    return part;
}
template <int, typename T>
FUSEDLOSS_DEVICE ClassPartial merge_warp(ClassPartial part, T) {
    return {sum_of_warp(part.rest), sum_of_warp(part.loss), sum_of_warp(part.slope)};
}

}  // namespace fusedloss::cuda
