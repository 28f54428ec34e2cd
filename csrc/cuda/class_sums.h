// The sums over the rows of what each class adds to the error and the agreement of a summed class term.
#pragma once

#include "rows.h"

namespace fusedloss::cuda {

// A row's statistics, as the statistics pass left them with the top class for a pick.
template <typename S>
struct SummedRow {
    using T = decltype(read(S{}));
    const S* z;
    T factor, max, inverse;
    int target, top;  // -1 where it is out of range

    FUSEDLOSS_DEVICE SummedRow(const Launch& job, int64_t row)
        : z(static_cast<const S*>(job.logits) + row * job.row_stride),
          factor(common_at<T>(job.common, kLogits)),
          max(statistic(job, kMax, row)),
          inverse(T(1) / statistic(job, kSumExp, row)),
          target(column(job, job.target[row])),
          top(column(job, job.index[row])) {}

    static FUSEDLOSS_DEVICE T statistic(const Launch& job, int k, int64_t row) {
        return static_cast<const T*>(job.statistics)[k * job.rows + row];
    }
    static FUSEDLOSS_DEVICE int column(const Launch& job, int64_t index) {
        return index >= 0 && index < job.columns() ? static_cast<int>(index) : -1;
    }
};

// 1 - p of each row's top class: a warp a row. Only a p > 0.5 of a class that is not the target needs a look at the
// others.
template <typename S>
FUSEDLOSS_KERNEL void top_rest_pass(const Launch job) {
    using T = decltype(read(S{}));
    const int64_t row = block_index();
    if (job.target[row] == kIgnored) return;
    const SummedRow<S> x(job, row);
    double rest = 0;
    const bool wrong = x.top != x.target && x.inverse > T(0.5);
    for (int i = thread_index(); wrong && i < job.columns(); i += kWarp) {
        if (i != x.top) rest += fast_exp(rounded_product(read(x.z[i]), x.factor) - x.max);
    }
    rest = sum_of_warp(rest);
    if (thread_index() > 0) return;
    static_cast<T*>(job.top_rest)[row] = wrong               ? T(rest) * x.inverse
                                         : x.top == x.target ? SummedRow<S>::statistic(job, kQ, row)
                                                             : T(1) - x.inverse;
}

// What the threads of a block need of a row, which one of them has read for all.
template <typename T>
struct RowNumbers {
    T max, inverse, exponent, weight, top_q, params[kMaxParams];
    int target, top;
    int phase;  // of the row in memory; negative: the row is ignored
};

// A block adds up its columns of the rows of a group. A thread has a pack of them, of which it copies the next rows to
// shared memory while it looks at one.
template <typename S, typename Term>
class ColumnSums {
    using T = decltype(read(S{}));
    static constexpr int pack = Pack<S>::size;

   public:
    static constexpr int columns = kSumThreads * pack;  // of a block
    // The packs of a thread in each row on its way: two, where the row does not begin at a multiple of 16 bytes.
    static constexpr int bytes = kSumThreads * (static_cast<int>(sizeof(RowNumbers<T>)) + kSumStages * 32);

    FUSEDLOSS_DEVICE explicit ColumnSums(const Launch& job)
        : job_(job),
          numbers_(reinterpret_cast<RowNumbers<T>*>(shared_memory() + kSumThreads * kSumStages * 32)),
          factor_(common_at<T>(job.common, kLogits)),
          begin_(static_cast<int>(block_index()) * columns + thread_index() * pack) {}

    FUSEDLOSS_DEVICE void run() {
        const int64_t group = block_row(), last = job_.rows * (group + 1) / job_.groups;
        for (int64_t row = job_.rows * group / job_.groups; row < last; row += kSumThreads) {
            block_sync();  // nobody looks at those before any more
            if (row + thread_index() < last) numbers_[thread_index()] = numbers(row + thread_index());
            block_sync();
            const int count = last - row < kSumThreads ? static_cast<int>(last - row) : kSumThreads;
            int slot = 0, next = 0;
#pragma unroll 1
            for (int i = 1 - kSumStages; i < count; ++i) {
                const int ahead = i + kSumStages - 1;
                if (ahead < count && numbers_[ahead].phase >= 0) load(row + ahead, next);
                commit_copies();
                next = after(next);
                if (i < 0) continue;
                wait_copies<kSumStages - 1>();
                if (numbers_[i].phase >= 0) add(numbers_[i], slot);
                slot = after(slot);
            }
        }
        double* const sums = job_.sums + group * 2 * job_.columns();
#pragma unroll
        for (int k = 0; k < pack; ++k) {
            if (begin_ + k >= job_.columns()) continue;
            sums[begin_ + k] = error_[k];
            sums[job_.columns() + begin_ + k] = agreement_[k];
        }
    }

   private:
    static FUSEDLOSS_DEVICE int after(int slot) { return slot + 1 < kSumStages ? slot + 1 : 0; }
    static FUSEDLOSS_DEVICE S* in(int slot) {
        return reinterpret_cast<S*>(shared_memory() + (slot * kSumThreads + thread_index()) * 32);
    }

