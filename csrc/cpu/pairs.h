// A pair term over the columns of a block of two rows: what it takes of a class (both_of), its sums and its gradient.
// Each term is compiled here alone.
#pragma once

#include "rows.h"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

// Stands for every pair term.
struct AnyPair {};

// What a pair term takes of a row and of the second, or of the rows in the lanes of V.
template <typename T, typename V = T>
struct PairRow {
    T params[kMaxParams];
    V max, inverse, log_sum;  // of the logits: the largest, 1 / S, log S
    V second_max, second_inverse, second_log_sum;
    // Of the second row less that of the first: the largest, and log S; of targets the logits' log S. They are taken
    // off one after the other, since a large common offset would leave no digits of the second.
    V offset, lag;
    decltype(V{} > V{}) far;  // whether far_rows(offset)
};

// log y - log p of a class in two rows of logits.
template <typename T, typename V, typename R>
FUSEDLOSS_INLINE V log_ratio(const PairRow<T, R>& row, V x, V second) {
    return (row.far ? (second - row.second_max) - (x - row.max) : (second - x) - row.offset) - row.lag;
}

// The columns after a block, of which a loop over the block asks for a vector's at a time: memory and arithmetic
// overlap.
struct Ahead {
    const char* memory[2];
    int64_t step[2];  // bytes of a vector

    template <typename A, typename B>
    static Ahead of(const A* x, const B* second, int64_t width) {
        return {{reinterpret_cast<const char*>(x), reinterpret_cast<const char*>(second)},
                {width * int64_t(sizeof(A)), width * int64_t(sizeof(B))}};
    }

    FUSEDLOSS_INLINE void prefetch(int64_t vector) const {
        for (int i = 0; i < 2; ++i) __builtin_prefetch(memory[i] + vector * step[i]);
    }
};

template <typename Term, typename T, typename V, typename R>
FUSEDLOSS_INLINE Both<V> both_of(const PairRow<T, R>& row, V x, V second) {
    Both<V> both{};
    if constexpr (std::is_same_v<Term, EvenMixtureKl>) {
        both.d = log_ratio(row, x, second);
        const auto above = both.d > V{};
        both.larger = exp_bounded<T>(above ? second - row.second_max : x - row.max) *
                      (above ? V{} + row.second_inverse : V{} + row.inverse);
        both.rest = fall_of<T>(magnitude<T>(both.d, kFar<T>), both.fall, both.excess);
        both.p = above ? both.larger * both.rest : both.larger;
        both.log_excess = log_excess<T>(both.fall * Term::share(both.d, row.params));
        return both;
    }
    both.p = exp_bounded<T>(x - row.max) * row.inverse;
    if constexpr (Term::of_logits) {
        both.y = exp_bounded<T>(second - row.second_max) * row.second_inverse;
        both.d = log_ratio(row, x, second);
    } else {
        both.y = second;
        both.d = row.lag - (x - row.max);
    }
    if constexpr (Term::mixes) {
        both.log_p = (x - row.max) - row.log_sum;
        both.log_y = (second - row.second_max) - row.second_log_sum;
        both.log_mixture = log_positive<T>(Term::mixture(both.p, both.y, row.params));
    }
    return both;
}

// The terms of a block's columns, of both rows in the type that is computed with, or as they are stored. p and h
// of each vector go to `kept`, unless it is null.
template <typename Term, typename T, typename S>
FUSEDLOSS_ONE_COPY TermSums sum_pairs(const PairRow<T>& row, const S* x, const S* second, int64_t count,
                                      const Ahead& ahead, T* kept) {
    using V = typename VectorOf<T>::Value;
    V loss{}, slope{}, difference{};
    const auto add = [&](V z, V other) {
        const auto both = both_of<Term, T, V>(row, z, other);
        const auto term = Term::template term<T>(both, row.params);
        if (kept) {
            store(kept, both.p);
            store(kept + VectorOf<T>::width, term.slope);
            kept += 2 * VectorOf<T>::width;
        }
        loss += term.loss;
        slope += term.slope;
        difference += term.difference;
    };
    constexpr int width = VectorOf<T>::width;
    for (int64_t at = 0; at < count; at += width) {
        ahead.prefetch(at / width);
        if constexpr (std::is_same_v<S, T>) {
            add(load(x + at), load(second + at));
        } else {
            const Pair z = load_pair(x + at), other = load_pair(second + at);
            add(z.even, other.even);
            add(z.odd, other.odd);
            at += width;
        }
    }
    return {double(total<T>(loss)), double(total<T>(slope)), double(total<T>(difference))};
}

// What a gradient takes its terms times.
template <typename T>
struct PairFactors {
    T logits, main, shift, plain;
};

// main h - p shift + plain exp((z - max) / factor of the logits), for a gradient of which `Close` says whether it has
// the digits of close rows; may take the place of the logits.
template <typename Term, bool Close, typename T, typename S>
FUSEDLOSS_ONE_COPY void differentiate_pairs(const PairRow<T>& row, const S* x, const S* second, S* to, int64_t count,
                                            const PairFactors<T>& factors, const Ahead& ahead) {
    using V = typename VectorOf<T>::Value;
    const T main = factors.main, shift = factors.shift, plain = factors.plain, per_factor = T(1) / factors.logits;
    const auto gradient = [&](V z, V other) {
        const Both<V> both = both_of<Term, T, V>(row, z, other);
        V g = Term::template term<T, Close>(both, row.params).slope * main - both.p * shift;
        if (plain != T(0)) g += exp_bounded<T>((z - row.max) * per_factor) * plain;
        return g;
    };
    constexpr int width = VectorOf<T>::width;
    for (int64_t at = 0; at < count; at += width) {
        ahead.prefetch(at / width);
        if constexpr (std::is_same_v<S, T>) {
            store(to + at, gradient(load(x + at), load(second + at)));
        } else {
            const Pair z = load_pair(x + at), other = load_pair(second + at);
            const V even = gradient(z.even, other.even);
            store_pair(to + at, even, gradient(z.odd, other.odd));
            at += width;
        }
    }
}

}  // namespace
}  // namespace fusedloss::FUSEDLOSS_ISA
