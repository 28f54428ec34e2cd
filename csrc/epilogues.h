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
// Two kinds of loss:
//   row epilogue   L = f(ce, q, picks ...)           dL/dz_j = a p_j - sum_k b_k [j == k]
//   class term     L = sum_j w_j f(p_j, [j == t])    dL/dz_j = p_j (g_j - sum_k p_k g_k),  g_j = w_j df/dp_j
//
// To add a loss: write its functor and put it into RowEpilogues or ClassTerms at the end of this file.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FUSEDLOSS_HD __host__ __device__ __forceinline__
#else
// Inlined always, because vectors that cross a call go through memory.
#define FUSEDLOSS_HD inline __attribute__((always_inline))
#endif

namespace fusedloss {

constexpr int kMaxParams = 4;

// What a row epilogue sees of its row. T is float, or double for float64 logits.
template <typename T>
struct RowStatistics {
    T max;      // m
    T sum_exp;  // S
    T log_sum;  // log S; lse = max + log_sum
    T ce;       // accurate for p_t -> 1
    T q;        // accurate for p_t -> 1
    T p;        // p_t, accurate for p_t -> 0
    T mean_ce;  // (1/V) sum_j w_j (lse - z_j), where asked
    int64_t target;
    int picks;
    const T* pick_logit;        // [picks]
    const int64_t* pick_index;  // [picks]; negative: no such class

    FUSEDLOSS_HD T pick_ce(int k) const { return pick_index[k] == target ? ce : log_sum + (max - pick_logit[k]); }
};

// The gradient of a row epilogue. d = a - b_t is kept in place of b_t: the target's gradient is d - a q,
// which keeps its digits when p_t -> 1, where a p_t - b_t would cancel.
template <typename T>
struct RowGradient {
    T loss;
    T a;
    T d;
    T* b;  // [picks], zero on entry
};

// z^x for z in [0, 1] with the limits that the losses need: 0^0 = 1, and no NaN.
template <typename T>
FUSEDLOSS_HD T power(T z, T x) {
    return x == T(0) ? T(1) : std::pow(z, x);
}

struct CrossEntropy {
    static constexpr const char* name = "cross_entropy";
    template <typename T>
    static FUSEDLOSS_HD void run(const RowStatistics<T>& s, const T*, RowGradient<T>& g) {
        g.loss = s.ce;
        g.a = T(1);
        g.d = T(0);
    }
};

// L = lse
struct LogSumExp {
    static constexpr const char* name = "log_sum_exp";
    template <typename T>
    static FUSEDLOSS_HD void run(const RowStatistics<T>& s, const T*, RowGradient<T>& g) {
        g.loss = s.max + s.log_sum;
        g.a = T(1);
        g.d = T(1);
    }
};

// L = q^gamma ce; a = b_t = q^gamma (1 + gamma p_t r), r = ce / q -> 1, finite for every gamma >= 0.
struct Focal {
    static constexpr const char* name = "focal";
    template <typename T>
    static FUSEDLOSS_HD void run(const RowStatistics<T>& s, const T* params, RowGradient<T>& g) {
        const T gamma = params[0];
        const T modulation = power(s.q, gamma);
        const T p = s.p;
        const T ratio = s.q > T(0) ? s.ce / s.q : T(1);
        g.loss = modulation * s.ce;
        // p = 0 with an infinite ce would give 0 * inf; the limit is 0.
        g.a = modulation * (T(1) + (p > T(0) ? gamma * p * ratio : T(0)));
        g.d = T(0);
    }
};

// L = (1 - alpha) ce_t + (alpha / K) sum_k ce_k over the K picks.
struct MixedCrossEntropy {
    static constexpr const char* name = "mixed_cross_entropy";
    template <typename T>
    static FUSEDLOSS_HD void run(const RowStatistics<T>& s, const T* params, RowGradient<T>& g) {
        const T alpha = params[0];
        const T share = alpha / T(s.picks);
        T picked = T(0);
        int others = 0;
        for (int k = 0; k < s.picks; ++k) {
            picked += s.pick_ce(k);
            if (s.pick_index[k] == s.target) continue;  // already in d: b_t = 1 - alpha + share
            g.b[k] = share;
            ++others;
        }
        // 0 * inf where a class without probability has no share.
        g.loss = (alpha < T(1) ? (T(1) - alpha) * s.ce : T(0)) + (alpha > T(0) ? share * picked : T(0));
        g.a = T(1);
        g.d = share * T(others);
    }
};

// z^x, and z^x - 1 where that would cancel.
template <typename X>
struct Power {
    X value, minus_1;
};

template <typename T>
FUSEDLOSS_HD Power<T> power_pair(T z, T x) {
    const T minus_1 = x == T(0) ? T(0) : z > T(0) ? std::expm1(x * std::log(z)) : T(-1);
    return {minus_1 > T(-0.5) ? T(1) + minus_1 : power(z, x), minus_1};
}

// The binary dice loss of one probability, u = (1 - p)^alpha p:
//   linear   1 - (2 u y + s) / (u + y + s)        squared   1 - (2 u y + s) / (u^2 + y + s)
// Parameters: alpha, s (smooth), squared (0 or 1), self_adjust (0: the factor (1 - p)^alpha is a constant).
// Numerators are written without the cancelling "1 -". Probabilities X and parameters P are scalars or vectors of rows;
// powers of q = 1 - p come from the caller, who knows how to compute them for either.
struct DscMath {
    // y = 1. Returns the loss; `h` = (1 - p) dL/dp, finite where dL/dp itself is not (alpha < 1, p -> 1).
    template <typename X, typename P>
    static FUSEDLOSS_HD X positive(X p, X q, const Power<X>& weight, const P* params, X& h) {
        const P smooth = params[1];
        const X u = weight.value * p;
        const X rest = q - p * weight.minus_1;  // 1 - u without cancellation
        const X du = weight.value * adjusted(p, q, params);
        const auto squared = params[2] != 0;
        const X denominator = (squared ? u * u : u) + 1 + smooth;
        const X slope = squared ? rest * (u + 1 + smooth) * 2 : X{} + 2 + smooth;
        h = -slope / (denominator * denominator) * du;
        return (squared ? rest * rest : rest) / denominator;
    }

