// The sums over the rows of what each class adds to the error and the agreement of a summed class term.
#pragma once

#include "rows.h"

namespace fusedloss {
namespace cuda {

// A row's statistics, as the statistics pass left them with the top class for a pick.
template <typename S>
struct SummedRow {
    using T = decltype(read(S{}));
    const S* z;
    T max, inverse;
    int target, top;  // -1 where it is out of range

    FUSEDLOSS_DEVICE SummedRow(const Job& job, int64_t row)
        : z(static_cast<const S*>(job.logits) + row * job.row_stride),
          max(statistic(job, kMax, row)),
          inverse(T(1) / statistic(job, kSumExp, row)),
          target(column(job, job.target[row])),
          top(column(job, job.index[row])) {}

    static FUSEDLOSS_DEVICE T statistic(const Job& job, int k, int64_t row) {
        return static_cast<const T*>(job.statistics)[k * job.rows + row];
    }
    static FUSEDLOSS_DEVICE int column(const Job& job, int64_t index) {
        return index >= 0 && index < job.classes ? static_cast<int>(index) : -1;
    }
};

// 1 - p of each row's top class: a warp a row. Only a p > 0.5 of a class that is not the target needs a look at the
// others.
template <typename S>
FUSEDLOSS_KERNEL void top_rest_pass(const Job job) {
    using T = decltype(read(S{}));
    const int64_t row = block_index();
    if (job.target[row] == kIgnored) return;
    const SummedRow<S> x(job, row);
    ClassPartial sums;
    const bool wrong = x.top != x.target && x.inverse > T(0.5);
    for (int i = thread_index(); wrong && i < job.classes; i += kWarp) {
        if (i != x.top) sums.rest += fast_exp(read(x.z[i]) - x.max);
    }
    sums = merge_warp(sums);
    if (thread_index() > 0) return;
    static_cast<T*>(job.top_rest)[row] = wrong               ? T(sums.rest) * x.inverse
                                         : x.top == x.target ? SummedRow<S>::statistic(job, kQ, row)
                                                             : T(1) - x.inverse;
}

// A block adds up its columns of the rows of a group.
template <typename S, typename Term>
FUSEDLOSS_KERNEL void class_sums_pass(const Job job) {
    using T = decltype(read(S{}));
    const int begin = static_cast<int>(block_index()) * kSumThreads * kSumColumns + thread_index();
    const int64_t group = block_row(), first = job.rows * group / job.groups,
                  last = job.rows * (group + 1) / job.groups;
    double error[kSumColumns] = {}, agreement[kSumColumns] = {};
    for (int64_t row = first; row < last; ++row) {
        if (job.target[row] == kIgnored) continue;
        const SummedRow<S> x(job, row);
        T params[kMaxParams];
#pragma unroll
        for (int k = 0; k < kMaxParams; ++k) {
            params[k] = job.param[k] ? static_cast<const T*>(job.param[k])[row * job.param_stride[k]] : T(0);
        }
        const T exponent = Term::exponent(params), top_q = static_cast<const T*>(job.top_q)[row];
        const T weight = job.upstream ? static_cast<const T*>(job.upstream)[row * job.upstream_stride] : T(1);
#pragma unroll
        for (int k = 0; k < kSumColumns; ++k) {
            const int i = begin + k * kSumThreads;
            if (i >= job.classes) continue;
            const T p = i == x.top ? x.inverse : fast_exp(read(x.z[i]) - x.max) * x.inverse;
            const T q = i == x.top ? top_q : T(1) - p;
            T slope;
            if (i == x.target) {
                const Overlap<T> overlap = Term::Math::positive(p, q, power_pair(q, exponent), params);
                error[k] += double(weight * overlap.error);
                agreement[k] += double(weight * overlap.agreement);
            } else if (i == x.top) {
                error[k] += double(weight * Term::negative(p, q, Power<T>{power(q, exponent), T(0)}, params, slope));
            } else {
                error[k] += double(weight * negative_term<Term>(p, exponent, params, slope));
            }
        }
    }
    double* const sums = job.sums + group * 2 * job.classes;
#pragma unroll
    for (int k = 0; k < kSumColumns; ++k) {
        const int i = begin + k * kSumThreads;
        if (i >= job.classes) continue;
        sums[i] = error[k];
        sums[job.classes + i] = agreement[k];
    }
}

// job.epilogue is the term's number among SummedTerms.
template <typename S>
void sum(Job job) {
    if (!job.top_q) {
        launch(top_rest_pass<S>, job.rows, 1, 1, kWarp, 0, job.stream, job);
        job.top_q = job.top_rest;
    }
    with_term(
        job.epilogue,
        [&](auto* term) {
            using Term = std::remove_pointer_t<decltype(term)>;
            if constexpr (!std::is_void_v<Term>) {
                constexpr int columns = kSumThreads * kSumColumns;
                launch(class_sums_pass<S, Term>, (job.classes + columns - 1) / columns, job.groups, 1, kSumThreads, 0,
                       job.stream, job);
            }
        },
        SummedTerms{});
}

}  // namespace cuda
}  // namespace fusedloss
