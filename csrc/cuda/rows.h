// The passes over rows of logits, as one kernel that does the first, the second, or both of one read:
//
//   forward    the row's statistics (an online softmax without the target's term), then the loss's epilogue on them.
//              A class term looks at the row a second time
//   gradient   the gradient of the row, which may take its place
//
// or, of a class term, the sums alone that the second look takes.
//
// A row is the work of `parts` blocks of a cluster, whose statistics merge through distributed shared memory. Each warp
// has tiles of the row, of which each thread copies 32 bytes to shared memory and looks at what it copied. So the warps
// of a block wait for nobody until their parts merge. Where there are slots for all tiles, the later looks find them
// there.
//
// Rows that do not begin at a multiple of 16 bytes are copied as they lie, a little beside the columns that the thread
// looks at: so which thread looks at which column, and the order of every sum, depends on the sizes alone. The threads
// of a warp then wait for each other.
#pragma once

#include "launch.h"
#include "merge.h"

namespace fusedloss::cuda {

// 16 bytes of logits.
template <typename S>
union alignas(16) Pack {
    static constexpr int size = 16 / sizeof(S);
    S item[size];
    uint32_t word[4];
    FUSEDLOSS_DEVICE Pack() {}

    // Those in shared memory, so many elements from a multiple of 16 bytes.
    FUSEDLOSS_DEVICE Pack(const S* z, int beside) {
        if (beside % size == 0) {
            *this = *reinterpret_cast<const Pack*>(z);
            return;
        }
        const int bytes = beside * static_cast<int>(sizeof(S)) % 4;
        const uint32_t* const words = reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(z) - bytes);
#pragma unroll
        for (int k = 0; k < 4; ++k) word[k] = shift_right(words[k], words[k + 1], 8 * bytes);
    }
};

// What the gradient of a row is made of.
template <typename T>
struct Settled {
    RowStatistics<T> s;
    T one, two, at_target;  // the coefficients
    int top;
};

// The part of a gradient that the probability is a factor of, from e = exp(lag).
template <typename T>
struct Slopes {
    T a, by_excess, by_power;

    // A lag is multiplied by its exponential first, which is 0 where another factor would make it infinite.
    FUSEDLOSS_DEVICE T gradient(T e, T lag) const { return (e * bounded(lag)) * by_excess + e * (e * by_power + a); }
};

// An ignored row gets the statistics of two equal logits, one of them the target, so that a user's loss function sees
// nothing that is not finite, and loss, coefficients and gradient of zero.
template <typename T>
struct Neutral {
    static constexpr T log2 = T(0.6931471805599453);
    T value[kStatistics] = {T(0), T(2), T(0.5), log2, T(0), log2};
    T moment[kMoments] = {log2, T(0), T(0.5)};
};

// What a block's threads tell each other in shared memory; the slots for tiles follow.
template <typename T>
struct alignas(16) Board {
    static constexpr int warps = kMaxThreads / kWarp, picks = kMaxCandidates + 3;
    Partial<T> partial[warps];
    ClassPartial of_classes[warps];
    Settled<T> settled;
    int64_t column[picks];
    T logit[picks], b[picks];
};

// Statistics of a row's logits as they lie, times a factor: from the largest, the sum of exp(factor (z - max)) over all
// but the target, and the target's logit.
template <typename T>
FUSEDLOSS_DEVICE void settle(RowStatistics<T>& s, T max, T rest, T target_logit, T factor) {
    s.max = rounded_product(max, factor);
    const T lag = (target_logit - max) * factor, mine = std::exp(lag);
    s.sum_exp = rest + mine;
    s.log_sum = std::log(s.sum_exp);
    s.q = rest / s.sum_exp;
    s.p = mine / s.sum_exp;
    s.ce = rest < mine ? std::log1p(rest / mine) : s.log_sum - lag;
    if (s.sum_exp == T(0)) {  // no finite logit at all
        s.max = T(0);
        s.q = T(1);
        s.p = T(0);
        s.ce = kInfinity<T>;
    }
}

// Runs the row epilogue of that number.
template <typename T, typename... Functors>
FUSEDLOSS_DEVICE void run_epilogue(int number, const RowStatistics<T>& s, const T* params, RowGradient<T>& g,
                                   FunctorList<Functors...>) {
    int k = 0;
    (void)((k++ == number && (Functors::run(s, params, g), true)) || ...);
}

// (1 - p)^x of small p; what it leaves out is less than half an ulp.
template <typename T>
FUSEDLOSS_DEVICE T power_series(T p, T x) {
    T sum = T(1) - (x - T(3)) * T(0.25) * p;
    sum = T(1) - (x - T(2)) * T(1.0 / 3) * p * sum;
    sum = T(1) - (x - T(1)) * T(0.5) * p * sum;
    return T(1) - x * p * sum;
}

