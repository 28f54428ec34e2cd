// The losses' epilogues: from the statistics of a row of logits to its loss and the coefficients of its
// gradient.
//
// This header is the only place with a loss's C++ math. It knows nothing of memory, threads or frameworks,
// and the same functors serve the CPU engine (scalars and vectors) and a CUDA kernel (scalars).
//
// Notation: z logits of a row, p = softmax(z), t the target, m = max z, S = sum exp(z - m), lse = m + log S,
// q = 1 - p_t, ce = -log p_t. A "pick" is another class that the loss looks at: a top prediction or a
// candidate.
//
// Three kinds of loss:
//   row epilogue   L = f(ce, q, picks ...)           dL/dz_j = a p_j - sum_k b_k [j == k]
//   class term     L = sum_j w_j f(p_j, [j == t])    dL/dz_j = p_j (g_j - sum_k p_k g_k),  g_j = w_j df/dp_j
//   pair term      L = sum_j f(p_j, y_j)             dL/dz_j = h_j - p_j sum_k h_k,  h_j = p_j df/dp_j
// y is a second row over the classes: a teacher's probabilities, or targets.
//
// To add a loss: write its functor, with its name and the number of its parameters, and put it into RowEpilogues,
// ClassTerms or PairTerms at the end of this file. It is a template of X, a scalar or a vector of rows, and a row
// epilogue takes its powers from Pow, which has those of X. A loss of overlap, such as dice, is one math functor that
// the three forms below make epilogues of.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define FUSEDLOSS_HD __host__ __device__ __forceinline__
#define FUSEDLOSS_UNROLL _Pragma("unroll")
#else
// Inlined always, because vectors that cross a call go through memory.
#define FUSEDLOSS_HD inline __attribute__((always_inline))
#define FUSEDLOSS_UNROLL _Pragma("GCC unroll 16")
#endif

namespace fusedloss {

constexpr int kMaxParams = 4;

// What a row epilogue sees of its row, or of rows side by side. X is float, double for float64 logits, or a vector of
// rows; I are numbers of classes.
template <typename X, typename I = int64_t>
struct RowStatistics {
    X max;      // m
    X sum_exp;  // S
    X log_sum;  // log S; lse = max + log_sum
    X ce;       // accurate for p_t -> 1
    X q;        // accurate for p_t -> 1
    X p;        // p_t, accurate for p_t -> 0
    X mean_ce;  // (1/V) sum_j w_j (lse - z_j), where asked
    I target;
    int picks;
    const X* pick_logit;  // [picks]
    const I* pick_index;  // [picks]; negative: no such class

    FUSEDLOSS_HD X pick_ce(int k) const { return pick_index[k] == target ? ce : log_sum + (max - pick_logit[k]); }
};

// The gradient of a row epilogue. d = a - b_t is kept in place of b_t: the target's gradient is d - a q,
// which keeps its digits when p_t -> 1, where a p_t - b_t would cancel.
template <typename X>
struct RowGradient {
    X loss;
    X a;
    X d;
    X* b;  // [picks], zero on entry
};

// z^x, and z^x - 1 where that would cancel.
template <typename X>
struct Power {
    X value, minus_1;
};

// Powers z^x for z in [0, 1] with the limits that the losses need: 0^0 = 1, and no NaN. The CPU engine has its own, of
// vectors.
struct ScalarPowers {
    template <typename T>
    static FUSEDLOSS_HD T value(T z, T x) {
        return x == T(0) ? T(1) : std::pow(z, x);
    }

