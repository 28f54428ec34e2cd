// Vectors of the widest registers that the instruction set offers, through the compiler's vector extension:
// one source for every instruction set. Loads widen the four storage types to float (double stays double),
// stores round.
#pragma once

#include <cstdint>
#include <cstring>
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

namespace fusedloss::FUSEDLOSS_ISA {

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

// A product as it is rounded, of one or of a vector. Fused with the difference of two products, of which only the other
// is rounded, it would leave the rounding error of a large one for a result.
template <typename X, typename T>
FUSEDLOSS_INLINE X rounded_product(X x, T factor) {
    X product = x * factor;
#if defined(__x86_64__)
    asm("" : "+v"(product));
#elif defined(__aarch64__)
    asm("" : "+w"(product));
#else
    asm("" : "+m"(product));
#endif
    return product;
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
FUSEDLOSS_INLINE auto load(const S* source) {
    if constexpr (sizeof(S) == 2) {
        HalfVector h;
        std::memcpy(&h, source, sizeof h);
        return from_halves(h, S{});
    } else {
        typename VectorOf<S>::Value v;
        std::memcpy(&v, source, sizeof v);
        return v;
    }
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

}  // namespace fusedloss::FUSEDLOSS_ISA