    // y = 0. Returns the loss; `h` as above.
    template <typename X, typename P>
    static FUSEDLOSS_HD X negative(X p, X q, const Power<X>& weight, const P* params, X& h) {
        return of_negative(p, weight.value, X(weight.value * adjusted(p, q, params)), params, h);
    }

    // The same for p <= 0.5, where 1 - p is no matter. weight = (1 - p)^alpha, weight1 = (1 - p)^(alpha - 1). Returns
    // the loss; `g` = dL/dp.
    template <typename X, typename T>
    static FUSEDLOSS_HD X small_negative(X p, X weight, X weight1, const T* params, X& g) {
        const T alpha = params[0];
        const X du = params[3] != T(0) ? weight1 * (T(1) - p * (T(1) + alpha)) : weight;
        return of_negative(p, weight, du, params, g);
    }

   private:
    // (1 - p) du/dp over (1 - p)^alpha: 1 - (1 + alpha) p, from whichever of p and q keeps its digits, or q.
    template <typename X, typename P>
    static FUSEDLOSS_HD X adjusted(X p, X q, const P* params) {
        const P alpha = params[0];
        const X turn = p < 0.5f ? 1 - (alpha + 1) * p : (alpha + 1) * q - alpha;
        return params[3] != 0 ? turn : q;
    }

    template <typename X, typename P>
    static FUSEDLOSS_HD X of_negative(X p, X weight, X du, const P* params, X& g) {
        const P smooth = params[1], squared = params[2];
        const X u = weight * p;
        const X top = u * (u * squared + (1 - squared));
        const X inverse = 1 / (top + smooth);
        g = (u * (2 * squared) + (1 - squared)) * (inverse * inverse) * du * smooth;
        return top * inverse;
    }
};

// Dice on the target class of each row alone.
struct DscTarget {
    static constexpr const char* name = "dsc_target";
    template <typename T>
    static FUSEDLOSS_HD void run(const RowStatistics<T>& s, const T* params, RowGradient<T>& g) {
        const T p = s.p;
        T h;
        g.loss = DscMath::positive(p, s.q, power_pair(s.q, params[0]), params, h);
        // dL/dz_j = L'(p) p ([j == t] - p_j); where q underflows every p_j of the others is 0 too.
        g.a = s.q > T(0) ? -p * h / s.q : T(0);
        g.d = T(0);
    }
};

// Dice of every class against the rest, summed over the classes.
struct DscOneVsRest : DscMath {
    static constexpr const char* name = "dsc_one_vs_rest";
    template <typename T>
    static FUSEDLOSS_HD T exponent(const T* params) {
        return params[0];
    }
};

template <typename... Functors>
struct FunctorList {};

using RowEpilogues = FunctorList<CrossEntropy, LogSumExp, Focal, MixedCrossEntropy, DscTarget>;
using ClassTerms = FunctorList<DscOneVsRest>;

// What every loss shares: label smoothing, z-loss and class weight.
//   L = w_t (main * base + z_loss lse^2) + smooth * sum_j w_j (-log p_j)
template <typename T>
struct Shared {
    T main;    // 1 - eps, and less for smoothing over the others
    T smooth;  // eps / V
    T z_loss;
    T weight_sum;  // sum_j w_j, V without weights
};

template <typename T>
FUSEDLOSS_HD void apply_shared(const RowStatistics<T>& s, const Shared<T>& shared, T weight, int64_t classes,
                               RowGradient<T>& g) {
    const T lse = s.max + s.log_sum;
    const T z_slope = shared.z_loss != T(0) ? T(2) * shared.z_loss * lse : T(0);
    const T spread = shared.smooth * shared.weight_sum;
    const T z_term = shared.z_loss != T(0) ? shared.z_loss * lse * lse : T(0);
    g.loss = weight * (shared.main * g.loss + z_term);
    if (shared.smooth != T(0)) g.loss += shared.smooth * T(classes) * s.mean_ce;
    g.a = weight * (shared.main * g.a + z_slope) + spread;
    g.d = weight * (shared.main * g.d + z_slope) + spread;
    for (int k = 0; k < s.picks; ++k) g.b[k] *= weight * shared.main;
}

}  // namespace fusedloss