    template <typename T>
    static FUSEDLOSS_HD Power<T> pair(T z, T x) {
        const T minus_1 = x == T(0) ? T(0) : z > T(0) ? std::expm1(x * std::log(z)) : T(-1);
        return {minus_1 > T(-0.5) ? T(1) + minus_1 : value(z, x), minus_1};
    }
};

struct CrossEntropy {
    static constexpr const char* name = "cross_entropy";
    static constexpr int param_count = 0;
    template <typename Pow = ScalarPowers, typename X, typename I>
    static FUSEDLOSS_HD void run(const RowStatistics<X, I>& s, const X*, RowGradient<X>& g) {
        g.loss = s.ce;
        g.a = X{} + 1;
        g.d = X{};
    }
};

// L = lse
struct LogSumExp {
    static constexpr const char* name = "log_sum_exp";
    static constexpr int param_count = 0;
    template <typename Pow = ScalarPowers, typename X, typename I>
    static FUSEDLOSS_HD void run(const RowStatistics<X, I>& s, const X*, RowGradient<X>& g) {
        g.loss = s.max + s.log_sum;
        g.a = X{} + 1;
        g.d = X{} + 1;
    }
};

// L = q^gamma ce; a = b_t = q^gamma (1 + gamma p_t r), r = ce / q -> 1, finite for every gamma >= 0.
struct Focal {
    static constexpr const char* name = "focal";
    static constexpr int param_count = 1;
    template <typename Pow = ScalarPowers, typename X, typename I>
    static FUSEDLOSS_HD void run(const RowStatistics<X, I>& s, const X* params, RowGradient<X>& g) {
        const X gamma = params[0];
        const X modulation = Pow::value(s.q, gamma);
        const X ratio = s.q > X{} ? s.ce / s.q : X{} + 1;
        g.loss = modulation * s.ce;
        // p = 0 with an infinite ce would give 0 * inf; the limit is 0.
        g.a = modulation * (1 + (s.p > X{} ? gamma * s.p * ratio : X{}));
        g.d = X{};
    }
};

// L = (1 - alpha) ce_t + (alpha / K) sum_k ce_k over the K picks.
struct MixedCrossEntropy {
    static constexpr const char* name = "mixed_cross_entropy";
    static constexpr int param_count = 1;
    template <typename Pow = ScalarPowers, typename X, typename I>
    static FUSEDLOSS_HD void run(const RowStatistics<X, I>& s, const X* params, RowGradient<X>& g) {
        const X alpha = params[0];
        const X share = alpha / float(s.picks);
        X picked{}, others{};
        for (int k = 0; k < s.picks; ++k) {
            picked += s.pick_ce(k);
            const auto already = s.pick_index[k] == s.target;  // in d: b_t = 1 - alpha + share
            g.b[k] = already ? X{} : share;
            others += already ? X{} : X{} + 1;
        }
        // 0 * inf where a class without probability has no share.
        g.loss = (alpha < 1 ? (1 - alpha) * s.ce : X{}) + (alpha > X{} ? share * picked : X{});
        g.a = X{} + 1;
        g.d = share * others;
    }
};

// Losses of overlap, 1 - (agreement + s) / (error + agreement + s) = E / (E + C + s), which nothing cancels in. A math
// functor gives what a probability p adds to the error E and to the agreement C of its class:
//
//   positive   y = 1: E, C and their slopes, times 1 - p, so that they are finite where dE/dp itself is not (p -> 1)
//   negative   y = 0: E and its slope, times 1 - p; C = 0
//   small_negative   the same for p <= 0.5, where 1 - p is no matter; `g` = dE/dp.
//                    weight = (1 - p)^exponent, weight1 = (1 - p)^(exponent - 1)
//
//   steepness  a bound of E / p of y = 0
//
// Probabilities X and parameters P are scalars or vectors of rows. All take q = 1 - p and the power q^exponent, which
// the caller knows how to compute for either, and `count` parameters of their own; the next one is of the loss made of
// them.
template <typename X>
struct Overlap {
    X error, agreement, error_slope, agreement_slope;
};

// Self-adjusting dice, u = (1 - p)^alpha p: y = 1 adds E = (1 - u)^k and C = 2 u, y = 0 E = u^k, k = 2 if squared.
// Parameters: alpha, squared (0 or 1), self_adjust (0: the factor (1 - p)^alpha is a constant).
struct DscMath {
    static constexpr int count = 3;

    template <typename P>
    static FUSEDLOSS_HD P exponent(const P* params) {
        return params[0];
    }

    template <typename P>
    static FUSEDLOSS_HD P steepness(const P*) {
        return P(1);
    }