// The class term at y = 0.
template <typename Term, typename T>
FUSEDLOSS_DEVICE T negative_term(T p, T exponent, const T* params, T& g) {
    const T limit = (sizeof(T) == 4 ? T(0x1p-6) : T(0x1p-12)) / (T(1) + exponent);
    if (p <= limit) {
        return Term::small_negative(p, power_series(p, exponent), power_series(p, exponent - T(1)), params, g);
    }
    const T q = T(1) - p, weight = std::exp(std::log(q) * exponent);
    return Term::small_negative(p, weight, weight / q, params, g);
}

// A block's part of a row. Term: of a loss over the classes, or void.
template <typename S, typename Term, int Asked>
class RowPart {
    using T = decltype(read(S{}));
    static constexpr bool class_term = !std::is_void_v<Term>;
    static constexpr int pack = Pack<S>::size, stride = kWarp * pack;              // of a thread's packs in a tile
    static constexpr int slot_bytes = kWarp * kItemBytes + 16;                     // of a tile
    static constexpr int items = kItemBytes / sizeof(S), columns = kWarp * items;  // of a thread, of a tile

   public:
    FUSEDLOSS_DEVICE explicit RowPart(const Launch& job)
        : job_(job),
          board_(*reinterpret_cast<Board<T>*>(shared_memory())),
          thread_(thread_index()),
          threads_(job.threads),
          warp_(thread_ / kWarp),
          lane_(thread_ % kWarp),
          rank_(job.parts > 1 ? static_cast<unsigned>(block_index()) % job.parts : 0),
          row_(job.parts > 1 ? static_cast<unsigned>(block_index()) / job.parts : static_cast<int>(block_index())),
          target_(column_of(job.target[row_])),
          logits_(static_cast<const S*>(job.logits) + row_ * job.row_stride),
          phase_(kept(phase(logits_))),
          shared_(phase_ != 0 || (job.grad && phase(grad()) != 0)),
          between_(kept(threads_ * items)),
          round_(kept(threads_ / kWarp * slot_bytes)),
          slots_(kept(job.slots * round_)),
          slots_end_(kept(shared_address(&board_ + 1) + slots_)),
          own_slot_(kept(shared_address(&board_ + 1) + warp_ * slot_bytes + lane_ * 16)),
          begin_(0),
          end_(job.columns()) {
        if (job.parts > 1) {
            const int packs = (job.columns() + pack - 1) / pack;
            const int64_t size = int64_t((packs + job.parts - 1) / job.parts) * pack;
            begin_ = at_most(rank_ * size);
            end_ = at_most((rank_ + 1) * size);
        }
    }

    FUSEDLOSS_DEVICE void run() {
        if constexpr (class_term) {
            if (job_.sums) return term_sums();
        }
        if (job_.target[row_] == kIgnored) return ignore();
        job_.forward ? forward() : recall();
        if (job_.grad) gradient();
    }

   private:
    FUSEDLOSS_DEVICE int column_of(int64_t index) const {
        return index >= 0 && index < job_.columns() ? static_cast<int>(index) : -1;
    }
    FUSEDLOSS_DEVICE int at_most(int64_t column) const {
        return static_cast<int>(column < job_.columns() ? column : job_.columns());
    }
    struct Params {
        T value[kMaxParams];
    };
    FUSEDLOSS_DEVICE Params params() const {
        Params x;
#pragma unroll
        for (int k = 0; k < kMaxParams; ++k) {
            x.value[k] = job_.param[k] ? static_cast<const T*>(job_.param[k])[row_ * job_.param_stride[k]] : T(0);
        }
        return x;
    }
    FUSEDLOSS_DEVICE S* grad() const { return static_cast<S*>(job_.grad) + row_ * job_.grad_row_stride; }
    FUSEDLOSS_DEVICE const T* class_weight() const { return static_cast<const T*>(job_.class_weight); }
    FUSEDLOSS_DEVICE T weight_of(int column) const { return class_weight() ? class_weight()[column] : T(1); }
    FUSEDLOSS_DEVICE T weight_of_target() const { return target_ >= 0 ? weight_of(target_) : T(1); }
    FUSEDLOSS_DEVICE T common(int k) const { return common_at<T>(job_.common, k); }
    // Of the logits. Each look takes it anew, and no register holds it in between.
    FUSEDLOSS_DEVICE T factor() const { return common(kLogits); }
    FUSEDLOSS_DEVICE T upstream() const {
        return job_.upstream ? static_cast<const T*>(job_.upstream)[row_ * job_.upstream_stride] : T(1);
    }
    FUSEDLOSS_DEVICE void sync() const { job_.parts > 1 ? cluster_sync() : block_sync(); }

