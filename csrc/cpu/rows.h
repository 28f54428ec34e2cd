// Access to a job's rows, and the loops over them: over rows and the chunks of a row on threads, over the columns of a
// row a vector at a time. Rows is the base of every pass.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "partial.h"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

constexpr int64_t kBlock = 2048;        // columns looked at together: 8 KB of float stay in the L1 cache
constexpr int64_t kChunk = 4 * kBlock;  // columns of one partial statistic
constexpr int64_t kNarrow = 64;         // columns of rows that are looked at side by side, one in each lane

// Of a loop over columns: whether it takes them one after the other.
constexpr std::true_type kInOrder{};
constexpr std::false_type kAnyOrder{};

// A column whose gradient is not the formula's.
template <typename T>
struct Exception {
    int64_t column;
    T value;
};

// What a thread needs for a row beside the stack.
template <typename T>
struct Scratch {
    std::vector<T> pick_logit, b;
    std::vector<int64_t> pick_index;
    std::vector<Exception<T>> exceptions;  // room for every pick, the target and the top class
    std::vector<Powers<T>> powers;         // of each block, for a class term without weights and moments; else empty
    std::vector<T> kept;                   // p and h of a pair term, where a gradient follows; else empty

    explicit Scratch(int picks) : pick_logit(picks), b(picks), pick_index(picks), exceptions(picks + 2) {}
};

template <typename S>
class Rows {
   public:
    explicit Rows(const Job& job) : job_(job), factor_(common_at<T>(job.common, kLogits)) {}

   protected:
    using T = typename ComputeOf<S>::type;
    using V = typename VectorOf<T>::Value;
    using Bits = typename VectorOf<T>::Bits;
    static constexpr int width = VectorOf<T>::width;

    // What the job holds, of a row or of all.
    T logit(const S* z) const { return rounded_product(read(z), factor_); }
    // A branch that is always the same takes less of the arithmetic's time than a product.
    FUSEDLOSS_INLINE V tempered(V z) const { return factor_ == T(1) ? z : rounded_product(z, factor_); }
    const S* logits(int64_t row) const { return static_cast<const S*>(job_.logits) + row * job_.row_stride; }
    const S* limit() const { return logits(job_.rows - 1) + job_.classes; }
    const T* class_weight() const { return static_cast<const T*>(job_.class_weight); }
    T weight_of(int64_t column) const { return class_weight() && column >= 0 ? class_weight()[column] : T(1); }
    T upstream_of(int64_t row) const {
        return job_.upstream ? static_cast<const T*>(job_.upstream)[row * job_.upstream_stride] : T(1);
    }
    bool ignored(int64_t row) const { return job_.target[row] == kIgnored; }
    double weight_sum() const { return job_.weight_sum ? *job_.weight_sum : double(job_.classes); }
    T common(int k) const { return common_at<T>(job_.common, k); }

    // [rows]
    T* statistic(int k) const { return static_cast<T*>(job_.statistics) + k * job_.rows; }
    T* coefficient(int k) const { return static_cast<T*>(job_.coefficients) + k * job_.rows; }
    T* second_statistic(int k) const {
        return statistic(kStatistics + job_.picks() + (job_.moments ? kMoments : 0) + k);
    }
    T* losses() const { return static_cast<T*>(job_.loss); }

    int64_t chunks() const { return (job_.classes + kChunk - 1) / kChunk; }

    void params_of(int64_t row, T* params) const {
        for (int k = 0; k < kMaxParams && job_.param[k]; ++k) {
            params[k] = static_cast<const T*>(job_.param[k])[row * job_.param_stride[k]];
        }
    }

    Shared<T> shared() const { return {common(kMain), common(kSmooth), common(kZLoss), T(weight_sum())}; }

    // L = w z_loss lse^2, to which a term adds; returns the slope: dL/dz_j = slope p_j.
    T add_z_loss(const RowStatistics<T>& s, T weight, T* loss) const {
        const T lse = s.max + s.log_sum;
        const T factor = common(kZLoss) * weight;
        *loss = factor != T(0) ? factor * lse * lse : T(0);
        return factor != T(0) ? T(2) * factor * lse : T(0);
    }

    int threads_for(int64_t rows) const {
        // in elements: less work than a grain is not worth a thread
        constexpr int64_t grain = 16384, row_cost = 64;
        const int64_t useful = rows * (job_.classes + row_cost) / grain + 1;
        return static_cast<int>(std::min<int64_t>(threads_of(job_.threads), useful));
    }