    template <typename X, typename P>
    static FUSEDLOSS_HD Overlap<X> positive(X p, X q, const Power<X>& weight, const P* params) {
        const X rest = q - p * weight.minus_1;  // 1 - u without cancellation
        const X du = weight.value * adjusted(p, q, params);
        const auto squared = params[1] != 0;
        return {squared ? rest * rest : rest, weight.value * p * 2, squared ? rest * du * -2 : -du, du * 2};
    }

    template <typename X, typename P>
    static FUSEDLOSS_HD X negative(X p, X q, const Power<X>& weight, const P* params, X& h) {
        return of_negative(p, weight.value, X(weight.value * adjusted(p, q, params)), params, h);
    }

    template <typename X, typename T>
    static FUSEDLOSS_HD X small_negative(X p, X weight, X weight1, const T* params, X& g) {
        const X du = params[2] != T(0) ? weight1 * (T(1) - p * (T(1) + params[0])) : weight;
        return of_negative(p, weight, du, params, g);
    }

   private:
    // (1 - p) du/dp over (1 - p)^alpha: 1 - (1 + alpha) p, from whichever of p and q keeps its digits, or q.
    template <typename X, typename P>
    static FUSEDLOSS_HD X adjusted(X p, X q, const P* params) {
        const P alpha = params[0];
        const X turn = p < 0.5f ? 1 - (alpha + 1) * p : (alpha + 1) * q - alpha;
        return params[2] != 0 ? turn : q;
    }

    template <typename X, typename P>
    static FUSEDLOSS_HD X of_negative(X p, X weight, X du, const P* params, X& g) {
        const P squared = params[1];
        const X u = weight * p;
        g = (u * (2 * squared) + (1 - squared)) * du;
        return u * (u * squared + (1 - squared));
    }
};

// Tversky: y = 1 adds E = beta (1 - p) and C = p, y = 0 E = alpha p. Parameters: alpha, beta.
struct TverskyMath {
    static constexpr int count = 2;

    template <typename P>
    static FUSEDLOSS_HD P exponent(const P*) {
        return P{};
    }

    template <typename P>
    static FUSEDLOSS_HD P steepness(const P* params) {
        return params[0];
    }

    template <typename X, typename P>
    static FUSEDLOSS_HD Overlap<X> positive(X p, X q, const Power<X>&, const P* params) {
        return {q * params[1], p, -q * params[1], q};
    }

    template <typename X, typename P>
    static FUSEDLOSS_HD X negative(X p, X q, const Power<X>&, const P* params, X& h) {
        h = q * params[0];
        return p * params[0];
    }

    template <typename X, typename T>
    static FUSEDLOSS_HD X small_negative(X p, X, X, const T* params, X& g) {
        g = X{} + params[0];
        return p * params[0];
    }
};

// The overlap of each class in each row for itself, summed over the classes. After the parameters of Math: s (smooth).
template <typename Math>
struct OneVsRest : Math {
    static constexpr int param_count = Math::count + 1;

    // The k-th Taylor coefficient of f(p) / p at y = 0 is about rate^k at most.
    template <typename P>
    static FUSEDLOSS_HD P rate(const P* params) {
        return P(1) + Math::exponent(params) + Math::steepness(params) / params[Math::count];
    }

    // Returns the loss times the class weight; `h` = (1 - p) times its slope.
    template <typename X, typename P>
    static FUSEDLOSS_HD X positive(X p, X q, const Power<X>& weight, X class_weight, const P* params, X& h) {
        const Overlap<X> x = Math::positive(p, q, weight, params);
        const X rest = x.agreement + params[Math::count], inverse = 1 / (x.error + rest);
        // The square of the inverse may be infinite where neither product is large.
        const X loss = x.error * inverse;
        h = class_weight * (x.error_slope * (rest * inverse) - x.agreement_slope * loss) * inverse;
        return class_weight * loss;
    }

    template <typename X, typename P>
    static FUSEDLOSS_HD X negative(X p, X q, const Power<X>& weight, const P* params, X& h) {
        const X error = Math::negative(p, q, weight, params, h);
        return finish(error, params, h);
    }

