// The passes of losses against a second row:
//
//   forward    the statistics of both rows, the sums of the terms, the loss and its coefficients
//   gradient   the gradient of the first row, which may take its place
//
// or the sums alone. A block has a row, of which a thread looks at 16 bytes of logits at a time; later looks find both
// rows in the cache. Which thread looks at which columns, and the order of every sum, depends on the sizes alone.
#pragma once

#include "rows.h"

namespace fusedloss::cuda {

// Sums of a pair term: of the loss, of h, and of p - y.
struct PairPartial {
    double loss = 0, slope = 0, difference = 0;
};

template <int, typename T>
FUSEDLOSS_DEVICE void merge(PairPartial& x, const PairPartial& y, T) {
    x.loss += y.loss;
    x.slope += y.slope;
    x.difference += y.difference;
}
template <int, typename T>
FUSEDLOSS_DEVICE PairPartial merge_warp(PairPartial part, T) {
    return {sum_of_warp(part.loss), sum_of_warp(part.slope), sum_of_warp(part.difference)};
}

// What a block's warps tell each other in shared memory.
template <typename T>
struct alignas(16) PairBoard {
    static constexpr int warps = kMaxThreads / kWarp;
    Partial<T> first[warps], second[warps], plain[warps];
    PairPartial sums[warps];
};

// What the terms of a row take of it and of the second.
template <typename T>
struct PairNumbers {
    T factor, max, inverse, log_sum, second_max, second_inverse, second_log_sum;
    // Of the second row less that of the first: the largest, and log S; of targets the logits' log S. They are taken
    // off one after the other, since a large common offset would leave no digits of the second.
    T offset, lag;
    bool far;  // far_rows(offset)
    T params[kMaxParams];
};

template <typename S, typename Term>
class PairRow {
    using T = decltype(read(S{}));
    using R = std::conditional_t<Term::of_logits, S, T>;  // of the second row
    static constexpr int pack = Pack<S>::size;

   public:
    FUSEDLOSS_DEVICE explicit PairRow(const Launch& job)
        : job_(job),
          board_(*reinterpret_cast<PairBoard<T>*>(shared_memory())),
          row_(block_index()),
          target_(job.target[row_] >= 0 && job.target[row_] < job.columns() ? static_cast<int>(job.target[row_]) : -1),
          z_(static_cast<const S*>(job.logits) + row_ * job.row_stride),
          second_(static_cast<const R*>(job.second) + row_ * job.second_row_stride) {}

    FUSEDLOSS_DEVICE void run() const {
        if (job_.target[row_] == kIgnored) return ignore();
        if (job_.forward) return forward();
        const PairNumbers<T> row =
            numbers(statistic(kMax), statistic(kSumExp), second_statistic(kSecondMax), second_statistic(kSecondSum));
        if (job_.sums) {
            const PairPartial sum = sums(row);
            if (thread_index() == 0) put_sums(sum);
        } else {
            gradient(row, coefficient(kShift), coefficient(kPlain), coefficient(kTargetGradient));
        }
    }

   private:
    FUSEDLOSS_DEVICE T& statistic(int64_t k) const { return static_cast<T*>(job_.statistics)[k * job_.rows + row_]; }
    FUSEDLOSS_DEVICE T& second_statistic(int k) const {
        return statistic(kStatistics + job_.picks() + (job_.moments ? kMoments : 0) + k);
    }
    FUSEDLOSS_DEVICE T& coefficient(int64_t k) const {
        return static_cast<T*>(job_.coefficients)[k * job_.rows + row_];
    }
    FUSEDLOSS_DEVICE T common(int k) const { return common_at<T>(job_.common, k); }

    FUSEDLOSS_DEVICE PairNumbers<T> numbers(T max, T sum, T second_max, T second_sum) const {
        PairNumbers<T> x;
        x.factor = common(kLogits);
        x.max = max, x.inverse = T(1) / sum, x.log_sum = std::log(sum);
        x.second_max = second_max, x.second_inverse = T(1) / second_sum, x.second_log_sum = std::log(second_sum);
        x.offset = second_max - max, x.far = far_rows(x.offset);
        x.lag = Term::of_logits ? std::log(second_sum / sum) : x.log_sum;
        x.inverse += x.lag * T(0);  // a NaN among the teacher's logits
#pragma unroll
        for (int k = 0; k < kMaxParams; ++k) {
            x.params[k] = job_.param[k] ? static_cast<const T*>(job_.param[k])[row_ * job_.param_stride[k]] : T(0);
        }
        return x;
    }

