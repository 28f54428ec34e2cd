// Exponentials and logarithms of vectors, accurate to the type, and what of them keeps its digits where they cancel:
// exp(x) - 1, log(1 + x), z^x - 1.
#pragma once

#include <cmath>
#include <limits>

#include "vector.h"

namespace fusedloss::FUSEDLOSS_ISA {

// --- exp(x) for x <= 80 (or NaN): 2^n times a polynomial on [-log(2)/2, log(2)/2] ---

#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kFma = true;
#else
constexpr bool kFma = false;
#endif

template <typename T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
    static constexpr float rounder = 0x1.8p23f + 127, lowest = -87.0f, ln2_high = 0x1.62e4p-1f,
                           ln2_low = 0x1.7f7d1cp-20f;
    static constexpr int shift = 23, degree = 6;
    // Minimax for the relative error, 3e-9, with the first two coefficients exact.
    static constexpr float polynomial[degree + 1] = {1.0f,           1.0f,           0x1.000002p-1f, 0x1.5553b8p-3f,
                                                     0x1.55514ap-5f, 0x1.129444p-7f, 0x1.70a79ep-10f};
};
template <>
struct ExpConstants<double> {
    static constexpr double rounder = 0x1.8p52 + 1023, lowest = -708.0, ln2_high = 0x1.62e42fefap-1,
                            ln2_low = 0x1.cf79abc9e3b39p-40;
    static constexpr int shift = 52, degree = 13;
    // Taylor: 1 / k!
    static constexpr double polynomial[degree + 1] = {
        1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
        1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
};

// x - n log(2) for a whole n
template <typename T>
FUSEDLOSS_INLINE typename VectorOf<T>::Value without_powers(typename VectorOf<T>::Value x,
                                                            typename VectorOf<T>::Value n) {
    using C = ExpConstants<T>;
    // With a fused product, which compilers make of this from -O2 on, one rounded log(2) gives r within 2e-9 |n|.
    return kFma && sizeof(T) == 4 ? x - n * T(0.6931471805599453) : (x - n * C::ln2_high) - n * C::ln2_low;
}

// x = n log(2) + r: returns r, and 2^n in the bits of `power`.
template <typename T>
FUSEDLOSS_INLINE typename VectorOf<T>::Value exp_remainder(typename VectorOf<T>::Value x,
                                                           typename VectorOf<T>::Value& power) {
    using C = ExpConstants<T>;
    using V = typename VectorOf<T>::Value;
    using Words = typename VectorOf<T>::Words;
    const V shifted =
        x * T(1.4426950408889634) + C::rounder;  // low bits: the exponent field of 2^n, n = round(x / log 2)
    const V n = shifted - C::rounder;
    power = bit_cast<V>(bit_cast<Words>(shifted) << C::shift);
    return without_powers<T>(x, n);
}

template <typename T>
FUSEDLOSS_INLINE typename VectorOf<T>::Value exp_bounded(typename VectorOf<T>::Value x) {
    using C = ExpConstants<T>;
    using V = typename VectorOf<T>::Value;
    V power;
    const V r = exp_remainder<T>(x, power);
    V poly = splat(C::polynomial[C::degree]);
#pragma GCC unroll 16
    for (int k = C::degree - 1; k >= 0; --k) poly = poly * r + C::polynomial[k];
    // A product, not a sum of bits, lets a NaN through whatever its payload.
    const V result = poly * power;
    return x < C::lowest ? V{} : result;
}

// exp(x) for x <= 80, of which a factor of S is made: for 16 bits within 2^-16 is enough.
template <typename S>
FUSEDLOSS_INLINE auto exp_stored(typename VectorOf<typename ComputeOf<S>::type>::Value x) {
    if constexpr (sizeof(S) > 2) {
        return exp_bounded<S>(x);
    } else {
        constexpr float rounder = ExpConstants<float>::rounder;
        FloatVector log2 = x * 1.4426950408889634f;
#if defined(__AVX512F__)
        asm("" : "+v"(log2));  // keeps GCC from making the product twice, fused with either sum
#endif
        const FloatVector shifted = log2 + rounder, f = log2 - (shifted - rounder);
        // 2^f, minimax for the relative error, 3e-6
        FloatVector poly = splat(0x1.3997d6p-7f);
        poly = poly * f + 0x1.ca1440p-5f;
        poly = poly * f + 0x1.ec06dap-3f;
        poly = poly * f + 0x1.62e0dcp-1f;
        poly = poly * f + 0x1.ffffe8p-1f;
        const FloatVector result = poly * bit_cast<FloatVector>(bit_cast<WordVector>(shifted) << 23);
        return x < ExpConstants<float>::lowest ? FloatVector{} : result;
    }
}

// a exp(x) as bfloat16 for x <= 0, which a polynomial rounds itself: a exp(x) = 2^n m with m in [1, 2), and the sum of
// m and 2^16 ends where the mantissa of a bfloat16 does. Within 0.5001 of the last bit, which is what an exponential in
// float is when it is rounded; 0 below the normal numbers.
class RoundedExp {
   public:
    explicit RoundedExp(float a) {
        const double log2_a = std::log2(std::abs(double(a))) - 0.4998458870832057;  // log2(181/128)
        const double whole = std::nearbyint(log2_a);                                // apart, for the digits of the rest
        log2_a_ = static_cast<float>(log2_a - whole);
        rounder_ = 0x1.8p23f + 126 + static_cast<float>(whole) + (a < 0 ? 256 : 0);
        lowest_ = static_cast<float>(-126.49984 - whole);
    }