    template <typename X, typename T>
    static FUSEDLOSS_HD X small_negative(X p, X weight, X weight1, const T* params, X& g) {
        const X error = Math::small_negative(p, weight, weight1, params, g);
        return finish(error, params, g);
    }

   private:
    template <typename X, typename P>
    static FUSEDLOSS_HD X finish(X error, const P* params, X& slope) {
        const P smooth = params[Math::count];
        const X inverse = 1 / (error + smooth);
        slope = slope * inverse * (inverse * smooth);
        return error * inverse;
    }
};

// The overlap of each row's target class alone. After the parameters of Math: s (smooth).
template <typename Math>
struct OnTarget {
    static constexpr int param_count = Math::count + 1;

    template <typename Pow = ScalarPowers, typename X, typename I>
    static FUSEDLOSS_HD void run(const RowStatistics<X, I>& s, const X* params, RowGradient<X>& g) {
        X h;
        g.loss = OneVsRest<Math>::positive(s.p, s.q, Pow::pair(s.q, Math::exponent(params)), X{} + 1, params, h);
        // dL/dz_j = L'(p) p ([j == t] - p_j); where q underflows every p_j of the others is 0 too.
        g.a = s.q > X{} ? -s.p * h / s.q : X{};
        g.d = X{};
    }
};

// Error and agreement themselves, for a loss of their sums over the rows. With class weights w = dL/dE and, after the
// parameters of Math, the slope dL/dC of the row's target class, this term has that loss's gradient.
template <typename Sums>
struct OverRows : Sums {
    using Math = Sums;
    static constexpr int param_count = Math::count + 1;

    template <typename P>
    static FUSEDLOSS_HD P rate(const P* params) {
        return P(1) + Math::exponent(params);
    }