    // --- columns ---

    // A pack of the logits' columns; those from `count` on are not there.
    template <typename X>
    static FUSEDLOSS_DEVICE void load(const X* from, int count, T* to) {
        if (count >= pack && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
#pragma unroll
            for (int i = 0; i < pack; i += Pack<X>::size) {
                const Pack<X> x = *reinterpret_cast<const Pack<X>*>(from + i);
#pragma unroll
                for (int k = 0; k < Pack<X>::size; ++k) to[i + k] = read(x.item[k]);
            }
        } else {
#pragma unroll
            for (int k = 0; k < pack; ++k) to[k] = k < count ? read(from[k]) : T(0);
        }
    }

    static FUSEDLOSS_DEVICE void store(S* to, int count, const T* from) {
        if (count >= pack && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
            Pack<S> x;
#pragma unroll
            for (int k = 0; k < pack; k += 2) write_two(&x.item[k], from[k], from[k + 1]);
            *reinterpret_cast<Pack<S>*>(to) = x;
        } else {
#pragma unroll
            for (int k = 0; k < pack; ++k) {
                if (k < count) write(to + k, from[k]);
            }
        }
    }

    // body(first column, how many there are from it on) for each of the thread's packs
    template <typename Body>
    FUSEDLOSS_DEVICE void over_packs(const Body& body) const {
#pragma unroll 1
        for (int from = thread_index() * pack; from < job_.columns(); from += job_.threads * pack) {
            body(from, job_.columns() - from);
        }
    }

    // The parts of all threads, merged, for each of them.
    template <typename Part>
    FUSEDLOSS_DEVICE Part gather(Part part, Part* records, T factor) const {
        part = merge_warp<0>(part, factor);
        if (thread_index() % kWarp == 0) records[thread_index() / kWarp] = part;
        block_sync();
        Part all = records[0];
#pragma unroll 1
        for (int warp = 1; warp < job_.threads / kWarp; ++warp) merge<0>(all, records[warp], factor);
        return all;
    }

    // The statistics of a row of logits times a factor, of which the target's is in hand.
    template <typename X>
    FUSEDLOSS_DEVICE RowStatistics<T> softmax_of(const X* z, T factor, T target_logit, Partial<T>* records) const {
        Partial<T> part;
        const T exponent = exponent_of(factor);
        over_packs([&](int from, int count) {
            T x[pack];
            load(z + from, count, x);
            T max = -kInfinity<T>;
#pragma unroll
            for (int k = 0; k < pack; ++k) {
                if (k >= count || from + k == target_) x[k] = -kInfinity<T>;
                max = larger(max, x[k]);
            }
            const T before = part.max, base = part.max = larger(before, max);
            T rest = 0;
#pragma unroll
            for (int k = 0; k < pack; ++k) rest += fast_exp(x[k] - base, exponent);
            part.rest = part.rest * double(fast_exp(before - base, exponent)) + double(rest);
        });
        part = gather(part, records, factor);
        refer<0>(part, larger(part.max, target_logit), factor);
        RowStatistics<T> s;
        settle(s, part.max, T(part.rest), target_logit, factor);
        return s;
    }

    // --- terms ---