    // Puts an output of the row, which all parts know.
    template <typename X>
    FUSEDLOSS_DEVICE void put(void* to, int k, X x) const {
        if (rank_ == 0) static_cast<X*>(to)[k * job_.rows + row_] = x;
    }

    // --- tiles ---

    // Columns of a warp, from this one on.
    struct Tile {
        int from;
        const S* z;  // the thread's first, in shared memory as far from a multiple of 16 bytes as the row in memory is
    };

    // Elements from the last multiple of 16 bytes.
    static FUSEDLOSS_DEVICE int phase(const S* address) {
        return static_cast<int>(reinterpret_cast<uintptr_t>(address) % 16 / sizeof(S));
    }

    FUSEDLOSS_DEVICE int first_tile() const { return begin_ + warp_ * columns; }

    // Where in shared memory a thread's first pack is in the next slot, round and round.
    FUSEDLOSS_DEVICE int after(int slot) const {
        slot += round_;
        return slot < slots_end_ ? slot : slot - slots_;
    }
    static FUSEDLOSS_DEVICE S* in(int slot) { return static_cast<S*>(shared_pointer(slot)); }

    // Starts the copies of a tile by the packs that it lies in, of which the columns of other parts are left out.
    FUSEDLOSS_DEVICE void load(int from, int slot) const {
        const int before = from - phase_, packs = shared_ ? columns + pack : columns;
        if (before >= begin_ && before <= end_ - packs) {
            const S* const source = logits_ + (before + lane_ * pack);
#pragma unroll
            for (int i = 0; i < columns; i += stride) copy_16_bytes(in(slot) + i, source + i);
            if (shared_ && lane_ == 0) copy_16_bytes(in(slot) + columns, source + columns);
        } else if (from < end_) {
            load_end(before, packs, slot);
        }
    }
    FUSEDLOSS_DEVICE void load_end(int before, int packs, int slot) const {
#pragma unroll 1
        for (int i = 0; lane_ * pack + i < packs; i += stride) {
            S* const to = in(slot) + i;
            const int first = before + lane_ * pack + i;
            if (first >= begin_ && first + pack <= end_) {
                copy_16_bytes(to, logits_ + first);
                continue;
            }
#pragma unroll 1
            for (int k = 0; k < pack; ++k) {
                if (first + k >= begin_ && first + k < end_) {
                    to[k] = logits_[first + k];
                } else {
                    write(to + k, -kInfinity<T>);  // so that nobody who looks at it has to mind where the row ends
                }
            }
        }
    }

    // The tiles on their way while the first is looked at.
    FUSEDLOSS_DEVICE void load_first() const {
        int from = first_tile(), slot = own_slot_;
#pragma unroll 1
        for (int i = 0; i < kStages - 1; ++i, from += between_, slot = after(slot)) {
            load(from, slot);
            commit_copies();
        }
    }

    // body(tile) for each. `loads`: the first are on their way, the others are not.
    template <typename Body>
    FUSEDLOSS_DEVICE void over_tiles(bool loads, const Body& body) const {
        int slot = own_slot_, next = own_slot_ + (kStages - 2) * round_;
#pragma unroll 1
        for (int from = first_tile(); from < end_; from += between_, slot = after(slot)) {
            if (loads) {
                wait_copies<kStages - 2>();
                if (shared_) warp_sync();  // all have it, and nobody looks at the one before any more
                load(from + (kStages - 1) * between_, next = after(next));
                commit_copies();
            }
            body(Tile{from, in(slot) + phase_});
        }
    }

    // The same once more, behind a barrier.
    template <typename Body>
    FUSEDLOSS_DEVICE void over_tiles_again(const Body& body) const {
        const bool loads = !job_.forward || end_ - begin_ > job_.slots * between_;
        if (loads) load_first();
        over_tiles(loads, body);
    }

    // The parts of all threads, merged; known to the first warp.
    template <typename Part>
    FUSEDLOSS_DEVICE Part gather(Part part, Part* records) const {
        const T factor = this->factor();
        part = merge_warp<Asked>(part, factor);
        if (lane_ == 0) records[warp_] = part;
        sync();
        if (warp_ > 0) return part;
        const int warps = threads_ / kWarp;
        Part all;
        if (lane_ < warps) all = records[lane_];
        if (job_.parts > 1) {
            all = Part();
            for (int i = lane_; i < warps * job_.parts; i += kWarp) {
                merge<Asked>(all, *cluster_peer(records + i % warps, i / warps), factor);
            }
        }
        return merge_warp<Asked>(all, factor);
    }

    // --- forward ---

