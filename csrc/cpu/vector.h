// Vectors of the widest registers that the instruction set offers, through the compiler's vector extension:
// one source for every instruction set. Loads widen the four storage types to float (double stays double),
// stores round.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

// One copy of a piece of arithmetic: where it is compiled into several loops, multiplications and additions may be
// fused differently in each, and a result's last bit would depend on which loop ran.
#if defined(__clang__)
#define FUSEDLOSS_ONE_COPY __attribute__((noinline))
#else
#define FUSEDLOSS_ONE_COPY __attribute__((noinline, noclone))
#endif

// Vectors that cross a call go through memory.
#define FUSEDLOSS_INLINE inline __attribute__((always_inline))

namespace fusedloss {
namespace FUSEDLOSS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
    static constexpr int width = kVectorBytes / 4;
    typedef float Value __attribute__((vector_size(kVectorBytes)));
    typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
    typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
    static constexpr int width = kVectorBytes / 8;
    typedef double Value __attribute__((vector_size(kVectorBytes)));
    typedef int64_t Bits __attribute__((vector_size(kVectorBytes)));
    typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));
};
using FloatVector = VectorOf<float>::Value;
using FloatBits = VectorOf<float>::Bits;
using WordVector = VectorOf<float>::Words;
typedef uint16_t HalfVector __attribute__((vector_size(kVectorBytes / 2)));

// The type in which a storage type is computed.
template <typename S>
struct ComputeOf {
    using type = float;
};
template <>
struct ComputeOf<double> {
    using type = double;
};

template <typename To, typename From>
FUSEDLOSS_INLINE To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

template <typename T>
FUSEDLOSS_INLINE typename VectorOf<T>::Value splat(T x) {
    return x - typename VectorOf<T>::Value{};
}

// 0, 1, 2 ...
template <typename T>
FUSEDLOSS_INLINE typename VectorOf<T>::Bits lanes() {
    typename VectorOf<T>::Bits index;
    for (int i = 0; i < VectorOf<T>::width; ++i) index[i] = i;
    return index;
}

// --- widening and rounding, in vectors and one by one ---

// 16-bit elements are widened from and rounded to the low halves of words.
FUSEDLOSS_INLINE FloatVector widen(WordVector w, bfloat16) { return bit_cast<FloatVector>(w << 16); }

// Subnormal halves come out right because the multiplication by 2^112 normalises them; 2^16 and above are inf
// or NaN.
FUSEDLOSS_INLINE FloatVector widen(WordVector w, float16) {
    const FloatVector magnitude = bit_cast<FloatVector>((w & 0x7fffu) << 13) * 0x1p112f;
    const WordVector special = bit_cast<WordVector>(magnitude >= 65536.0f) & 0x7f800000u;
    return bit_cast<FloatVector>(bit_cast<WordVector>(magnitude) | special | ((w & 0x8000u) << 16));
}

// Of one or of a vector of floats: bfloat16 in the high halves of words.
template <typename Words, typename Floats>
FUSEDLOSS_INLINE Words round_high(Floats x) {
    const Words w = bit_cast<Words>(x);
    return x == x ? w + 0x7fffu + ((w >> 16) & 1u) : w | 0x400000u;
}
FUSEDLOSS_INLINE WordVector narrow(FloatVector x, bfloat16) { return round_high<WordVector>(x) >> 16; }

FUSEDLOSS_INLINE WordVector narrow(FloatVector x, float16) {
    const WordVector w = bit_cast<WordVector>(x);
    const WordVector sign = (w >> 16) & 0x8000u;
    const WordVector magnitude = w & 0x7fffffffu;
    // normal halves: round the mantissa to 10 bits, to even, and rebias; subnormal ones: let the float adder
    // round
    const WordVector normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    const WordVector subnormal =
        bit_cast<WordVector>(bit_cast<FloatVector>(magnitude) + 0.5f) - bit_cast<WordVector>(splat(0.5f));
    WordVector half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? WordVector{} + 0x7c00u : half;  // 65520 and above round to infinity
    half = magnitude > 0x7f800000u ? WordVector{} + 0x7e00u : half;
    return half | sign;
}