    FUSEDLOSS_DEVICE RowNumbers<T> numbers(int64_t row) const {
        RowNumbers<T> x;
        x.phase = -1;
        if (job_.target[row] == kIgnored) return x;
        const SummedRow<S> of(job_, row);
        x.max = of.max;
        x.inverse = of.inverse;
        x.target = of.target;
        x.top = of.top;
        x.phase = static_cast<int>(reinterpret_cast<uintptr_t>(of.z) % 16 / sizeof(S));
#pragma unroll
        for (int k = 0; k < kMaxParams; ++k) {
            x.params[k] = job_.param[k] ? static_cast<const T*>(job_.param[k])[row * job_.param_stride[k]] : T(0);
        }
        x.exponent = Term::exponent(x.params);
        x.top_q = static_cast<const T*>(job_.top_q)[row];
        x.weight = job_.upstream ? static_cast<const T*>(job_.upstream)[row * job_.upstream_stride] : T(1);
        return x;
    }

    FUSEDLOSS_DEVICE void load(int64_t row, int slot) const {
        const S* const z = static_cast<const S*>(job_.logits) + row * job_.row_stride;
        const int phase = static_cast<int>(reinterpret_cast<uintptr_t>(z) % 16 / sizeof(S)), first = begin_ - phase;
        const int packs = phase == 0 ? pack : 2 * pack;
        if (first >= 0 && first + packs <= job_.columns()) {
            copy_16_bytes(in(slot), z + first);
            if (phase != 0) copy_16_bytes(in(slot) + pack, z + first + pack);
            return;
        }
#pragma unroll 1
        for (int k = 0; k < pack; ++k) {
            S* const to = in(slot) + phase + k;
            if (begin_ + k < job_.columns()) {
                *to = z[begin_ + k];
            } else {
                write(to, -kInfinity<T>);
            }
        }
    }

    FUSEDLOSS_DEVICE void add(const RowNumbers<T>& x, int slot) {
        const S* const z = in(slot) + x.phase;
        Pack<S> logits(z, x.phase);
        const int target = x.target - begin_, top = x.top - begin_;
        if (static_cast<unsigned>(target) < pack || static_cast<unsigned>(top) < pack) {
#pragma unroll
            for (int k = 0; k < pack; ++k) {
                if (k == target || k == top) write(&logits.item[k], -kInfinity<T>);  // which adds nothing
            }
            if (target != top) single_out(x, z, target, top);
            single_out(x, z, top, top);
        }
#pragma unroll
        for (int k = 0; k < pack; ++k) {
            const T p = fast_exp(rounded_product(read(logits.item[k]), factor_) - x.max) * x.inverse;
            T slope;
            error_[k] += double(x.weight * negative_term<Term>(p, x.exponent, x.params, slope));
        }
    }

    // Adds the target or the top class, if it is among the columns.
    FUSEDLOSS_DEVICE void single_out(const RowNumbers<T>& x, const S* z, int column, int top) {
        if (static_cast<unsigned>(column) >= pack) return;
        const bool is_top = column == top;
        const T p = is_top ? x.inverse : fast_exp(rounded_product(read(z[column]), factor_) - x.max) * x.inverse;
        const T q = is_top ? x.top_q : T(1) - p;
        T error, agreement = 0, slope;
        if (begin_ + column == x.target) {
            const Overlap<T> overlap = Term::Math::positive(p, q, ScalarPowers::pair(q, x.exponent), x.params);
            error = overlap.error;
            agreement = overlap.agreement;
        } else {
            error = Term::negative(p, q, Power<T>{ScalarPowers::value(q, x.exponent), T(0)}, x.params, slope);
        }
#pragma unroll
        for (int k = 0; k < pack; ++k) {
            error_[k] += k == column ? double(x.weight * error) : 0;
            agreement_[k] += k == column ? double(x.weight * agreement) : 0;
        }
    }

    const Launch& job_;
    RowNumbers<T>* const numbers_;
    const T factor_;  // of the logits
    const int begin_;
    double error_[pack] = {}, agreement_[pack] = {};
};

template <typename S, typename Term>
FUSEDLOSS_KERNEL void class_sums_pass(const Launch job) {
    ColumnSums<S, Term>(job).run();
}

template <typename S>
void sum(Launch job) {
    if (!job.top_q) {
        launch(top_rest_pass<S>, job.rows, 1, 1, kWarp, 0, job.stream, job);
        job.top_q = job.top_rest;
    }
    with_functor(job.epilogue, SummedTerms{}, [&](auto term) {
        using Term = decltype(term);
        using Sums = ColumnSums<S, Term>;
        launch(class_sums_pass<S, Term>, (job.columns() + Sums::columns - 1) / Sums::columns, job.groups, 1,
               kSumThreads, Sums::bytes, job.stream, job);
    });
}

}  // namespace fusedloss::cuda