    FUSEDLOSS_DEVICE void forward() {
        load_first();
        const T target_logit = target_ >= 0 ? read(logits_[target_]) : kNaN<T>;
        // Some logit, so that a common offset takes no digits from the sum.
        const T first = asked_mean() ? read(logits_[0]) : T(0);
        const T reference = first - first == T(0) ? first : T(0);
        Partial<T> part;
        if (job_.candidate_count > 0) read_candidates(part);
        const T exponent = exponent_of(factor());
        over_tiles(true, [&](const Tile& tile) { scan(tile, exponent, target_logit, reference, part); });
        part = gather(part, board_.partial);
        if (thread_ == 0) {
            merge<Asked>(part, of_target(target_logit, reference), factor());
            find_statistics(part, target_logit, reference);
        }
        if constexpr (class_term) {
            block_sync();
            const Settled<T>& x = board_.settled;
            const T factor = this->factor(), max = x.s.max, inverse = T(1) / x.s.sum_exp;
            const int top = x.top;
            ClassPartial sums;
            const Params params = this->params();
            over_tiles_again([&](const Tile& tile) { sweep(tile, factor, max, inverse, top, params.value, sums); });
            sums = gather(sums, board_.of_classes);
            if (thread_ == 0) finish_class_term(sums);
        } else if (thread_ == 0 && job_.epilogue >= 0) {
            finish();
        }
        sync();  // nobody looks at this row's logits or this block's memory any more
    }

    FUSEDLOSS_DEVICE bool asked_mean() const { return (Asked & kMean) && job_.mean; }
    FUSEDLOSS_DEVICE bool asked_below() const { return (Asked & kBelow) && job_.below; }

    FUSEDLOSS_DEVICE void pick(int k, T logit, int64_t index) {
        put(job_.statistics, kStatistics + k, board_.logit[k] = rounded_product(logit, factor()));
        put(job_.index, k, board_.column[k] = index);
    }

    // Each by a thread of its own, since a row waits for none of them.
    FUSEDLOSS_DEVICE void read_candidates(Partial<T>& part) {
        const int first = job_.picks() - job_.candidate_count;
        for (int k = thread_; k < job_.candidate_count; k += threads_) {
            const int64_t index = job_.candidates[int64_t(row_) * job_.candidate_count + k];
            const int column = column_of(index);
            if (column < 0) part.rest = kNaN<double>;
            pick(first + k, column < 0 ? -kInfinity<T> : read(logits_[column]), index);
        }
    }

    // The target is no part of the sums, and so of no thread's columns.
    FUSEDLOSS_DEVICE Partial<T> of_target(T logit, T reference) const {
        Partial<T> part;
        if (asked_mean()) part.mean = (logit - reference) * weight_of_target();
        if (logit == logit) {
            part.max = logit;
            part.top = {logit, target_};
        }
        return part;
    }

    // Looks at the logits as they lie: the factor is in the exponent, and of the sums it is taken once a row.
    FUSEDLOSS_DEVICE void scan(const Tile& tile, T exponent, T target_logit, T reference, Partial<T>& part) const {
        const auto column = [&](int k) { return tile.from + lane_ * pack + k / pack * stride + k % pack; };
        T z[items];
#pragma unroll
        for (int i = 0; i < items; i += pack) {
            const Pack<S> x(tile.z + i / pack * stride, phase_);
#pragma unroll
            for (int k = 0; k < pack; ++k) z[i + k] = read(x.item[k]);
        }
        if (static_cast<unsigned>(target_ - tile.from) < columns) {
#pragma unroll
            for (int k = 0; k < items; ++k) z[k] = column(k) == target_ ? -kInfinity<T> : z[k];
        }
        T max = z[0];
#pragma unroll
        for (int k = 1; k < items; ++k) max = larger(max, z[k]);
        const T before = part.max, base = part.max = larger(before, max);
        if constexpr (Asked & kSums) {
            T rest = 0, ties = 0, excess = 0, square = 0;
#pragma unroll
            for (int k = 0; k < items; ++k) {
                const T lag = z[k] - base, tie = z[k] == base ? T(1) : T(0);
                const T e = fast_exp(lag, exponent) - tie;  // 0 of a tie
                rest += e;
                ties += tie;
                excess += e * bounded(lag);
                square += e * e;
            }
            if (before != base) part.shift(before - base, fast_exp(before - base, exponent));
            part.rest += rest;
            part.ties += static_cast<int>(ties);
            part.excess += excess;
            part.square += square;
        } else {
            T rest = fast_exp(z[0] - base, exponent);
#pragma unroll
            for (int k = 1; k < items; ++k) rest += fast_exp(z[k] - base, exponent);
            part.rest = part.rest * double(fast_exp(before - base, exponent)) + double(rest);
        }
        if (asked_mean()) {
            T mean = 0;
#pragma unroll
            for (int k = 0; k < items; ++k) {
                const int i = column(k);
                if (i < end_ && i != target_) mean += (z[k] - reference) * weight_of(i);
            }
            part.mean += mean;
        }
        if ((Asked & kTop) && job_.top_k > 0 && part.worth_a_look(max, job_.top_k)) {
#pragma unroll
            for (int k = 0; k < items; ++k) {
                const int i = column(k);
                if (i < end_ && i != target_ && z[k] == z[k]) insert(part.top, part.second, Best<T>{z[k], i});
            }
        }
        if (asked_below()) {
#pragma unroll
            for (int k = 0; k < items; ++k) {
                if (z[k] < target_logit && z[k] > part.below.value) part.below = {z[k], column(k)};
            }
        }
    }

