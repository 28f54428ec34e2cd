// The passes over rows of logits, as one kernel that does the first, the second, or both of one read:
//
//   forward    the row's statistics (an online softmax without the target's term), then the loss's epilogue on them.
//              A class term looks at the row a second time
//   gradient   the gradient of the row, which may take its place
//
// or, of a class term, the sums alone that the second look takes.
//
// A row is the work of `parts` blocks of a cluster, whose statistics merge through distributed shared memory. It passes
// through shared memory in tiles; where there are slots for all tiles of a part, the later looks find them there.
//
// Which thread looks at which column, and so the order of every sum, depends on the sizes alone: not on the row's
// address, nor on what else the launch does.
#pragma once

#include "job.h"
#include "merge.h"

namespace fusedloss {
namespace cuda {

// 16 bytes of logits.
template <typename S>
struct alignas(16) Pack {
    static constexpr int size = 16 / sizeof(S);
    S item[size];
};

// A column whose gradient is not the formula's.
template <typename T>
struct Exception {
    int column;
    T value;
};

// What the gradient of a row is made of.
template <typename T>
struct Settled {
    RowStatistics<T> s;
    T one, two, at_target;  // the coefficients
    int top, exceptions;
};

// A block's shared memory: where in it, in bytes, is what.
struct Layout {
    int slot, records, class_records, settled, logit, b, column, exceptions, size;

    template <typename T>
    static FUSEDLOSS_HD Layout of(int threads, int slots, int picks) {
        const int warps = threads / kWarp;
        Layout x;
        x.slot = threads * kItemBytes + 16;
        x.records = x.slot * slots;
        x.class_records = x.records + warps * int(sizeof(Partial<T>));
        x.settled = x.class_records + warps * int(sizeof(ClassPartial));
        x.column = x.settled + int(sizeof(Settled<T>) + 15) / 16 * 16;
        x.exceptions = x.column + picks * int(sizeof(int64_t));
        x.logit = x.exceptions + (picks + 2) * int(sizeof(Exception<T>));
        x.b = x.logit + picks * int(sizeof(T));
        x.size = x.b + picks * int(sizeof(T));
        return x;
    }
};

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
template <typename S, typename Term>
class RowPart {
    using T = decltype(read(S{}));
    static constexpr bool class_term = !std::is_void_v<Term>;
    static constexpr int items = kItemBytes / sizeof(S), pack = Pack<S>::size;