    // each(row, threads, scratch): rows in parallel, or the chunks of a row where there are few rows.
    template <typename Each>
    void over_rows(const Each& each) const {
        const int threads = threads_for(job_.rows);
        const auto part = [&](int64_t begin, int64_t end, int threads_of_row) {
            Scratch<T> scratch(job_.picks());
            for (int64_t row = begin; row < end; ++row) each(row, threads_of_row, scratch);
        };
        if (job_.rows < 2 * threads && chunks() > 1) return part(0, job_.rows, threads);
        parallel_for(job_.rows, threads, [&](int64_t begin, int64_t end) { part(begin, end, 1); });
    }

    // Folds scan(begin, end) over the chunks of a row, from left to right.
    template <typename Scan>
    auto fold(int threads, const Scan& scan) const {
        const auto chunk = [&](int64_t i) { return scan(i * kChunk, std::min((i + 1) * kChunk, job_.classes)); };
        if (threads == 1) {
            auto sum = chunk(0);
            for (int64_t i = 1; i < chunks(); ++i) merge(sum, chunk(i));
            return sum;
        }
        std::vector<decltype(chunk(0))> parts(chunks());
        parallel_for(chunks(), threads, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) parts[i] = chunk(i);
        });
        for (int64_t i = 1; i < chunks(); ++i) merge(parts[0], parts[i]);
        return parts[0];
    }

    // body(begin, end) of the columns of a row, in parallel.
    template <typename Body>
    void over_chunks(int threads, const Body& body) const {
        if (threads == 1) return body(int64_t(0), job_.classes);
        parallel_for(chunks(), threads,
                     [&](int64_t begin, int64_t end) { body(begin * kChunk, std::min(end * kChunk, job_.classes)); });
    }

    // A lag of -inf, whose exponential is 0, as a number: its product with that and a slope is 0.
    static V bounded(V lag) { return greater(lag, splat(kLeastLag<T>)); }

    V load_weight(int64_t column, int size) const {
        const T* const weight = class_weight() + column;
        return size == width ? load(weight) : load_part(weight, size, T(0), class_weight() + job_.classes);
    }

    // body(logits, first column, columns) for each vector of the columns; beyond them it is -inf. Out of order, where
    // that is faster, the vectors of a pair begin at the same column. Returns the column at whose vector a body that
    // returns something, which takes them in order, returned false.
    template <typename Order, typename Body>
    FUSEDLOSS_INLINE int64_t each_vector(Order, const S* z, int64_t count, const Body& body) const {
        const auto take = [&](V x, int64_t at, int size) {
            if constexpr (std::is_void_v<decltype(body(x, at, size))>) {
                body(x, at, size);
                return true;
            } else {
                static_assert(Order::value, "of a pair one may be done");
                return body(x, at, size);
            }
        };
        int64_t at = 0;
        if constexpr (!Order::value && kPairs<S>) {
            for (; at + 2 * width <= count; at += 2 * width) {
                prefetch_after(z + at);
                const Pair x = load_pair(z + at);
                take(tempered(x.even), at, width);
                take(tempered(x.odd), at, width);
            }
        }
        for (; at + width <= count; at += width) {
            prefetch_after(z + at);
            if (!take(tempered(load(z + at)), at, width)) return at;
        }
        const int rest = static_cast<int>(count - at);
        if (rest > 0 && !take(tempered(load_part(z + at, rest, -kInfinity<T>, limit())), at, rest)) return at;
        return count;
    }

    // grad[column] = formula(logits, column, columns), a vector at a time; the two may be the same memory. Returns the
    // column before which nothing was written, where after a formula stop() is true.
    template <typename Order, typename Formula, typename Stop = std::false_type>
    FUSEDLOSS_INLINE int64_t transform(Order, const S* z, S* grad, int64_t begin, int64_t end, const Formula& formula,
                                       const Stop& stop = {}) const {
        int64_t column = begin;
        if constexpr (!Order::value && kPairs<S>) {
            for (; column + 2 * width <= end; column += 2 * width) {
                prefetch_after(z + column);
                const Pair x = load_pair(z + column);
                const auto even = formula(tempered(x.even), column, width),
                           odd = formula(tempered(x.odd), column, width);
                if (stop()) return column;
                store_pair(grad + column, even, odd);
            }
        }
        for (; column + width <= end; column += width) {
            prefetch_after(z + column);
            const auto x = formula(tempered(load(z + column)), column, width);
            if (stop()) return column;
            store(grad + column, x);
        }
        if (column < end) {
            const int rest = static_cast<int>(end - column);
            const auto x = formula(tempered(load_part(z + column, rest, -kInfinity<T>, limit())), column, rest);
            if (stop()) return column;
            store_part(grad + column, rest, x);
        }
        return end;
    }

    const Job& job_;
    const T factor_;  // of the logits
};

}  // namespace
}  // namespace fusedloss::FUSEDLOSS_ISA