    FUSEDLOSS_DEVICE void find_statistics(const Partial<T>& part, T target_logit, T reference) {
        Settled<T>& x = board_.settled;
        RowStatistics<T>& s = x.s;
        if constexpr (Asked & (kTop | kBelow)) {
            int k = 0;
            // A row of NaN alone has no largest logit; its loss is NaN, and any index will do.
            x.top = part.top.column < 0 ? 0 : part.top.column;
            if (job_.top_k > 0) pick(k++, part.top.value, x.top);
            if (job_.top_k > 1) pick(k++, part.second.value, part.second.column);
            if (asked_below()) pick(k++, part.below.value, part.below.column);
        }
        s.target = target_;
        s.picks = job_.picks();
        s.pick_logit = board_.logit;
        s.pick_index = board_.column;

        const T factor = this->factor();
        settle(s, part.max, T(Asked & kSums ? part.rest + part.ties : part.rest), target_logit, factor);
        s.mean_ce = T(0);
        if (asked_mean()) {
            const double lse = double(s.log_sum) + (double(part.max) - reference) * factor;
            s.mean_ce = T((weight_sum() * lse - part.mean * factor) / double(job_.columns()));
        }
        const T values[kStatistics] = {s.max, s.sum_exp, s.q, s.ce, rounded_product(target_logit, factor), s.mean_ce};
#pragma unroll
        for (int i = 0; i < kStatistics; ++i) put(job_.statistics, i, values[i]);
        if constexpr (Asked & kSums) {
            const T lag = (target_logit - part.max) * factor;
            put_moments(part, lag, std::exp(lag));
        }
    }

    // NaN where no logit is finite, since nothing is the maximum then.
    FUSEDLOSS_DEVICE void put_moments(const Partial<T>& part, T target_lag, T target_exp) const {
        const double tie = target_lag == T(0) ? 1 : 0, of_target = double(target_exp) - tie;
        const double low = part.rest + of_target, ties = part.ties + tie, total = low + ties;
        const double excess = (part.excess * factor() + of_target * bounded(target_lag)) / total;
        const double square = part.square + of_target * of_target + ties;
        const double values[kMoments] = {std::log1p(low + (ties - 1)) - excess, excess, square / (total * total)};
#pragma unroll
        for (int i = 0; i < kMoments; ++i) put(job_.statistics, kStatistics + job_.picks() + i, T(values[i]));
    }

    FUSEDLOSS_DEVICE double weight_sum() const { return job_.weight_sum ? *job_.weight_sum : double(job_.columns()); }

    FUSEDLOSS_DEVICE void finish() {
        Settled<T>& x = board_.settled;
        const RowStatistics<T>& s = x.s;
        RowGradient<T> g;
        g.b = board_.b;
        for (int k = 0; k < s.picks; ++k) g.b[k] = T(0);
        run_epilogue(job_.epilogue, s, params().value, g, RowEpilogues{});
        const T weight = weight_of_target(), smooth = common(kSmooth);
        const Shared<T> shared = {common(kMain), smooth, common(kZLoss), T(weight_sum())};
        apply_shared(s, shared, weight, job_.columns(), g);
        put_coefficients(g.loss, g.a, smooth, g.d - g.a * s.q - smooth * weight);
        for (int k = 0; k < s.picks; ++k) put(job_.coefficients, kCoefficients + k, g.b[k]);
    }

    FUSEDLOSS_DEVICE void put_coefficients(T loss, T one, T two, T at_target) {
        Settled<T>& x = board_.settled;
        put(job_.loss, 0, loss);
        put(job_.coefficients, 0, x.one = one);
        put(job_.coefficients, 1, x.two = two);
        put(job_.coefficients, 2, x.at_target = at_target);
    }

