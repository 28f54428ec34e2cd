// What a launch takes, by value.
#pragma once

#include "../job.h"
#include "device.h"

namespace fusedloss::cuda {

constexpr int kMaxThreads = 256;
constexpr int kStages = 6;      // tiles on their way from memory, and the one that is looked at
constexpr int kItemBytes = 32;  // of a tile for each thread
constexpr int kMaxCandidates = 64;
constexpr int kSumThreads = 128;
constexpr int kSumStages = 6;  // rows on their way in the sums over them, and the one that is looked at

// A job, and how its rows are cut: `parts` blocks of `threads` threads each for a row, whose shared memory holds
// `slots` tiles of logits. All of a part's: then the gradient needs no second read.
struct Launch : Job {
    bool forward;    // the statistics pass; a gradient pass alone reads what it wrote
    void* top_rest;  // T [rows], for what sums over the rows find on the way
    int groups;      // of rows, each with its sums over the rows: `sums` is [groups, 2, classes]
    int parts, slots;
    Stream stream;

    FUSEDLOSS_HD int columns() const { return static_cast<int>(classes); }
};

// Of the logits' dtype; `sum` for the sums over the rows, `run` for all else, for which a block takes `shared_bytes`.
// `scale` multiplies `rows` numbers at `grad` by the one at `upstream`, in `groups` blocks.
#define FUSEDLOSS_DECLARE_LAUNCHES(dtype) \
    void run_##dtype(const Launch&);      \
    void sum_##dtype(const Launch&);      \
    void scale_##dtype(const Launch&);    \
    int shared_bytes_##dtype(const Launch&);
FUSEDLOSS_DECLARE_LAUNCHES(float64)
FUSEDLOSS_DECLARE_LAUNCHES(float32)
FUSEDLOSS_DECLARE_LAUNCHES(bfloat16)
FUSEDLOSS_DECLARE_LAUNCHES(float16)

}  // namespace fusedloss::cuda