    FUSEDLOSS_DEVICE PairTerm<T> term(const PairNumbers<T>& row, T z, T second, int column) const {
        Both<T> pair{};
        const T lag = rounded_product(z, row.factor) - row.max;
        pair.p = fast_exp(lag) * row.inverse;
        if constexpr (Term::of_logits) {
            const T second_lag = rounded_product(second, row.factor) - row.second_max;
            pair.y = fast_exp(second_lag) * row.second_inverse;
            // A class that neither row has: -inf less -inf. The difference of close logits is exact, of products not.
            const T d = row.far ? second_lag - lag : (second - z) * row.factor - row.offset;
            pair.d = pair.p + pair.y == T(0) ? T(0) : d - row.lag;
            if constexpr (Term::mixes) {
                pair.log_p = lag - row.log_sum;
                pair.log_y = second_lag - row.second_log_sum;
                pair.log_mixture = std::log(Term::mixture(pair.p, pair.y, row.params));
            }
        } else {
            const T* const weight = static_cast<const T*>(job_.class_weight);
            pair.y = (second * row.params[0] + row.params[1]) * (weight ? weight[column] : T(1));
            pair.d = row.lag - lag;
        }
        return Term::template term<T>(pair, row.params);
    }

    // body(first column, columns, logits, those or targets of the second row)
    template <typename Body>
    FUSEDLOSS_DEVICE void over_pairs(const Body& body) const {
        over_packs([&](int from, int count) {
            T z[pack], second[pack];
            load(z_ + from, count, z);
            load(second_ + from, count, second);
            body(from, count, z, second);
        });
    }

    FUSEDLOSS_DEVICE PairPartial sums(const PairNumbers<T>& row) const {
        PairPartial part;
        over_pairs([&](int from, int count, const T* z, const T* second) {
            T loss = 0, slope = 0, difference = 0;
#pragma unroll
            for (int k = 0; k < pack; ++k) {
                if (k >= count) continue;
                const PairTerm<T> x = term(row, z[k], second[k], from + k);
                loss += x.loss;
                slope += x.slope;
                difference += x.difference;
            }
            part.loss += loss;
            part.slope += slope;
            part.difference += difference;
        });
        return gather(part, board_.sums, T(1));
    }

    FUSEDLOSS_DEVICE void put_sums(const PairPartial& sum) const {
        job_.sums[row_] = sum.loss;
        job_.sums[job_.rows + row_] = sum.slope;
        job_.sums[2 * job_.rows + row_] = sum.difference;
    }

    // --- forward ---

    FUSEDLOSS_DEVICE void forward() const {
        const T factor = common(kLogits);
        // Read before the gradient takes its place.
        const T target_logit = target_ >= 0 ? read(z_[target_]) : kNaN<T>;
        const T second_target = target_ >= 0 ? read(second_[target_]) : kNaN<T>;
        const RowStatistics<T> s = softmax_of(z_, factor, target_logit, board_.first);
        T second_max = 0, second_sum = 1;
        if constexpr (Term::of_logits) {
            // In the same order, so that equal rows have the same bits.
            const RowStatistics<T> second = softmax_of(second_, factor, second_target, board_.second);
            second_max = second.max, second_sum = second.sum_exp;
        }
        const PairNumbers<T> row = numbers(s.max, s.sum_exp, second_max, second_sum);
        const T main = common(kMain), hard = Term::of_logits ? row.params[Term::param_count - 1] : T(0);
        const bool apart = hard != T(0) && factor != T(1);
        T plain_ce = s.ce, plain_q = s.q, plain_sum = s.sum_exp;
        if (Term::of_logits && apart) {
            const RowStatistics<T> plain = softmax_of(z_, T(1), target_logit, board_.plain);
            plain_ce = plain.ce, plain_q = plain.q;
            plain_sum = plain.sum_exp * std::exp(plain.max - s.max / factor);
        }
        const PairPartial sum = sums(row);

        const double curvature = Term::curvature(row.params);
        T loss = main * T(whole_loss(sum.loss, sum.slope, sum.difference, curvature));
        if (hard != T(0)) loss += hard * plain_ce;
        const T lse = s.max + row.log_sum, z_loss = common(kZLoss);
        if (z_loss != T(0)) loss += z_loss * lse * lse;
        const T slope = main * T(sum.slope) - (z_loss != T(0) ? T(2) * z_loss * lse : T(0));
        // Without a temperature both are factors of the same exponentials.
        const T shift = slope - (apart ? T(0) : hard), of_plain = apart ? hard / (factor * plain_sum) : T(0);
        const int column = target_ < 0 ? 0 : target_;  // any class's weight will do: the row is NaN
        const T at_target = main * term(row, target_logit, second_target, column).slope - s.p * slope -
                            (hard != T(0) ? hard / factor * plain_q : T(0));
        if (thread_index() == 0) {
            const T values[kStatistics] = {s.max, s.sum_exp, s.q, s.ce, rounded_product(target_logit, factor), T(0)};
            const T seconds[kSeconds] = {second_max, second_sum, plain_sum};
            put(values, seconds);
            put_loss(loss, shift, of_plain, at_target);
        }
        if (job_.grad) gradient(row, shift, of_plain, at_target);
    }