   public:
    FUSEDLOSS_DEVICE explicit RowPart(const Job& job)
        : job_(job),
          memory_(shared_memory()),
          thread_(thread_index()),
          threads_(job.threads),
          rank_(static_cast<int>(block_index() % job.parts)),
          row_(static_cast<int>(block_index() / job.parts)),
          target_(column_of(job.target[row_])) {
        const int packs = (job.classes + pack - 1) / pack;
        const int64_t columns = int64_t((packs + job.parts - 1) / job.parts) * pack;
        begin_ = at_most(rank_ * columns);
        end_ = at_most((rank_ + 1) * columns);
        tiles_ = (end_ - begin_ + threads_ * items - 1) / (threads_ * items);
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
        return index >= 0 && index < job_.classes ? static_cast<int>(index) : -1;
    }
    FUSEDLOSS_DEVICE int at_most(int64_t column) const {
        return static_cast<int>(column < job_.classes ? column : job_.classes);
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
    FUSEDLOSS_DEVICE const S* logits() const { return static_cast<const S*>(job_.logits) + row_ * job_.row_stride; }
    FUSEDLOSS_DEVICE S* grad() const { return static_cast<S*>(job_.grad) + row_ * job_.grad_row_stride; }
    FUSEDLOSS_DEVICE const T* class_weight() const { return static_cast<const T*>(job_.class_weight); }
    FUSEDLOSS_DEVICE T weight_of(int column) const { return class_weight() ? class_weight()[column] : T(1); }
    FUSEDLOSS_DEVICE T weight_of_target() const { return target_ >= 0 ? weight_of(target_) : T(1); }
    FUSEDLOSS_DEVICE T common(int k) const { return common_at<T>(job_.common, k); }
    FUSEDLOSS_DEVICE T upstream() const {
        return job_.upstream ? static_cast<const T*>(job_.upstream)[row_ * job_.upstream_stride] : T(1);
    }
    FUSEDLOSS_DEVICE Layout layout() const { return Layout::of<T>(job_.threads, job_.slots, job_.picks()); }
    template <typename X>
    FUSEDLOSS_DEVICE X* at(int offset) const {
        return reinterpret_cast<X*>(memory_ + offset);
    }
    FUSEDLOSS_DEVICE Settled<T>& settled() const { return *at<Settled<T>>(layout().settled); }
    FUSEDLOSS_DEVICE void sync() const { job_.parts > 1 ? cluster_sync() : block_sync(); }

    // Puts an output of the row, which all parts know.
    template <typename X>
    FUSEDLOSS_DEVICE void put(void* to, int k, X x) const {
        if (rank_ == 0) static_cast<X*>(to)[k * job_.rows + row_] = x;
    }

    // --- tiles ---

    struct Tile {
        int from, count;
        S* z;  // in shared memory, as far from a multiple of 16 bytes as the row in memory is
    };

    // Elements from the last multiple of 16 bytes.
    static FUSEDLOSS_DEVICE int phase(const S* address) {
        return static_cast<int>(reinterpret_cast<uintptr_t>(address) % 16 / sizeof(S));
    }

    FUSEDLOSS_DEVICE Tile tile(int i) const {
        const int from = begin_ + i * threads_ * items, rest = end_ - from;
        const int count = rest < threads_ * items ? rest : threads_ * items;
        const int slot = i < job_.slots ? i : i % job_.slots;
        return {from, count, at<S>(layout().slot * slot) + phase(logits() + from)};
    }

    // body(first, whole) for the packs of the columns that a thread moves, as they lie in that memory; `first` may be
    // before the first column.
    template <typename Body>
    FUSEDLOSS_DEVICE void over_packs(const S* memory, int count, const Body& body) const {
        for (int first = thread_ * pack - phase(memory); first < count; first += threads_ * pack) {
            body(first, first >= 0 && first + pack <= count);
        }
    }

    FUSEDLOSS_DEVICE void load(int i) const {
        const Tile to = tile(i);
        const S* const from = logits() + to.from;
        over_packs(from, to.count, [&](int first, bool whole) {
            if (whole) return copy_16_bytes(to.z + first, from + first);
            for (int k = first < 0 ? 0 : first; k < first + pack && k < to.count; ++k) to.z[k] = from[k];
        });
        // So that nobody who looks at the tile has to mind where the row ends.
        for (int k = to.count + thread_; k < threads_ * items; k += threads_) write(to.z + k, -kInfinity<T>);
    }

    // A logit that is accounted for elsewhere; for the thread that will look at it.
    FUSEDLOSS_DEVICE void leave_out(const Tile& tile, int column) const {
        const int i = column - tile.from;
        if (i >= 0 && i < tile.count && i % threads_ == thread_) write(tile.z + i, -kInfinity<T>);
    }

    // body(tile) for each, as they come from memory.
    template <typename Body>
    FUSEDLOSS_DEVICE void over_tiles(const Body& body) const {
        for (int i = 0; i < kStages - 1; ++i) {
            if (i < tiles_) load(i);
            commit_copies();
        }
        for (int i = 0; i < tiles_; ++i) {
            wait_copies<kStages - 2>();
            block_sync();  // all have it, and nobody looks at the one before any more
            if (i + kStages - 1 < tiles_) load(i + kStages - 1);
            commit_copies();
            body(tile(i));
        }
    }

    // The same once more.
    template <typename Body>
    FUSEDLOSS_DEVICE void over_tiles_again(const Body& body) const {
        if (!job_.forward || tiles_ > job_.slots) return over_tiles(body);
        for (int i = 0; i < tiles_; ++i) body(tile(i));
    }

    // The parts of all threads, merged; known to the first warp.
    template <typename Part>
    FUSEDLOSS_DEVICE Part gather(Part part, Part* records) const {
        part = merge_warp(part);
        const int warps = threads_ / kWarp, lane = thread_ % kWarp;
        if (lane == 0) records[thread_ / kWarp] = part;
        sync();
        if (thread_ >= kWarp) return part;
        Part all;
        for (int i = lane; i < warps * job_.parts; i += kWarp) {
            Part* const record = records + i % warps;
            merge(all, job_.parts > 1 ? *cluster_peer(record, i / warps) : *record);
        }
        return merge_warp(all);
    }

    // --- forward ---

    FUSEDLOSS_DEVICE void forward() {
        const T target_logit = target_ >= 0 ? read(logits()[target_]) : kNaN<T>;
        // Some logit, so that a common offset takes no digits from the sum.
        const T first = job_.mean ? read(logits()[0]) : T(0);
        const T reference = first - first == T(0) ? first : T(0);
        Partial<T> part;
        over_tiles([&](const Tile& tile) { scan(tile, target_logit, reference, part); });
        part = gather(part, at<Partial<T>>(layout().records));
        if (thread_ == 0) {
            merge(part, of_target(target_logit, reference));
            find_statistics(part, target_logit, reference);
        }
        if constexpr (class_term) {
            block_sync();
            const Settled<T>& x = settled();
            const T max = x.s.max, inverse = T(1) / x.s.sum_exp;
            const int top = x.top;
            ClassPartial sums;
            const Params params = this->params();
            over_tiles_again([&](const Tile& tile) { sweep(tile, max, inverse, top, params.value, sums); });
            sums = gather(sums, at<ClassPartial>(layout().class_records));
            if (thread_ == 0) finish_class_term(sums);
        } else if (thread_ == 0 && job_.epilogue >= 0) {
            finish();
        }
        if (thread_ == 0 && job_.grad) list_exceptions();
        sync();  // nobody looks at this row's logits or this block's memory any more
    }

    // The target is no part of `rest`, and so of no thread's columns.
    FUSEDLOSS_DEVICE Partial<T> of_target(T logit, T reference) const {
        Partial<T> part;
        if (job_.mean) part.mean = (logit - reference) * weight_of_target();
        if (logit == logit) {
            part.max = logit;
            part.top = {logit, target_};
        }
        return part;
    }

    FUSEDLOSS_DEVICE void scan(const Tile& tile, T target_logit, T reference, Partial<T>& part) const {
        leave_out(tile, target_);
        T z[items], max = -kInfinity<T>;
#pragma unroll
        for (int k = 0; k < items; ++k) {
            z[k] = read(tile.z[thread_ + k * threads_]);
            max = larger(max, z[k]);
        }
        if (max > part.max) {
            part.rest *= std::exp(part.max - max);
            part.max = max;
        }
        const T base = finite_max(part.max);
        T rest = 0, mean = 0;
#pragma unroll
        for (int k = 0; k < items; ++k) rest += fast_exp(z[k] - base);
        part.rest += rest;
        if (job_.mean) {
#pragma unroll
            for (int k = 0; k < items; ++k) {
                const int i = thread_ + k * threads_;
                if (i < tile.count && tile.from + i != target_) mean += (z[k] - reference) * weight_of(tile.from + i);
            }
            part.mean += mean;
        }
        if (job_.top_k > 0 && part.worth_a_look(max, job_.top_k)) {
#pragma unroll
            for (int k = 0; k < items; ++k) {
                const int i = thread_ + k * threads_;
                if (i < tile.count && tile.from + i != target_ && z[k] == z[k])
                    insert(part.top, part.second, Best<T>{z[k], tile.from + i});
            }
        }
        if (job_.below) {
#pragma unroll
            for (int k = 0; k < items; ++k) {
                if (z[k] < target_logit && z[k] > part.below.value) {
                    part.below = {z[k], tile.from + thread_ + k * threads_};
                }
            }
        }
    }

    FUSEDLOSS_DEVICE void find_statistics(const Partial<T>& part, T target_logit, T reference) {
        Settled<T>& x = settled();
        RowStatistics<T>& s = x.s;
        T* const logit = at<T>(layout().logit);
        int64_t* const column = at<int64_t>(layout().column);
        int k = 0;
        const auto pick = [&](T value, int64_t index) {
            put(job_.statistics, kStatistics + k, logit[k] = value);
            put(job_.index, k, column[k] = index);
            ++k;
        };
        // A row of NaN alone has no largest logit; its loss is NaN, and any index will do.
        x.top = part.top.column < 0 ? 0 : part.top.column;
        if (job_.top_k > 0) pick(part.top.value, x.top);
        if (job_.top_k > 1) pick(part.second.value, part.second.column);
        if (job_.below) pick(part.below.value, part.below.column);
        for (int c = 0; c < job_.candidate_count; ++c) {
            const int64_t index = job_.candidates[int64_t(row_) * job_.candidate_count + c];
            const int column = column_of(index);
            if (column < 0) target_logit = kNaN<T>;
            pick(column < 0 ? -kInfinity<T> : read(logits()[column]), index);
        }
        s.target = target_;
        s.picks = k;
        s.pick_logit = logit;
        s.pick_index = column;

        s.max = finite_max(part.max);
        const T rest = T(part.rest), mine = std::exp(target_logit - s.max);
        s.sum_exp = rest + mine;
        s.log_sum = std::log(s.sum_exp);
        s.q = rest / s.sum_exp;
        s.p = mine / s.sum_exp;
        s.ce = rest < mine ? std::log1p(rest / mine) : (s.max - target_logit) + s.log_sum;
        if (s.sum_exp == T(0)) {  // no finite logit at all
            s.q = T(1);
            s.p = T(0);
            s.ce = kInfinity<T>;
        }
        s.mean_ce = T(0);
        if (job_.mean) {
            const double sum_ce = weight_sum() * (double(s.log_sum) + (double(s.max) - reference)) - part.mean;
            s.mean_ce = T(sum_ce / double(job_.classes));
        }
        const T values[kStatistics] = {s.max, s.sum_exp, s.q, s.ce, target_logit, s.mean_ce};
#pragma unroll
        for (int i = 0; i < kStatistics; ++i) put(job_.statistics, i, values[i]);
    }

    FUSEDLOSS_DEVICE double weight_sum() const { return job_.weight_sum ? *job_.weight_sum : double(job_.classes); }

    FUSEDLOSS_DEVICE void finish() {
        Settled<T>& x = settled();
        const RowStatistics<T>& s = x.s;
        RowGradient<T> g;
        g.b = at<T>(layout().b);
        for (int k = 0; k < s.picks; ++k) g.b[k] = T(0);
        run_epilogue(job_.epilogue, s, params().value, g, RowEpilogues{});
        const T weight = weight_of_target(), smooth = common(kSmooth);
        const Shared<T> shared = {common(kMain), smooth, common(kZLoss), T(weight_sum())};
        apply_shared(s, shared, weight, job_.classes, g);
        put_coefficients(g.loss, g.a, smooth, g.d - g.a * s.q - smooth * weight);
        for (int k = 0; k < s.picks; ++k) put(job_.coefficients, kCoefficients + k, g.b[k]);
    }

    FUSEDLOSS_DEVICE void put_coefficients(T loss, T one, T two, T at_target) {
        Settled<T>& x = settled();
        put(job_.loss, 0, loss);
        put(job_.coefficients, 0, x.one = one);
        put(job_.coefficients, 1, x.two = two);
        put(job_.coefficients, 2, x.at_target = at_target);
    }

    // Of the columns that are neither the target nor the top class, which are singled out.
    FUSEDLOSS_DEVICE void sweep(const Tile& tile, T max, T inverse, int top, const T* params,
                                ClassPartial& sums) const {
        leave_out(tile, target_);
        leave_out(tile, top);
        const T exponent = Term::exponent(params);
        T rest = 0, loss = 0, slope = 0;
#pragma unroll 4
        for (int i = thread_; i < tile.count; i += threads_) {
            const T e = fast_exp(read(tile.z[i]) - max), p = e * inverse, weight = weight_of(tile.from + i);
            T g;
            const T f = negative_term<Term>(p, exponent, params, g);
            rest += e;
            loss += f * weight;
            slope += p * (g * weight);
        }
        sums.rest += rest;
        sums.loss += loss;
        sums.slope += slope;
    }

    FUSEDLOSS_DEVICE void term_sums() {
        ClassPartial sums;
        if (job_.target[row_] != kIgnored) {
            const T* const statistic = static_cast<const T*>(job_.statistics) + row_;
            const T max = statistic[kMax * job_.rows], inverse = T(1) / statistic[kSumExp * job_.rows];
            const int top = column_of(job_.index[row_]);
            const Params params = this->params();
            over_tiles([&](const Tile& tile) { sweep(tile, max, inverse, top, params.value, sums); });
            sums = gather(sums, at<ClassPartial>(layout().class_records));
        }
        if (thread_ == 0) {
            put(job_.sums, 0, sums.loss);
            put(job_.sums, 1, sums.slope);
        }
        sync();  // nobody looks at this block's memory any more
    }

    FUSEDLOSS_DEVICE void finish_class_term(const ClassPartial& sums) {
        Settled<T>& x = settled();
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
            loss += Term::positive(target_p, q, power_pair(q, exponent), target_weight, params, h);
            target_g = h / q;
            slope += double(target_p) * target_g;
        }
        // The top class's 1 - p comes from the others' sum. Its logit is the maximum; 1 - q would lose digits where the
        // row is flat.
        const T top_q = T(rest) * inverse, top_p = inverse;
        if (is_top) {
            loss += Term::positive(top_p, top_q, power_pair(top_q, exponent), target_weight, params, h);
        } else {
            const T weight = weight_of(x.top);
            loss += weight * Term::negative(top_p, top_q, Power<T>{power(top_q, exponent), T(0)}, params, h);
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
            Settled<T>& x = settled();
            x.s.max = statistic[kMax * n];
            x.s.sum_exp = statistic[kSumExp * n];
            x.s.picks = job_.picks();
            x.one = coefficient[0];
            x.two = coefficient[n];
            x.at_target = coefficient[2 * n];
            x.top = class_term ? column_of(job_.index[row_]) : -1;
            for (int k = 0; !class_term && k < x.s.picks; ++k) {
                at<T>(layout().logit)[k] = statistic[(kStatistics + k) * n];
                at<T>(layout().b)[k] = coefficient[(kCoefficients + k) * n];
                at<int64_t>(layout().column)[k] = job_.index[k * n + row_];
            }
            list_exceptions();
        }
        block_sync();
    }