// Vectors of 16-bit elements in order.
template <typename S>
FUSEDLOSS_INLINE FloatVector from_halves(HalfVector h, S) {
    return widen(__builtin_convertvector(h, WordVector), S{});
}
template <typename S, typename X>
FUSEDLOSS_INLINE HalfVector to_halves(X v, S) {
    return __builtin_convertvector(narrow(v, S{}), HalfVector);
}
#if defined(__AVX512F__)
FUSEDLOSS_INLINE FloatVector from_halves(HalfVector h, float16) { return _mm512_cvtph_ps(bit_cast<__m256i>(h)); }
FUSEDLOSS_INLINE HalfVector to_halves(FloatVector v, float16) {
    return bit_cast<HalfVector>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
FUSEDLOSS_INLINE FloatVector from_halves(HalfVector h, float16) { return _mm256_cvtph_ps(bit_cast<__m128i>(h)); }
FUSEDLOSS_INLINE HalfVector to_halves(FloatVector v, float16) {
    return bit_cast<HalfVector>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#endif

template <typename S>
FUSEDLOSS_INLINE FloatVector load(const S* source) {
    HalfVector h;
    std::memcpy(&h, source, sizeof h);
    return from_halves(h, S{});
}
FUSEDLOSS_INLINE FloatVector load(const float* source) {
    FloatVector v;
    std::memcpy(&v, source, sizeof v);
    return v;
}
FUSEDLOSS_INLINE VectorOf<double>::Value load(const double* source) {
    VectorOf<double>::Value v;
    std::memcpy(&v, source, sizeof v);
    return v;
}

// Bits of a 16-bit type in the low halves of words; the high ones may hold anything.
struct Rounded {
    WordVector words;
};
FUSEDLOSS_INLINE WordVector narrow(Rounded x, bfloat16) { return x.words & 0xffffu; }

// The same in the high halves, of a vector without NaN whose ties are rounded away from 0: one addition.
struct RoundedHigh {
    WordVector words;
};
FUSEDLOSS_INLINE RoundedHigh round_near(FloatVector x) { return {bit_cast<WordVector>(x) + 0x8000u}; }
FUSEDLOSS_INLINE WordVector narrow(RoundedHigh x, bfloat16) { return x.words >> 16; }

template <typename S, typename X>
FUSEDLOSS_INLINE void store(S* to, X v) {
    const HalfVector h = to_halves(v, S{});
    std::memcpy(static_cast<void*>(to), &h, sizeof h);
}
FUSEDLOSS_INLINE void store(float* to, FloatVector v) { std::memcpy(to, &v, sizeof v); }
FUSEDLOSS_INLINE void store(double* to, VectorOf<double>::Value v) { std::memcpy(to, &v, sizeof v); }

// A whole register of 16-bit elements as its even and its odd ones: half the instructions of two loads in order, but
// where the processor itself converts.
#if defined(__F16C__)
template <typename S>
constexpr bool kPairs = std::is_same_v<S, bfloat16>;
#else
template <typename S>
constexpr bool kPairs = sizeof(S) == 2;
#endif
struct Pair {
    FloatVector even, odd;
};
template <typename S>
FUSEDLOSS_INLINE Pair load_pair(const S* source) {
    WordVector w;
    std::memcpy(&w, source, sizeof w);
    return {widen(w & 0xffffu, S{}), widen(w >> 16, S{})};
}
template <typename S, typename X>
FUSEDLOSS_INLINE WordVector pack(X even, X odd, S) {
    return narrow(even, S{}) | (narrow(odd, S{}) << 16);
}
FUSEDLOSS_INLINE WordVector pack(FloatVector even, FloatVector odd, bfloat16) {
    return narrow(even, bfloat16{}) | (round_high<WordVector>(odd) & 0xffff0000u);
}
FUSEDLOSS_INLINE WordVector pack(RoundedHigh even, RoundedHigh odd, bfloat16) {
    return narrow(even, bfloat16{}) | (odd.words & 0xffff0000u);
}
template <typename S, typename X>
FUSEDLOSS_INLINE void store_pair(S* to, X even, X odd) {
    const WordVector w = pack(even, odd, S{});
    std::memcpy(static_cast<void*>(to), &w, sizeof w);
}

// Asks for the memory two pages ahead: what the processor itself asks for ends with the page. Any address will do.
FUSEDLOSS_INLINE void prefetch_after(const void* source) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(source) + 8192));
}

// The first `count` elements; the others are `fill`. Memory is readable up to `limit`, where a whole load is faster
// than one by one.
template <typename S>
FUSEDLOSS_INLINE auto load_part(const S* source, int count, typename ComputeOf<S>::type fill, const S* limit) {
    using T = typename ComputeOf<S>::type;
    constexpr int width = VectorOf<T>::width;
    typename VectorOf<T>::Value v;
    if (limit - source >= width) {
        v = load(source);
    } else {
        S part[width] = {};
        for (int i = 0; i < count; ++i) part[i] = source[i];
        v = load(part);
    }
    return lanes<T>() < count ? v : splat(fill);
}