    // Of the columns that are neither the target nor the top class, which are singled out.
    FUSEDLOSS_DEVICE void sweep(const Tile& tile, T factor, T max, T inverse, int top, const T* params,
                                ClassPartial& sums) const {
        const T exponent = Term::exponent(params);
        const auto add_to = [&](auto& to) {
#pragma unroll 1
            for (int j = 0; j < columns; j += stride) {
#pragma unroll(sizeof(T) == 8 ? 1 : 4)
                for (int k = 0; k < pack; ++k) {
                    const int i = tile.from + lane_ * pack + j + k;
                    if (i >= end_ || i == target_ || i == top) continue;
                    const T e = fast_exp(rounded_product(read(tile.z[j + k]), factor) - max), p = e * inverse,
                            weight = weight_of(i);
                    T g;
                    const T f = negative_term<Term>(p, exponent, params, g);
                    to.rest += e;
                    to.loss += f * weight;
                    to.slope += p * (g * weight);
                }
            }
        };
        if constexpr (sizeof(T) == 8) {
            add_to(sums);  // there are no registers for others
        } else {
            struct {
                T rest = 0, loss = 0, slope = 0;
            } of_tile;
            add_to(of_tile);
            sums.rest += of_tile.rest;
            sums.loss += of_tile.loss;
            sums.slope += of_tile.slope;
        }
    }

    FUSEDLOSS_DEVICE void term_sums() {
        ClassPartial sums;
        if (job_.target[row_] != kIgnored) {
            const T* const statistic = static_cast<const T*>(job_.statistics) + row_;
            const T factor = this->factor(), max = statistic[kMax * job_.rows],
                    inverse = T(1) / statistic[kSumExp * job_.rows];
            const int top = column_of(job_.index[row_]);
            const Params params = this->params();
            load_first();
            over_tiles(true, [&](const Tile& tile) { sweep(tile, factor, max, inverse, top, params.value, sums); });
            sums = gather(sums, board_.of_classes);
        }
        if (thread_ == 0) {
            put(job_.sums, 0, sums.loss);
            put(job_.sums, 1, sums.slope);
        }
        sync();  // nobody looks at this block's memory any more
    }

    FUSEDLOSS_DEVICE void finish_class_term(const ClassPartial& sums) {
        Settled<T>& x = board_.settled;
        const RowStatistics<T>& s = x.s;
        const Params values = this->params();
        const T* const params = values.value;
        const T exponent = Term::exponent(params), target_weight = weight_of_target();
        // L = w_t z_loss lse^2, to which a class term adds; dL/dz_j = z_slope p_j
        const T lse = s.max + s.log_sum, factor = common(kZLoss) * target_weight;
        const T z_term = factor != T(0) ? factor * lse * lse : T(0);
        const T z_slope = factor != T(0) ? T(2) * factor * lse : T(0);

        const T inverse = T(1) / s.sum_exp;
        double rest = sums.rest, slope = sums.slope, loss = sums.loss;
        const bool is_top = target_ == x.top;
        T target_p = 0, target_g = 0, h;
        if (!is_top) {
            rest += s.p * s.sum_exp;
            target_p = s.p;
            const T q = T(1) - target_p;
            loss += Term::positive(target_p, q, ScalarPowers::pair(q, exponent), target_weight, params, h);
            target_g = h / q;
            slope += double(target_p) * target_g;
        }
        // The top class's 1 - p comes from the others' sum. Its logit is the maximum; 1 - q would lose digits where the
        // row is flat.
        const T top_q = T(rest) * inverse, top_p = inverse;
        if (is_top) {
            loss += Term::positive(top_p, top_q, ScalarPowers::pair(top_q, exponent), target_weight, params, h);
        } else {
            const T weight = weight_of(x.top);
            loss +=
                weight * Term::negative(top_p, top_q, Power<T>{ScalarPowers::value(top_q, exponent), T(0)}, params, h);
            h *= weight;
        }
        // dL/dz_top = p (h - slope); for the others p_j (g_j - slope - p h / q), q the top's 1 - p. Where q underflows,
        // so do they.
        const T shift = T(slope) + (top_q > T(0) ? top_p * h / top_q : T(0)) - z_slope;
        const T top_gradient = top_p * (h - T(slope) + z_slope);
        const T target_gradient = is_top ? top_gradient : target_p * (target_g - shift);
        put_coefficients(z_term + T(loss), shift, top_gradient, target_gradient);
        for (int k = 0; k < s.picks; ++k) put(job_.coefficients, kCoefficients + k, T(0));
    }

    // --- gradient ---

    // What forward would leave in shared memory, from its outputs.
    FUSEDLOSS_DEVICE void recall() {
        if (thread_ == 0) {
            const int64_t n = job_.rows;
            const T* const statistic = static_cast<const T*>(job_.statistics) + row_;
            const T* const coefficient = static_cast<const T*>(job_.coefficients) + row_;
            Settled<T>& x = board_.settled;
            x.s.max = statistic[kMax * n];
            x.s.sum_exp = statistic[kSumExp * n];
            x.s.picks = job_.picks();
            x.one = coefficient[0];
            x.two = coefficient[n];
            x.at_target = coefficient[2 * n];
            x.top = class_term ? column_of(job_.index[row_]) : -1;
        }
        if constexpr (!class_term) {
            for (int k = thread_; k < job_.picks(); k += threads_) {
                board_.logit[k] = static_cast<const T*>(job_.statistics)[(kStatistics + k) * job_.rows + row_];
                board_.b[k] = static_cast<const T*>(job_.coefficients)[(kCoefficients + k) * job_.rows + row_];
                board_.column[k] = job_.index[k * job_.rows + row_];
            }
        }
        block_sync();
    }