    FUSEDLOSS_DEVICE void list_exceptions() {
        Settled<T>& x = settled();
        const T scale = upstream();
        Exception<T>* const exceptions = at<Exception<T>>(layout().exceptions);
        int count = 0;
        exceptions[count++] = {target_, x.at_target * scale};
        if constexpr (class_term) {
            exceptions[count++] = {x.top, x.two * scale};
        } else {
            const T a = x.one / x.s.sum_exp * scale, u = x.two * scale;
            for (int k = 0; k < x.s.picks; ++k) {
                const int column = column_of(at<int64_t>(layout().column)[k]);
                const T b = at<T>(layout().b)[k] * scale;
                if (column < 0 || b == T(0)) continue;
                int i = 0;
                while (i < count && exceptions[i].column != column) ++i;
                if (i == count) {
                    const T p = a * std::exp(at<T>(layout().logit)[k] - x.s.max);
                    exceptions[count++] = {column, u == T(0) ? p : p - u * weight_of(column)};
                }
                exceptions[i].value -= b;
            }
        }
        x.exceptions = count;
    }

    FUSEDLOSS_DEVICE void gradient() const {
        const Settled<T>& x = settled();
        const T max = x.s.max, inverse = T(1) / x.s.sum_exp, scale = upstream();
        if constexpr (class_term) {
            const Params params = this->params();
            const T exponent = Term::exponent(params.value), shift = x.one;
            write_rows([&](T z, int column) {
                const T p = fast_exp(z - max) * inverse;
                T g;
                negative_term<Term>(p, exponent, params.value, g);
                return p * (g * weight_of(column) - shift) * scale;
            });
        } else {
            const T a = x.one * inverse * scale, u = x.two * scale;
            if (class_weight() && u != T(0)) {
                write_rows([&](T z, int column) { return a * fast_exp(z - max) - u * class_weight()[column]; });
            } else {
                write_rows([&](T z, int) { return a * fast_exp(z - max) - u; });
            }
        }
        block_sync();
        const Exception<T>* const exceptions = at<Exception<T>>(layout().exceptions);
        for (int k = thread_; k < x.exceptions; k += threads_) {
            const int column = exceptions[k].column;
            if (column >= begin_ && column < end_) write(grad() + column, exceptions[k].value);
        }
    }