template <typename S, typename V>
FUSEDLOSS_INLINE void store_part(S* to, int count, V v) {
    S part[VectorOf<typename ComputeOf<S>::type>::width];
    store(part, v);
    for (int i = 0; i < count; ++i) to[i] = part[i];
}

template <typename S>
FUSEDLOSS_INLINE typename ComputeOf<S>::type read(const S* source) {
    return load_part(source, 1, typename ComputeOf<S>::type(0), source + 1)[0];
}
FUSEDLOSS_INLINE float read(const bfloat16* source) { return bit_cast<float>(uint32_t(source->bits) << 16); }
FUSEDLOSS_INLINE float read(const float* source) { return *source; }
FUSEDLOSS_INLINE double read(const double* source) { return *source; }

template <typename S>
FUSEDLOSS_INLINE void write(S* to, typename ComputeOf<S>::type value) {
    store_part(to, 1, splat(value));
}
FUSEDLOSS_INLINE void write(bfloat16* to, float value) {
    to->bits = static_cast<uint16_t>(round_high<uint32_t>(value) >> 16);
}
FUSEDLOSS_INLINE void write(float* to, float value) { *to = value; }
FUSEDLOSS_INLINE void write(double* to, double value) { *to = value; }

// Adds each element to a double of its own.
FUSEDLOSS_INLINE void add_to(double* sums, VectorOf<double>::Value v) { store(sums, load(sums) + v); }
FUSEDLOSS_INLINE void add_to(double* sums, FloatVector v) {
    typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
    Half half[2];
    std::memcpy(half, &v, sizeof v);
    for (int k = 0; k < 2; ++k) {
        add_to(sums + k * VectorOf<double>::width, __builtin_convertvector(half[k], VectorOf<double>::Value));
    }
}

// --- reductions; x > y ? x : y passes over NaN in x, which the sums of exponentials then report ---

template <typename V>
FUSEDLOSS_INLINE V greater(V x, V y) {
#if defined(__AVX512F__)
    // Keeps GCC from making x a masked instruction after a comparison, three times as slow as a maximum in a loop.
    asm("" : "+v"(x));
#endif
    return x > y ? x : y;
}

// |x| up to `most`, which NaN is too.
template <typename T>
FUSEDLOSS_INLINE typename VectorOf<T>::Value magnitude(typename VectorOf<T>::Value x, T most) {
    using Bits = typename VectorOf<T>::Bits;
    using Words = typename VectorOf<T>::Words;
    const Bits bits = bit_cast<Bits>((bit_cast<Words>(x) << 1) >> 1), limit = bit_cast<Bits>(splat(most));
    return bit_cast<typename VectorOf<T>::Value>(bits < limit ? bits : limit);
}

// Folds the lanes of a vector, half against half.
template <typename T, int bytes, typename V, typename Fold>
FUSEDLOSS_INLINE T fold_lanes(const V& v, const Fold& fold) {
    if constexpr (bytes <= 16) {
        T lane[bytes / sizeof(T)];
        std::memcpy(lane, &v, bytes);
        if constexpr (sizeof(T) == 8) return fold(lane[0], lane[1]);
        return fold(fold(lane[0], lane[2]), fold(lane[1], lane[3]));
    } else {
        typedef T Half __attribute__((vector_size(bytes / 2)));
        Half half[2];
        std::memcpy(half, &v, bytes);
        return fold_lanes<T, bytes / 2>(fold(half[0], half[1]), fold);
    }
}

template <typename T>
FUSEDLOSS_INLINE T largest(typename VectorOf<T>::Value v) {
    return fold_lanes<T, kVectorBytes>(v, [](auto x, auto y) { return x > y ? x : y; });
}

// Whether an element is above the bound.
template <typename T>
FUSEDLOSS_INLINE bool exceeds(typename VectorOf<T>::Value x, T bound) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask(x, splat(bound), _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) return _mm256_movemask_ps(_mm256_cmp_ps(x, splat(bound), _CMP_GT_OQ)) != 0;
#endif
    return largest<T>(x) > bound;
}

template <typename T>
FUSEDLOSS_INLINE T total(typename VectorOf<T>::Value v) {
    return fold_lanes<T, kVectorBytes>(v, [](auto x, auto y) { return x + y; });
}

template <typename T>
FUSEDLOSS_INLINE auto least(typename VectorOf<T>::Bits v) {
    using Bit = std::remove_reference_t<decltype(v[0])>;
    return fold_lanes<Bit, kVectorBytes>(v, [](auto x, auto y) { return x < y ? x : y; });
}

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

}  // namespace FUSEDLOSS_ISA
}  // namespace fusedloss
