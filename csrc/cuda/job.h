// What a launch takes: addresses, sizes and strides, by value. Nothing here allocates or knows a framework.
#pragma once

#include "../engine.h"
#include "device.h"

namespace fusedloss {
namespace cuda {

constexpr int kMaxThreads = 256;
constexpr int kStages = 6;      // tiles on their way from memory, and the one that is looked at
constexpr int kItemBytes = 32;  // of a tile for each thread
constexpr int kMaxCandidates = 64;
constexpr int kSumThreads = 128;
constexpr int kSumStages = 6;  // rows on their way in the sums over them, and the one that is looked at

// `T` below is float, or double when the logits are that; statistics and coefficients are laid out as engine.h says.
struct Job {
    const void* logits;
    int64_t rows, row_stride;
    int classes;
    const int64_t* target;      // [rows]; a class or kIgnored
    const int64_t* candidates;  // [rows, candidate_count] or null
    int candidate_count;
    int top_k;                 // 0, 1 or 2 largest logits
    bool below;                // the largest logit strictly below the target's
    bool mean;                 // mean_ce
    const void* class_weight;  // T [classes] or null
    const double* weight_sum;  // their sum; null: the number of classes

    int epilogue;                   // its number among RowEpilogues or ClassTerms; -1: none
    bool class_term;                // which of the two
    const void* param[kMaxParams];  // T
    int64_t param_stride[kMaxParams];
    const void* common;  // T [kCommon]; null for (1, 0, 0)

    // The statistics pass writes these, the gradient pass alone reads them.
    bool forward;
    void* loss;          // T [rows]
    void* statistics;    // T [kStatistics + picks, rows]
    int64_t* index;      // [picks, rows]
    void* coefficients;  // T [kCoefficients + picks, rows]

    void* grad;  // of the logits' dtype; may be the logits themselves; null: no gradient
    int64_t grad_row_stride;
    const void* upstream;  // T [rows], or null for all ones
    int64_t upstream_stride;

    // The sums over the rows, in groups of rows, from the statistics with the top class for a pick. `upstream` is then
    // the rows' weight.
    int groups;
    double* sums;       // [groups, 2, classes]: error, agreement
    const void* top_q;  // T [rows], 1 - p of the top class; null: found on the way
    void* top_rest;     // T [rows], for what is found on the way

    // Or, of a class term without forward and gradient, the sums over the classes but the target and the top class:
    // `sums` is then [2, rows], f and p df/dp.

    // A gradient that is scaled is `rows` numbers at `grad`, the factor the one at `upstream`, and `groups` the blocks.

    // How rows are cut: `parts` blocks of `threads` threads each, whose shared memory holds `slots` tiles of logits.
    // All of a part's: then the gradient needs no second read.
    int threads, parts, slots;
    Stream stream;

    FUSEDLOSS_HD int picks() const { return top_k + (below ? 1 : 0) + candidate_count; }
};

// Of the logits' dtype; `sum` for the sums over the rows, `scale` for a gradient and a factor, `run` for all else, for
// which a block takes `shared_bytes`.
#define FUSEDLOSS_DECLARE_LAUNCHES(dtype) \
    void run_##dtype(const Job&);         \
    void sum_##dtype(const Job&);         \
    void scale_##dtype(const Job&);       \
    int shared_bytes_##dtype(const Job&);
FUSEDLOSS_DECLARE_LAUNCHES(float64)
FUSEDLOSS_DECLARE_LAUNCHES(float32)
FUSEDLOSS_DECLARE_LAUNCHES(bfloat16)
FUSEDLOSS_DECLARE_LAUNCHES(float16)

}  // namespace cuda
}  // namespace fusedloss