    FUSEDLOSS_DEVICE void gradient() const {
        const Settled<T>& x = board_.settled;
        const T factor = this->factor(), max = x.s.max, inverse = T(1) / x.s.sum_exp, scale = upstream();
        const auto lag = [&](T z) { return rounded_product(z, factor) - max; };  // 0 of the largest
        if constexpr (class_term) {
            const Params params = this->params();
            const T exponent = Term::exponent(params.value), shift = x.one;
            write_rows([&](T z, int column) {
                const T p = fast_exp(lag(z)) * inverse;
                T g;
                negative_term<Term>(p, exponent, params.value, g);
                return p * (g * weight_of(column) - shift) * scale;
            });
        } else {
            const T a = x.one * inverse * scale, u = x.two * scale;
            const bool weighted = class_weight() && u != T(0);
            if (sloped()) {
                const Slopes<T> slopes = this->slopes(a, inverse, scale);
                const auto share = [&](T z) { return slopes.gradient(fast_exp(lag(z)), lag(z)); };
                if (weighted) {
                    write_rows([&](T z, int column) { return share(z) - u * class_weight()[column]; });
                } else {
                    write_rows([&](T z, int) { return share(z) - u; });
                }
            } else if (weighted) {
                write_rows([&](T z, int column) { return a * fast_exp(lag(z)) - u * class_weight()[column]; });
            } else {
                write_rows([&](T z, int) { return a * fast_exp(lag(z)) - u; });
            }
        }
        block_sync();
        for (int k = thread_ - 1; k < x.s.picks; k += threads_) except(k);
    }

    // Whether the coefficients have slopes of moments.
    FUSEDLOSS_DEVICE bool sloped() const { return (Asked & kSums) && !job_.forward; }

    FUSEDLOSS_DEVICE Slopes<T> slopes(T a, T inverse, T scale) const {
        const T* const slope = static_cast<const T*>(job_.coefficients) + row_ +
                               int64_t(kCoefficients + board_.settled.s.picks) * job_.rows;
        return {a, slope[kOfExcess * job_.rows] * inverse * scale,
                slope[kOfPower * job_.rows] * inverse * inverse * scale};
    }

    // The gradient of the target (-1), or of a pick, whose column is one of few for which it is not the formula.
    FUSEDLOSS_DEVICE void except(int k) const {
        const Settled<T>& x = board_.settled;
        const int column = k < 0 ? target_ : class_term ? x.top : column_of(board_.column[k]);
        if (column < begin_ || column >= end_) return;
        const T scale = upstream();
        T value = (k < 0 ? x.at_target : x.two) * scale;
        if constexpr (!class_term) {
            const auto share = [&](int i) { return board_.column[i] == column ? board_.b[i] * scale : T(0); };
            if (k >= 0) {
                if (column == target_ || share(k) == T(0)) return;
                for (int i = 0; i < k; ++i) {
                    if (share(i) != T(0)) return;  // the first of equal picks accounts for all
                }
                const T a = x.one / x.s.sum_exp * scale, lag = board_.logit[k] - x.s.max;
                T p = a * std::exp(lag);
                if (sloped()) p = slopes(a, T(1) / x.s.sum_exp, scale).gradient(std::exp(lag), lag);
                value = value == T(0) ? p : p - value * weight_of(column);
            }
            for (int i = k < 0 ? 0 : k; i < x.s.picks; ++i) value -= share(i);
        }
        write(grad() + column, value);
    }

    // grad = formula(logit, column), by the packs of the gradient, which may lie otherwise than those of the logits: a
    // warp has those from the first that its tile's copies hold.
    template <typename Formula>
    FUSEDLOSS_DEVICE void write_rows(const Formula& formula) const {
        S* const row = grad();
        const int shift = kept((phase(row) > phase_ ? pack : 0) - phase(row)), edge = shift == 0 ? 0 : pack;
        over_tiles_again([&](const Tile& tile) {
            S* const to = row + (tile.from + shift + lane_ * pack);
            const S* const z = tile.z + shift;
            const auto move = [&](int j) {
                Pack<S> x(z + j, phase_ + shift);
                T value[pack];
#pragma unroll
                for (int k = 0; k < pack; ++k) {
                    value[k] = formula(read(x.item[k]), tile.from + shift + lane_ * pack + j + k);
                }
#pragma unroll
                for (int k = 0; k < pack; k += 2) write_two(&x.item[k], value[k], value[k + 1]);
                *reinterpret_cast<Pack<S>*>(to + j) = x;
            };
            if (!class_term && tile.from >= begin_ + edge && tile.from <= end_ - columns - edge) {
#pragma unroll
                for (int j = 0; j < columns; j += stride) move(j);
                return;
            }
            const int rest = end_ - tile.from,
                      last = rest <= columns || rest < columns + shift ? rest : columns + shift;
            const int begin = (tile.from > begin_ ? shift : 0) - shift - lane_ * pack,
                      end = last - shift - lane_ * pack;
#pragma unroll 1
            for (int j = begin + lane_ * pack < 0 ? -pack : 0; j < end; j += stride) {
                if (j >= begin && j + pack <= end) {
                    move(j);
                    continue;
                }
#pragma unroll 1
                for (int k = j < begin ? begin : j; k < j + pack && k < end; ++k) {
                    write(to + k, formula(read(z[k]), tile.from + shift + lane_ * pack + k));
                }
            }
        });
    }