    template <typename X, typename P>
    static FUSEDLOSS_HD X positive(X p, X q, const Power<X>& weight, X class_weight, const P* params, X& h) {
        const Overlap<X> x = Math::positive(p, q, weight, params);
        const P slope = params[Math::count];
        h = class_weight * x.error_slope + slope * x.agreement_slope;
        return class_weight * x.error + slope * x.agreement;
    }
};

struct DscOneVsRest : OneVsRest<DscMath> {
    static constexpr const char* name = "dsc_one_vs_rest";
};
struct DscTarget : OnTarget<DscMath> {
    static constexpr const char* name = "dsc_target";
};
struct DscOverRows : OverRows<DscMath> {
    static constexpr const char* name = "dsc_over_rows";
};
struct TverskyOneVsRest : OneVsRest<TverskyMath> {
    static constexpr const char* name = "tversky_one_vs_rest";
};
struct TverskyTarget : OnTarget<TverskyMath> {
    static constexpr const char* name = "tversky_target";
};
struct TverskyOverRows : OverRows<TverskyMath> {
    static constexpr const char* name = "tversky_over_rows";
};

// --- pair terms ---

// A class in two rows: p of the student and y of the teacher, with d = log y - log p, which keeps its digits where the
// rows are close, as p and y do not. Where both are 0 it may be NaN, and must not count. The logarithms of p, y and of
// their mixture are for terms that mix; those of even mixtures are made of what follows from |d|, which has its digits.
template <typename X>
struct Both {
    X p, y, d, log_p, log_y, log_mixture;
    X larger, rest;  // max(p, y), and exp(-|d|), where |d| counts up to kFar
    X fall, excess;  // 1 - rest, |d| - fall
    X log_excess;    // log(1 - v) + v for v = fall * share, the smaller one's share of the mixture
};

// Beyond this exp(-|d|) is 0.
template <typename T>
constexpr T kFar = sizeof(T) == 4 ? T(88) : T(709);

// Whether the largest logits of two rows differ so much that each row's own is subtracted from its logits first. The
// difference of two logits keeps the digits of close rows, and loses them where one row lies far from the other.
template <typename X>
FUSEDLOSS_HD auto far_rows(X offset) {
    return (offset > X{} + 16) | (offset < X{} - 16);
}

// What a class adds to the loss, h = p df/dp, and p - y.
template <typename X>
struct PairTerm {
    X loss, slope, difference;
};

// Where |d| is below this, the terms are series in d: differences of probabilities would cancel.
template <typename T>
constexpr T kClose = sizeof(T) == 4 ? T(0.25) : T(0.125);

// exp(-x) - 1 + x for |x| <= kClose
template <typename T, typename X>
FUSEDLOSS_HD X excess_of(X x) {
    constexpr int terms = sizeof(T) == 4 ? 6 : 12;
    constexpr double inverse[] = {1.0 / 2,       1.0 / 6,        1.0 / 24,        1.0 / 120,
                                  1.0 / 720,     1.0 / 5040,     1.0 / 40320,     1.0 / 362880,
                                  1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
    X sum = X{} + T(inverse[terms - 1]);
    FUSEDLOSS_UNROLL
    for (int k = terms - 2; k >= 0; --k) sum = T(inverse[k]) - x * sum;
    return x * x * sum;
}

// 1 - u + u log u of u = 1 + x: a term of a divergence from a mixture. Near u = 1 it is a series, whose every term
// counts where that with log u would cancel.
template <typename T, typename X>
FUSEDLOSS_HD X gap_of(X x, X u, X log_u) {
    constexpr int terms = sizeof(T) == 4 ? 9 : 15;
    X sum = X{} + T(1.0 / ((terms + 1) * (terms + 2)));
    FUSEDLOSS_UNROLL
    for (int k = terms; k > 0; --k) sum = T(1.0 / (k * (k + 1))) - x * sum;
    const auto near = (x < kClose<T>)&(x > -kClose<T>);
    return near ? x * x * sum : (u > X{} ? u * log_u : X{}) - x;
}

// p - y, whether the two are close, and for these `excess` = exp(-d) - 1 + d. Without `Close` none are.
template <typename T, bool Close, typename X>
struct Distance {
    decltype(X{} < X{}) close{};
    X excess{}, difference;

    FUSEDLOSS_HD Distance(X p, X y, X of) {
        difference = p - y;
        if constexpr (Close) {
            close = (of < kClose<T>)&(of > -kClose<T>);
            const X d = close ? of : X{};
            excess = excess_of<T>(d);
            difference = close ? y * (excess - d) : difference;
        }
    }
};

// sum_j y_j (log y_j - log p_j) = sum_j y_j (exp(-d_j) - 1 + d_j), in which no term is negative
struct ForwardKl {
    static constexpr const char* name = "forward_kl";
    static constexpr int param_count = 1;
    static constexpr bool of_logits = true, mixes = false;

    // sum_j p_j^2 d2f/dp_j^2 where both rows are the same
    template <typename T>
    static FUSEDLOSS_HD T curvature(const T*) {
        return T(1);
    }

    template <typename T, bool Close = true, typename X>
    static FUSEDLOSS_HD PairTerm<X> term(const Both<X>& x, const T*) {
        const Distance<T, Close, X> s(x.p, x.y, x.d);
        const X apart = s.difference + (x.y > X{} ? x.y * x.d : X{});
        return {s.close ? x.y * s.excess : apart, s.difference, s.difference};
    }
};

// sum_j p_j (log p_j - log y_j) = sum_j p_j (exp(d_j) - 1 - d_j)
struct ReverseKl {
    static constexpr const char* name = "reverse_kl";
    static constexpr int param_count = 1;
    static constexpr bool of_logits = true, mixes = false;

    // sum_j p_j^2 d2f/dp_j^2 where both rows are the same
    template <typename T>
    static FUSEDLOSS_HD T curvature(const T*) {
        return T(1);
    }

    template <typename T, bool Close = true, typename X>
    static FUSEDLOSS_HD PairTerm<X> term(const Both<X>& x, const T*) {
        const Distance<T, Close, X> s(x.y, x.p, -x.d);
        const X slope = x.p > X{} ? -x.p * x.d : X{};
        return {s.close ? x.p * s.excess : slope + s.difference, slope, -s.difference};
    }
};

// 1/2 sum_j |p_j - y_j|
struct TotalVariation {
    static constexpr const char* name = "total_variation";
    static constexpr int param_count = 1;
    static constexpr bool of_logits = true, mixes = false;

    // sum_j p_j^2 d2f/dp_j^2 where both rows are the same
    template <typename T>
    static FUSEDLOSS_HD T curvature(const T*) {
        return T(0);
    }

    template <typename T, bool Close = true, typename X>
    static FUSEDLOSS_HD PairTerm<X> term(const Both<X>& x, const T*) {
        const Distance<T, Close, X> s(x.p, x.y, x.d);
        const X half = x.p * T(0.5);
        const X slope = x.d < X{} ? half : x.d > X{} ? -half : half * T(0);
        return {s.difference * (s.difference > X{} ? X{} + T(0.5) : X{} - T(0.5)), slope, s.difference};
    }
};

// a KL(y | m) + b KL(p | m) with m = mu y + (1 - mu) p: Jensen-Shannon and the skew divergences. Parameters: mu, a, b.
struct MixtureKl {
    static constexpr const char* name = "mixture_kl";
    static constexpr int param_count = 4;
    static constexpr bool of_logits = true, mixes = true;

    // sum_j p_j^2 d2f/dp_j^2 where both rows are the same
    template <typename T>
    static FUSEDLOSS_HD T curvature(const T* params) {
        return params[1] * (T(1) - params[0]) * (T(1) - params[0]) + params[2] * params[0] * params[0];
    }

    template <typename X, typename T>
    static FUSEDLOSS_HD X mixture(X p, X y, const T* params) {
        return y * params[0] + p * (T(1) - params[0]);
    }

    template <typename T, bool Close = true, typename X>
    static FUSEDLOSS_HD PairTerm<X> term(const Both<X>& x, const T* params) {
        const T mu = params[0], a = params[1], b = params[2], rest = T(1) - mu;
        const Distance<T, true, X> s(x.p, x.y, x.d);
        constexpr T least = std::numeric_limits<T>::min();  // 1 / m of what is below it may be infinite
        const X m = mixture(x.p, x.y, params), inverse = m < least ? X{} : T(1) / m;
        // y / m and p / m less 1
        const X of_y = s.difference * inverse * -rest, of_p = s.difference * inverse * mu;
        const X gap_y = gap_of<T>(of_y, X(x.y * inverse), X(x.log_y - x.log_mixture));
        const X gap_p = gap_of<T>(of_p, X(x.p * inverse), X(x.log_p - x.log_mixture));
        // p log(p / m) = m (gap + p / m - 1)
        const X bent = x.p * inverse * s.difference * (rest * (a * rest - b * mu));
        return {m * (gap_y * a + gap_p * b), bent + m * (gap_p + of_p) * b, s.difference};
    }
};

// The same in a form without differences of logarithms, where its own differences leave the digits: neither row has
// almost all of the mixture, and what cancels near d = 0 is not far larger than what is left, the curvature.
struct EvenMixtureKl : MixtureKl {
    template <typename T>
    static FUSEDLOSS_HD bool takes(const T* params) {
        const T mu = params[0], rest = T(1) - mu, least = T(1) / 16, left = curvature(params);
        return mu >= least && rest >= least && left >= least * params[1] * mu * mu &&
               left >= least * params[2] * rest * rest;
    }

    template <typename X, typename T>
    static FUSEDLOSS_HD X share(X d, const T* params) {
        return d > X{} ? X{} + (T(1) - params[0]) : X{} + params[0];
    }

    // With B = max(p, y), w the smaller one's share, v = w fall and l = log(1 - v) + v the mixture is B (1 - v), and
    // the loss has no more of its first order in d:
    //   B (c_smaller ((1 - w) fall^2 - exp(-|d|) excess) - l (c_larger + c_smaller exp(-|d|)))
    template <typename T, bool Close = true, typename X>
    static FUSEDLOSS_HD PairTerm<X> term(const Both<X>& x, const T* params) {
        const T mu = params[0], a = params[1], b = params[2];
        const auto above = x.d > X{};
        const X w = share(x.d, params), larger = above ? X{} + a : X{} + b, smaller = above ? X{} + b : X{} + a;
        const X others = T(1) - w, v = x.fall * w;
        const X bent = smaller * (others * x.fall * x.fall - x.rest * x.excess);
        // log(m / p)
        const X log_ratio = x.log_excess + (above ? x.excess + others * x.fall : -v);
        const X difference = above ? -x.fall : x.fall;
        X slope = log_ratio * -b;
        const T skew = (T(1) - mu) * (a * (T(1) - mu) - b * mu);
        if (skew != T(0)) slope += difference / (T(1) - v) * skew;
        return {x.larger * (bent - x.log_excess * (larger + smaller * x.rest)), x.p * slope, x.larger * difference};
    }
};

// The loss of a row from its sums over the classes. A rounded log-sum-exp makes all p too large by the same factor,
// 1 + the sum of p - y; what that adds to the loss is taken off to the second order, whose coefficient is that of close
// rows: elsewhere nobody would see it.
template <typename T>
FUSEDLOSS_HD T whole_loss(T loss, T slope, T difference, T curvature) {
    const T more = difference * (slope - curvature / 2 * difference);
    return loss - loss == T(0) ? loss - more : loss;  // infinity stays
}

// -sum_j y_j log p_j of targets y, which need not sum to 1; `d` is -log p. Parameters: what smoothing leaves of a
// target, and what it adds to each.
struct SoftTargets {
    static constexpr const char* name = "soft_targets";
    static constexpr int param_count = 2;
    static constexpr bool of_logits = false, mixes = false;

    // sum_j p_j^2 d2f/dp_j^2 where both rows are the same
    template <typename T>
    static FUSEDLOSS_HD T curvature(const T*) {
        return T(0);
    }

    template <typename T, bool Close = true, typename X>
    static FUSEDLOSS_HD PairTerm<X> term(const Both<X>& x, const T*) {
        // A NaN among the targets must pass through.
        return {x.y == X{} ? X{} : x.y * x.d, -x.y, X{}};
    }
};

template <typename... Functors>
struct FunctorList {};

using RowEpilogues = FunctorList<CrossEntropy, LogSumExp, Focal, MixedCrossEntropy, DscTarget, TverskyTarget>;
using ClassTerms = FunctorList<DscOneVsRest, DscOverRows, TverskyOneVsRest, TverskyOverRows>;
using PairTerms = FunctorList<ForwardKl, ReverseKl, TotalVariation, MixtureKl, SoftTargets>;
using SummedTerms = FunctorList<DscOverRows, TverskyOverRows>;  // those whose sums over the rows are a loss's

// What every loss shares: label smoothing, z-loss and class weight.
//   L = w_t (main * base + z_loss lse^2) + smooth * sum_j w_j (-log p_j)
template <typename T>
struct Shared {
    T main;    // 1 - eps, and less for smoothing over the others
    T smooth;  // eps / V
    T z_loss;
    T weight_sum;  // sum_j w_j, V without weights
};

template <typename T, typename X, typename I>
FUSEDLOSS_HD void apply_shared(const RowStatistics<X, I>& s, const Shared<T>& shared, X weight, int64_t classes,
                               RowGradient<X>& g) {
    const X lse = s.max + s.log_sum;
    const X z_slope = shared.z_loss != T(0) ? T(2) * shared.z_loss * lse : X{};
    const T spread = shared.smooth * shared.weight_sum;
    const X z_term = shared.z_loss != T(0) ? shared.z_loss * lse * lse : X{};
    g.loss = weight * (shared.main * g.loss + z_term);
    if (shared.smooth != T(0)) g.loss += shared.smooth * T(classes) * s.mean_ce;
    g.a = weight * (shared.main * g.a + z_slope) + spread;
    g.d = weight * (shared.main * g.d + z_slope) + spread;
    for (int k = 0; k < s.picks; ++k) g.b[k] *= weight * shared.main;
}

}  // namespace fusedloss
