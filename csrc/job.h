// What the passes of the CPU engine and of the CUDA kernels take: addresses, sizes and strides. Nothing here allocates
// or knows a framework.
#pragma once

#include <cstdint>
#include <type_traits>

#include "epilogues.h"

namespace fusedloss {

constexpr int64_t kIgnored = -100;  // the target of a row that counts for nothing, and is not looked at

// What every loss has: the factors of its own term, of the smoothing term sum_j w_j (-log p_j) and of lse^2, and that
// of the logits, by which they are multiplied where they are read.
enum Common { kMain, kSmooth, kZLoss, kLogits, kCommon };

// One of them, of an array or of null.
template <typename T>
FUSEDLOSS_HD T common_at(const void* common, int k) {
    return common ? static_cast<const T*>(common)[k] : T(k == kMain || k == kLogits ? 1 : 0);
}

enum class DType { float64 = 0, float32 = 1, bfloat16 = 2, float16 = 3 };

// Statistics: T [kStatistics + picks, rows]. After the named ones come the picks' logits, in the order top, second,
// below, candidates; `index` is int64 [picks, rows], -1 where there is no such class. Then come the moments, if asked
// for.
enum Statistic { kMax, kSumExp, kQ, kCe, kTargetLogit, kMeanCe, kStatistics };

// The entropy -sum_j p_j log p_j, the excess sum_j p_j (z_j - max) and the power sum_j p_j^2.
enum Moment { kEntropy, kExcess, kPower, kMoments };

// Which of them a pass is asked for.
enum Moments { kNoMoments, kPowerAlone, kAllMoments };

// After all these, of a pair term: the teacher's largest logit and its sum of exp(t - max) (0 and 1 of targets), and
// the sum of exp((z - max) / kLogits factor), as it is without the temperature, for the cross-entropy beside the term.
enum Second { kSecondMax, kSecondSum, kPlainSum, kSeconds };

// Coefficients: T [kCoefficients + picks, rows]; of moments [kCoefficients + picks + kSlopes, rows].
//   row epilogue: a, u, gradient at the target; then b of each pick. dL/dz_j = a p_j - u w_j, minus b at the picks.
//                 Of moments p_j (c (z_j - max) + e p_j) more, c and e their slopes.
//   class term:   shift, gradient at the top class, gradient at the target. dL/dz_j = p_j (g_j - shift).
//   pair term:    shift, factor of the softmax without the temperature, gradient at the target.
//                 dL/dz_j = kMain h_j - p_j shift, plus that factor times exp((z_j - max) / kLogits factor).
// The gradient pass leaves out a target, top class or pick that is negative.
enum Coefficient { kA = 0, kU = 1, kTargetGradient = 2, kCoefficients = 3, kShift = 0, kTopGradient = 1, kPlain = 1 };
enum Slope { kOfExcess, kOfPower, kSlopes };

// The kinds of epilogue, each with a list of its own.
enum Kind { kRowEpilogue, kClassTerm, kPairTerm };

// A matrix of logits (rows, classes), unit stride along a row, what a pass is to find in it, and where that goes. `T`
// is float, or double where the logits are that. A pass takes what it needs; the rest is 0.
struct Job {
    DType dtype;
    const void* logits;
    int64_t rows, classes, row_stride;
    const int64_t* target;      // [rows]; a class or kIgnored
    const int64_t* candidates;  // [rows, candidate_count] or null
    int candidate_count;        // in a gradient pass all picks are like candidates
    int top_k;                  // 0, 1 or 2 largest logits
    bool below;                 // the largest logit strictly below the target's
    bool mean;                  // mean_ce
    int moments;  // which of Moments; in a gradient pass, whether there are slopes, or such statistics of a pair term
    const void* class_weight;  // T [classes] or null
    const double* weight_sum;  // their sum, for mean_ce; null: the number of classes

    int epilogue;  // its number among those of its kind, or of sums over the rows among SummedTerms; -1: none
    int kind;
    const void* common;  // T [kCommon]; null for (1, 0, 0, 1)
    const void* second;  // of a pair term: the teacher's logits, of their dtype, or targets T
    int64_t second_row_stride;

    // The statistics pass writes these, other passes read them.
    void* loss;          // T [rows]; null for statistics only
    void* statistics;    // T [kStatistics + picks (+ kMoments) (+ kSeconds), rows]
    int64_t* index;      // [picks, rows]
    void* coefficients;  // T [kCoefficients + picks, rows]; null for statistics only

    void* grad;  // of the logits' dtype; may be the logits themselves; null: no gradient
    int64_t grad_row_stride;
    const void* upstream;  // T [rows], or null for all ones; in sums over the rows their weight
    int64_t upstream_stride;

    // Sums of a class term, from statistics with the top class as the first pick. The logits may be some of the classes
    // of which the statistics are; target and top class are then -1 where they are not among them. Over the rows:
    // [2, classes], error and agreement of each class. Over the classes but the target and the top class: [2, rows],
    // f and p df/dp. Of a pair term over all classes: [3, rows], f, p df/dp and p - y.
    double* sums;
    const void* top_q;  // T [rows], 1 - p of the top class; null: found among the logits

    int threads;  // of the processor, or of a block on a GPU

    const void* param[kMaxParams] = {};     // T; null after the last
    int64_t param_stride[kMaxParams] = {};  // 0: one value for all rows; 1: a value a row

    FUSEDLOSS_HD int picks() const { return top_k + (below ? 1 : 0) + candidate_count; }

    // The gradient pass that follows a statistics pass with an epilogue.
    Job of_gradient() const {
        Job job = *this;
        job.candidate_count = picks();
        job.top_k = 0, job.below = false, job.mean = false;
        job.moments = kind == kPairTerm ? moments : 0;
        return job;
    }
};

// Calls visit(Functor{}) of the functor of that number in the list.
template <typename Visit, typename... Functors>
void with_functor(int number, FunctorList<Functors...>, const Visit& visit) {
    int k = 0;
    (void)((k++ == number && (visit(Functors{}), true)) || ...);
}

// The passes of the CPU engine, once for each instruction set.
using Pass = void(const Job&);
#define FUSEDLOSS_DECLARE_PASSES(isa)                           \
    namespace isa {                                             \
    Pass forward, backward, class_sums, class_terms, term_sums; \
    }
FUSEDLOSS_DECLARE_PASSES(generic)
FUSEDLOSS_DECLARE_PASSES(avx2)
FUSEDLOSS_DECLARE_PASSES(avx512)

}  // namespace fusedloss
