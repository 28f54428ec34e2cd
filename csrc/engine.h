// What the engine's passes take: addresses, sizes and strides. Nothing here allocates or knows a framework.
#pragma once

#include <cstdint>
#include <string>

#include "epilogues.h"

namespace fusedloss {

constexpr int64_t kIgnored = -100;  // the target of a row that counts for nothing, and is not looked at

// What every loss has: the factors of its own term, of the smoothing term sum_j w_j (-log p_j) and of lse^2.
enum Common { kMain, kSmooth, kZLoss, kCommon };

// One of them, of an array or of null.
template <typename T>
FUSEDLOSS_HD T common_at(const void* common, int k) {
    return common ? static_cast<const T*>(common)[k] : T(k == kMain ? 1 : 0);
}

enum class DType { float64 = 0, float32 = 1, bfloat16 = 2, float16 = 3 };

// A matrix of logits (rows, classes), unit stride along a row, and what the statistics pass is to find in it.
// `Scalar` arrays below are float, or double when dtype is float64.
struct Rows {
    DType dtype;
    const void* logits;
    int64_t rows, classes, row_stride;
    const int64_t* target;      // [rows]; a class or kIgnored
    const int64_t* candidates;  // [rows, candidate_count] or null
    int candidate_count;
    int top_k;                 // 0, 1 or 2 largest logits
    bool below;                // the largest logit strictly below the target's
    bool mean;                 // mean_ce
    const void* class_weight;  // Scalar [classes] or null
    double weight_sum;         // their sum; classes without weights
    int threads;

    int picks() const { return top_k + (below ? 1 : 0) + candidate_count; }
};

// Statistics: Scalar [kStatistics + picks, rows]. After the named ones come the picks' logits, in the order
// top, second, below, candidates; `index` is int64 [picks, rows], -1 where there is no such class.
enum Statistic { kMax, kSumExp, kQ, kCe, kTargetLogit, kMeanCe, kStatistics };

// Coefficients: Scalar [kCoefficients + picks, rows].
//   row epilogue: a, u, gradient at the target; then b of each pick. dL/dz_j = a p_j - u w_j, minus b at the
//   picks. class term:   shift, gradient at the top class, gradient at the target. dL/dz_j = p_j (g_j -
//   shift). The gradient pass leaves out a target, top class or pick that is negative.
enum Coefficient { kA = 0, kU = 1, kTargetGradient = 2, kCoefficients = 3, kShift = 0, kTopGradient = 1 };

struct Epilogue {
    std::string name;  // empty: statistics only
    const void* param[kMaxParams];
    int64_t param_stride[kMaxParams];  // 0: one value for all rows; 1: a value a row
    int param_count;
    const void* common;  // Scalar [kCommon]; null for (1, 0, 0)
};

struct Outputs {
    void* loss;          // Scalar [rows]; null for statistics only
    void* statistics;    // Scalar [kStatistics + picks, rows]
    int64_t* index;      // [picks, rows]
    void* coefficients;  // Scalar [kCoefficients + picks, rows]; null for statistics only
};

struct Gradient {
    const void* statistics;
    const int64_t* index;
    const void* coefficients;
    const void* grad_output;  // Scalar [rows] or null for all ones
    int64_t grad_output_stride;
    void* grad;  // of the logits' dtype; may be the logits themselves
    int64_t grad_row_stride;
};

// Sums of a class term, from the statistics of the rows with their top class as the first pick. The logits may be some
// of the classes of which the statistics are; target and top class are then -1 where they are not among them.
struct ClassSums {
    const void* statistics;
    const int64_t* index;
    // class_sums alone:
    const void* row_weight;  // Scalar [rows] or null for all ones
    int64_t row_weight_stride;
    const void* top_q;  // Scalar [rows], 1 - p of the top class; null: found among the logits
    // class_sums: [2, classes], error and agreement of a summed class term over the rows. term_sums: [2, rows], f and
    // p df/dp over the classes but the target and the top class.
    double* sums;
};

enum class EpilogueKind { none, row, class_term };
EpilogueKind epilogue_kind(const std::string& name);

// The passes, once for each instruction set.
#define FUSEDLOSS_DECLARE_PASSES(isa)                                \
    namespace isa {                                                  \
    void forward(const Rows&, const Epilogue&, const Outputs&);      \
    void backward(const Rows&, const Epilogue&, const Gradient&);    \
    void class_sums(const Rows&, const Epilogue&, const ClassSums&); \
    void class_terms(const Rows&, const Epilogue&, const Outputs&);  \
    void term_sums(const Rows&, const Epilogue&, const ClassSums&);  \
    }
FUSEDLOSS_DECLARE_PASSES(generic)
FUSEDLOSS_DECLARE_PASSES(avx2)
FUSEDLOSS_DECLARE_PASSES(avx512)

}  // namespace fusedloss
