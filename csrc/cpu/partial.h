// What is known of a part of a row, and how two parts become one: the softmax's maximum and sum, the largest logits,
// moments, sums of a class or pair term. Parts merge in a fixed order, so that a result's bits do not depend on the
// number of threads.
#pragma once

#include <algorithm>

#include "../job.h"
#include "vector_math.h"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <typename T>
constexpr T kLeastLag = T(-1e30);  // of a logit from the largest, in a product with its exponential

template <typename T>
struct Best {
    T value;
    int64_t index;  // the first column of its block; negative: none
};

template <typename T>
constexpr Best<T> kNone = {-kInfinity<T>, -1};

// What the moments are made of, by the largest logit m. Without the largest the sum keeps the digits of the others.
struct Sums {
    double low = 0;     // sum of exp(z - m) over the logits below m
    double ties = 0;    // how many are m
    double excess = 0;  // sum of exp(z - m) (z - m)
    double square = 0;  // sum of exp(2 (z - m))
};

template <typename T>
struct Partial {
    T max = -kInfinity<T>;
    double rest = 0;  // sum of exp(z - max) over all but the target
    double mean = 0;  // sum of w (z - reference)
    Sums sums;
    Best<T> top = kNone<T>, second = kNone<T>, below = kNone<T>;
    bool moments = false;  // whether there are sums
};

template <typename T>
T finite_max(T max) {
    return max == -kInfinity<T> ? T(0) : max;  // exp(-inf - -inf) would be NaN
}

template <typename T>
void insert(Best<T>& top, Best<T>& second, const Best<T>& x) {
    if (x.index < 0) return;
    if (top.index < 0 || x.value > top.value) {
        second = top;
        top = x;
    } else if (second.index < 0 || x.value > second.value) {
        second = x;
    }
}

// Sums by another m, which is larger by -lag.
inline void shift(Sums& x, double lag) {
    lag = std::max(lag, kLeastLag<double>);  // 0 * -inf would be NaN
    const double factor = std::exp(lag), all = x.low + x.ties;
    x = {factor * all, 0, factor * (x.excess + lag * all), factor * factor * x.square};
}

// `y` comes from columns to the right of `x`: on equal values the lower index stays.
template <typename T>
FUSEDLOSS_ONE_COPY void merge(Partial<T>& x, const Partial<T>& y) {
    const T max = std::max(x.max, y.max);
    const double reference = finite_max(max);
    // A part without a finite logit has an empty sum (or a NaN that must pass through).
    if (x.max != max) x.rest *= std::exp(double(x.max) - reference);
    x.rest += y.max != max ? y.rest * std::exp(double(y.max) - reference) : y.rest;
    if (x.moments) {
        Sums more = y.sums;
        if (x.max != max) shift(x.sums, double(x.max) - reference);
        if (y.max != max) shift(more, double(y.max) - reference);
        x.sums = {x.sums.low + more.low, x.sums.ties + more.ties, x.sums.excess + more.excess,
                  x.sums.square + more.square};
    }
    x.max = max;
    x.mean += y.mean;
    insert(x.top, x.second, y.top);
    insert(x.top, x.second, y.second);
    if (y.below.index >= 0 && (x.below.index < 0 || y.below.value > x.below.value)) x.below = y.below;
}

// --- sums of a class or pair term ---

constexpr int kPowers = kAllMoments + 1;  // beside Moments: sums of powers of exp(z - max), for a class term
constexpr int kSlack = 32;                // how far a block's largest logit may be above the base of its exponentials

template <typename T>
constexpr int kTerms = sizeof(T) == 4 ? 4 : 5;

// The largest of some logits, and the sums of e = exp(z - base) and of w e^k, k = 1 ... kTerms.
template <typename T>
struct Powers {
    T max, base, rest, sum[kTerms<T>];
};

template <typename T, typename V>
FUSEDLOSS_INLINE void add_powers(V e, V weighted, V* sum) {
    const V e2 = e * e, weighted2 = weighted * e;
    sum[0] += weighted;
    sum[1] += weighted2;
    sum[2] += weighted * e2;
    sum[3] += weighted2 * e2;
}

// Sums of a class term over columns that are neither the target nor the top class, whose terms are singled out; or of a
// pair term.
struct TermSums {
    double loss = 0;   // sum of w f(p)
    double slope = 0;  // sum of p g; of a pair term, of h
    double mass = 0;   // sum of exp(z - max) over all but the top class; of a pair term, of p - y
};

inline void merge(TermSums& x, const TermSums& y) {
    x.loss += y.loss;
    x.slope += y.slope;
    x.mass += y.mass;
}

}  // namespace
}  // namespace fusedloss::FUSEDLOSS_ISA