    // An ignored row is not looked at.
    FUSEDLOSS_DEVICE void ignore() const {
        const int picks = job_.picks();
        if (thread_ == 0 && job_.forward) {
            const Neutral<T> neutral;
#pragma unroll
            for (int k = 0; k < kStatistics; ++k) put(job_.statistics, k, neutral.value[k]);
            for (int k = 0; k < picks; ++k) {
                put(job_.statistics, kStatistics + k, T(0));
                put(job_.index, k, int64_t(-1));
            }
            for (int k = 0; job_.moments && k < kMoments; ++k)
                put(job_.statistics, kStatistics + picks + k, neutral.moment[k]);
            for (int k = 0; job_.epilogue >= 0 && k < kCoefficients + picks; ++k) put(job_.coefficients, k, T(0));
            if (job_.epilogue >= 0) put(job_.loss, 0, T(0));
        }
        if (!job_.grad) return;
        S* const to = grad() + begin_;
        S zero;
        write(&zero, T(0));
        const int count = end_ - begin_;
        for (int i = thread_ * pack - phase(to); i < count; i += threads_ * pack) {
            if (i >= 0 && i + pack <= count) {
                Pack<S> x;
#pragma unroll
                for (int k = 0; k < pack; ++k) x.item[k] = zero;
                *reinterpret_cast<Pack<S>*>(to + i) = x;
            } else {
                for (int k = i < 0 ? 0 : i; k < i + pack && k < count; ++k) to[k] = zero;
            }
        }
    }

    const Launch& job_;
    Board<T>& board_;
    const int thread_, threads_, warp_, lane_;
    const int rank_, row_;
    const int target_;  // -1 where it is out of range
    const S* const logits_;
    const int phase_;
    const bool shared_;               // whether a thread looks at columns that another of its warp copied
    const int between_;               // columns from a warp's tile to its next
    const int round_, slots_;         // bytes of a round of the warps, and of all slots
    const int slots_end_, own_slot_;  // in shared memory: where they end, and the thread's first
    int begin_, end_;
};

// Three blocks share a multiprocessor, if registers for them do not have to be spilled.
template <typename S, typename Term, int Asked>
FUSEDLOSS_KERNEL void FUSEDLOSS_BLOCKS(kMaxThreads, sizeof(S) == 8 ? 2 : 3) row_pass(const Launch job) {
    RowPart<S, Term, Asked>(job).run();
}

template <typename S>
int shared_bytes(const Launch& job) {
    return static_cast<int>(sizeof(Board<decltype(read(S{}))>)) +
           job.slots * (job.threads * kItemBytes + job.threads / kWarp * 16);
}

// The same without a loss.
inline Launch of_statistics(Launch job) {
    job.kind = kRowEpilogue;
    job.epilogue = -1;
    job.grad = nullptr;
    return job;
}

template <typename S>
void run(Launch job) {
    if (job.kind == kClassTerm && job.moments) {
        // By a read of their own, so that not each class term has two kernels.
        run<S>(of_statistics(job));
        job.moments = kNoMoments;
    }
    const auto start = [&](auto kernel) {
        // The gradient alone needs nothing of the other parts.
        const int cluster = job.forward || job.sums ? job.parts : 1;
        launch(kernel, job.rows * job.parts, 1, cluster, job.threads, shared_bytes<S>(job), job.stream, job);
    };
    if (job.kind == kClassTerm) {
        with_functor(job.epilogue, ClassTerms{}, [&](auto term) { start(row_pass<S, decltype(term), kTop>); });
    } else if (job.moments) {
        start(row_pass<S, void, kEverything | kSums>);
    } else if (job.top_k > 0 || job.below || job.mean) {
        start(row_pass<S, void, kEverything>);
    } else {
        start(row_pass<S, void, 0>);
    }
}

}  // namespace fusedloss::cuda