    // grad = formula(logit, column)
    template <typename Formula>
    FUSEDLOSS_DEVICE void write_rows(const Formula& formula) const {
        over_tiles_again([&](const Tile& tile) {
            S* const to = grad() + tile.from;
            const bool together = phase(to) == phase(tile.z);
            over_packs(to, tile.count, [&](int first, bool whole) {
                if (whole) {
                    Pack<S> x;
                    if (together) {
                        x = *reinterpret_cast<const Pack<S>*>(tile.z + first);
                    } else {
#pragma unroll
                        for (int k = 0; k < pack; ++k) x.item[k] = tile.z[first + k];
                    }
#pragma unroll
                    for (int k = 0; k < pack; ++k) {
                        write(&x.item[k], formula(read(x.item[k]), tile.from + first + k));
                    }
                    *reinterpret_cast<Pack<S>*>(to + first) = x;
                } else {
                    for (int k = first < 0 ? 0 : first; k < first + pack && k < tile.count; ++k) {
                        write(to + k, formula(read(tile.z[k]), tile.from + k));
                    }
                }
            });
        });
    }

    // An ignored row is not looked at. It gets the statistics of two equal logits, one of them the target, so that a
    // user's loss function sees nothing that is not finite, and loss, coefficients and gradient of zero.
    FUSEDLOSS_DEVICE void ignore() const {
        const int picks = job_.picks();
        if (thread_ == 0 && job_.forward) {
            const T log2 = T(0.6931471805599453);
            const T neutral[kStatistics] = {T(0), T(2), T(0.5), log2, T(0), log2};
#pragma unroll
            for (int k = 0; k < kStatistics; ++k) put(job_.statistics, k, neutral[k]);
            for (int k = 0; k < picks; ++k) {
                put(job_.statistics, kStatistics + k, T(0));
                put(job_.index, k, int64_t(-1));
            }
            for (int k = 0; job_.epilogue >= 0 && k < kCoefficients + picks; ++k) put(job_.coefficients, k, T(0));
            if (job_.epilogue >= 0) put(job_.loss, 0, T(0));
        }
        if (!job_.grad) return;
        S* const to = grad() + begin_;
        S zero;
        write(&zero, T(0));
        over_packs(to, end_ - begin_, [&](int first, bool whole) {
            if (whole) {
                Pack<S> x;
#pragma unroll
                for (int k = 0; k < pack; ++k) x.item[k] = zero;
                *reinterpret_cast<Pack<S>*>(to + first) = x;
            } else {
                for (int k = first < 0 ? 0 : first; k < first + pack && begin_ + k < end_; ++k) to[k] = zero;
            }
        });
    }