    FUSEDLOSS_DEVICE void put(const T* values, const T* seconds) const {
#pragma unroll
        for (int k = 0; k < kStatistics; ++k) statistic(k) = values[k];
#pragma unroll
        for (int k = 0; k < kSeconds; ++k) second_statistic(k) = seconds[k];
    }

    FUSEDLOSS_DEVICE void put_loss(T loss, T shift, T plain, T at_target) const {
        static_cast<T*>(job_.loss)[row_] = loss;
        coefficient(kShift) = shift;
        coefficient(kPlain) = plain;
        coefficient(kTargetGradient) = at_target;
        for (int k = 0; k < job_.picks(); ++k) coefficient(kCoefficients + k) = T(0);
    }

    // --- gradient ---

    FUSEDLOSS_DEVICE void gradient(const PairNumbers<T>& row, T shift, T plain, T at_target) const {
        const T upstream = job_.upstream ? static_cast<const T*>(job_.upstream)[row_ * job_.upstream_stride] : T(1);
        const T main = common(kMain) * upstream, exponent = exponent_of(T(1) / row.factor);
        shift *= upstream, plain *= upstream, at_target *= upstream;
        S* const grad = static_cast<S*>(job_.grad) + row_ * job_.grad_row_stride;
        over_pairs([&](int from, int count, const T* z, const T* second) {
            T value[pack];
#pragma unroll
            for (int k = 0; k < pack; ++k) {
                const T lag = rounded_product(z[k], row.factor) - row.max, p = fast_exp(lag) * row.inverse;
                value[k] = main * term(row, z[k], second[k], k < count ? from + k : 0).slope - p * shift;
                if (Term::of_logits) value[k] += fast_exp(lag, exponent) * plain;
                if (from + k == target_) value[k] = at_target;
            }
            store(grad + from, count, value);
        });
    }

    // An ignored row is not looked at.
    FUSEDLOSS_DEVICE void ignore() const {
        if (thread_index() == 0 && job_.forward) {
            const T seconds[kSeconds] = {T(1), T(1), T(1)};
            put(Neutral<T>().value, seconds);
            put_loss(T(0), T(0), T(0), T(0));
        }
        if (thread_index() == 0 && job_.sums) put_sums(PairPartial());
        if (!job_.grad) return;
        const T zero[pack] = {};
        S* const grad = static_cast<S*>(job_.grad) + row_ * job_.grad_row_stride;
        over_packs([&](int from, int count) { store(grad + from, count, zero); });
    }

    const Launch& job_;
    PairBoard<T>& board_;
    const int64_t row_;
    const int target_;  // -1 where it is out of range
    const S* const z_;
    const R* const second_;
};

template <typename S, typename Term>
FUSEDLOSS_KERNEL void FUSEDLOSS_BLOCKS(kMaxThreads, sizeof(S) == 8 ? 2 : 3) pair_pass(const Launch job) {
    PairRow<S, Term>(job).run();
}

template <typename S>
void run_pairs(const Launch& job) {
    if (job.forward && (job.picks() > 0 || job.moments)) run<S>(of_statistics(job));
    with_functor(job.epilogue, PairTerms{}, [&](auto term) {
        constexpr int bytes = sizeof(PairBoard<decltype(read(S{}))>);
        launch(pair_pass<S, decltype(term)>, job.rows, 1, 1, job.threads, bytes, job.stream, job);
    });
}

template <typename S>
void run_any(const Launch& job) {
    job.kind == kPairTerm ? run_pairs<S>(job) : run<S>(job);
}

}  // namespace fusedloss::cuda