    // A NaN among the logits of a row makes `a` one, which this does not take.
    static bool takes(float a) { return std::abs(a) >= 0x1p-60f && std::abs(a) <= 0x1p60f; }

    FUSEDLOSS_INLINE Rounded operator()(FloatVector x) const {
        const FloatVector log2 = x * kLog2E + log2_a_;
        const FloatVector shifted = log2 + rounder_;  // low bits: n, and the sign above it
        const FloatVector f = without_powers<float>(x, shifted - rounder_) * kLog2E + log2_a_;
        // m = 181/128 2^f, minimax for the relative error, 9e-8
        FloatVector m = splat(0x1.ebb49cp-10f);
        m = m * f + 0x1.c02424p-7f;
        m = m * f + 0x1.417fa0p-4f;
        m = m * f + 0x1.5bd790p-2f;
        m = m * f + 0x1.f5d6a2p-1f;
        m = m * f + (0x1p16f + 181.0f / 128);
        const WordVector words = bit_cast<WordVector>(m) + (bit_cast<WordVector>(shifted) << 7);
        return {log2 < lowest_ ? WordVector{} : words};
    }

   private:
    static constexpr float kLog2E = 1.4426950408889634f;
    float log2_a_, rounder_, lowest_;
};

// exp(x) - 1, and exp(x) in `exp`.
template <typename T>
FUSEDLOSS_INLINE typename VectorOf<T>::Value expm1_bounded(typename VectorOf<T>::Value x,
                                                           typename VectorOf<T>::Value& exp) {
    using C = ExpConstants<T>;
    using V = typename VectorOf<T>::Value;
    V power;
    const V r = exp_remainder<T>(x, power);
    V poly = splat(C::polynomial[C::degree]);
#pragma GCC unroll 16
    for (int k = C::degree - 1; k >= 1; --k) poly = poly * r + C::polynomial[k];
    const V tail = poly * r;  // exp(r) - 1
    exp = x < C::lowest ? V{} : (tail + T(1)) * power;
    return x < C::lowest ? splat(T(-1)) : tail * power + (power - T(1));
}

// exp(-x) for x >= 0, with `fall` = 1 - exp(-x) and `excess` = x - fall, which both keep their digits.
template <typename T>
FUSEDLOSS_INLINE typename VectorOf<T>::Value fall_of(typename VectorOf<T>::Value x, typename VectorOf<T>::Value& fall,
                                                     typename VectorOf<T>::Value& excess) {
    using C = ExpConstants<T>;
    using V = typename VectorOf<T>::Value;
    V power;
    const V r = exp_remainder<T>(-x, power), r2 = r * r;
    // By even and odd powers: the longest chain of a term is here.
    V even = splat(C::polynomial[C::degree & ~1]), odd = splat(C::polynomial[(C::degree - 1) | 1]);
#pragma GCC unroll 16
    for (int k = (C::degree & ~1) - 2; k >= 2; k -= 2) even = even * r2 + C::polynomial[k];
#pragma GCC unroll 16
    for (int k = ((C::degree - 1) | 1) - 2; k >= 2; k -= 2) odd = odd * r2 + C::polynomial[k];
    const V tail = (odd * r + even) * r2;  // exp(r) - 1 - r
    // 1 - exp(-x) without the tail; for small x the power is 1 and r is -x.
    const V plain = (T(1) - power) - r * power;
    fall = plain - tail * power;
    excess = tail * power + (x - plain);
    return -x < C::lowest ? V{} : (tail + (r + T(1))) * power;
}

// x = 2^n m with m in [2/3, 4/3), x > 0 and normal (anything elsewhere): returns log m = 2 atanh((m - 1) / (m + 1)).
template <typename T>
FUSEDLOSS_INLINE typename VectorOf<T>::Value log_mantissa(typename VectorOf<T>::Value x,
                                                          typename VectorOf<T>::Value& n) {
    using V = typename VectorOf<T>::Value;
    using Bits = typename VectorOf<T>::Bits;
    using Words = typename VectorOf<T>::Words;
    constexpr int shift = ExpConstants<T>::shift, terms = sizeof(T) == 4 ? 5 : 12;
    const Bits exponent = (bit_cast<Bits>(x * T(1.5)) >> shift) - (bit_cast<Bits>(splat(T(1))) >> shift);
    n = __builtin_convertvector(exponent, V);
    const V m = bit_cast<V>(bit_cast<Words>(x) - (bit_cast<Words>(exponent) << shift));
    const V y = (m - T(1)) / (m + T(1));
    const V y2 = y * y;
    V poly = splat(T(1.0 / (2 * terms + 1)));
#pragma GCC unroll 16
    for (int k = terms - 1; k >= 0; --k) poly = poly * y2 + T(1.0 / (2 * k + 1));
    return T(2) * y * poly;
}

template <typename T>
FUSEDLOSS_INLINE typename VectorOf<T>::Value log_positive(typename VectorOf<T>::Value x) {
    typename VectorOf<T>::Value n;
    const auto log_m = log_mantissa<T>(x, n);
    return n * T(0.6931471805599453) + log_m;
}

// log(1 + x) for x in [0, 1]
template <typename T>
FUSEDLOSS_INLINE typename VectorOf<T>::Value log1p_positive(typename VectorOf<T>::Value x) {
    const auto u = x + T(1);
    return log_positive<T>(u) + (x - (u - T(1))) / u;
}

// log(1 - v) + v for v in [0, 1), with its digits where v is small.
template <typename T>
FUSEDLOSS_INLINE typename VectorOf<T>::Value log_excess(typename VectorOf<T>::Value v) {
    using V = typename VectorOf<T>::Value;
    using Bits = typename VectorOf<T>::Bits;
    constexpr int shift = ExpConstants<T>::shift, terms = sizeof(T) == 4 ? 4 : 11;
    // 1 - v = 2^n (1 + f) with 1 + f in [2/3, 4/3); for small v n is 0 and f is -v.
    const Bits power = ((bit_cast<Bits>(T(1) - v) - bit_cast<Bits>(splat(T(2.0 / 3)))) >> shift) << shift;
    const V n = __builtin_convertvector(power, V), scale = bit_cast<V>(bit_cast<Bits>(splat(T(1))) - power);
    const V f = (scale - T(1)) - v * scale, y = f / (f + T(2)), y2 = y * y;
    V poly = splat(T(1.0 / (2 * terms + 1)));
#pragma GCC unroll 16
    for (int k = terms - 1; k >= 1; --k) poly = poly * y2 + T(1.0 / (2 * k + 1));
    // log(1 + f) = 2 y (1 + y^2 / 3 + ...), 2 y = f - f y
    constexpr T log2 = T(0.6931471805599453) / (int64_t(1) << shift);
    return n * log2 + (f + v) + y * (y2 * poly * T(2) - f);
}

// z^x - 1, and z^x in `power`, for z in [0, 1] and x >= 0; z below the normal numbers counts as 0. Of x log z, which
// may be large, only what is left after the power of two is rounded.
template <typename T>
FUSEDLOSS_INLINE typename VectorOf<T>::Value powm1_bounded(typename VectorOf<T>::Value z, typename VectorOf<T>::Value x,
                                                           typename VectorOf<T>::Value& power) {
    using C = ExpConstants<T>;
    using V = typename VectorOf<T>::Value;
    using Words = typename VectorOf<T>::Words;
    constexpr T ln2 = T(0.6931471805599453), rounder = C::rounder;
    V n;
    const V log_m = log_mantissa<T>(z, n);
    // x = high + low, where high times n is exact
    const V high = bit_cast<V>((bit_cast<Words>(x) >> (C::shift / 2 + 1)) << (C::shift / 2 + 1));
    const V whole = high * n;
    const V shifted = whole + log_m * x * (1 / ln2) + rounder;  // low bits: the exponent field of 2^k
    const V k = shifted - rounder;
    const V two_k = bit_cast<V>(bit_cast<Words>(shifted) << C::shift);
    V exp;
    const V minus_1 = expm1_bounded<T>((whole - k) * ln2 + ((x - high) * n * ln2 + log_m * x), exp);
    const auto none = (z < std::numeric_limits<T>::min()) | (k < C::lowest / ln2);
    power = none ? V{} : exp * two_k;
    return none ? splat(T(-1)) : minus_1 * two_k + (two_k - T(1));
}

}  // namespace fusedloss::FUSEDLOSS_ISA