    const Job& job_;
    char* const memory_;
    const int thread_, threads_, rank_;
    const int row_;
    const int target_;  // -1 where it is out of range
    int begin_, end_, tiles_;
};

// Three blocks share a multiprocessor, if registers for them do not have to be spilled.
template <typename S, typename Term>
FUSEDLOSS_KERNEL void FUSEDLOSS_BLOCKS(kMaxThreads, sizeof(S) == 8 || !std::is_void_v<Term> ? 2 : 3)
    row_pass(const Job job) {
    RowPart<S, Term>(job).run();
}

// Calls visit with a null pointer to the class term of that number, of void for -1.
template <typename Visit, typename... Terms>
void with_term(int number, const Visit& visit, FunctorList<Terms...>) {
    int k = 0;
    if (number < 0) return visit(static_cast<void*>(nullptr));
    (void)((k++ == number && (visit(static_cast<Terms*>(nullptr)), true)) || ...);
}

template <typename S>
int shared_bytes(const Job& job) {
    return Layout::of<decltype(read(S{}))>(job.threads, job.slots, job.picks()).size;
}

template <typename S>
void run(const Job& job) {
    const int bytes = shared_bytes<S>(job);
    with_term(
        job.class_term ? job.epilogue : -1,
        [&](auto* term) {
            using Term = std::remove_pointer_t<decltype(term)>;
            // The gradient alone needs nothing of the other parts.
            const int cluster = job.forward || job.sums ? job.parts : 1;
            launch(row_pass<S, Term>, job.rows * job.parts, 1, cluster, job.threads, bytes, job.stream, job);
        },
        ClassTerms{});
}

}  // namespace cuda
}  // namespace fusedloss
