// The statistics of a row: each block of columns is read once, by an online softmax without the target's term. A block
// that holds a pick is read once more, for its column.
#pragma once

#include "rows.h"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

constexpr int64_t kProbe = 256;  // columns whose largest logit is taken for about the largest of a chunk

template <typename S>
class StatisticsPass : public Rows<S> {
    using Base = Rows<S>;
    using Base::bounded, Base::each_vector, Base::fold;
    using Base::job_, Base::width, Base::logit, Base::logits, Base::class_weight, Base::load_weight, Base::statistic;
    using typename Base::T, typename Base::V, typename Base::Bits;

   public:
    using Base::Base;

    // Those of a row without its picks.
    FUSEDLOSS_ONE_COPY RowStatistics<T> softmax_of(int64_t row, int threads, int64_t target) const {
        const S* z = logits(row);
        const T target_logit = logit(z + target);
        const Partial<T> part = fold(threads, [&](int64_t begin, int64_t end) {
            return scan(z, begin, end, target, target_logit, T(0), nullptr);
        });
        return summary(part, target, target_logit);
    }

    FUSEDLOSS_ONE_COPY RowStatistics<T> statistics(int64_t row, int threads, Scratch<T>& scratch) const {
        const S* z = logits(row);
        const int64_t target = job_.target[row];
        const T target_logit = logit(z + target);
        const T first = logit(z);
        const T reference = std::isfinite(first) ? first : T(0);
        Powers<T>* const powers = scratch.powers.empty() ? nullptr : scratch.powers.data();
        const Partial<T> part = fold(threads, [&](int64_t begin, int64_t end) {
            return scan(z, begin, end, target, target_logit, reference, powers);
        });
        RowStatistics<T> s = summary(part, target, target_logit);
        const double sum_ce = this->weight_sum() * (double(s.log_sum) + (double(s.max) - reference)) - part.mean;
        s.mean_ce = job_.mean ? T(sum_ce / double(job_.classes)) : T(0);

        const T values[kStatistics] = {s.max, s.sum_exp, s.q, s.ce, target_logit, s.mean_ce};
        for (int i = 0; i < kStatistics; ++i) statistic(i)[row] = values[i];
        int k = 0;
        const auto pick = [&](T logit, int64_t index) {
            scratch.pick_logit[k] = statistic(kStatistics + k)[row] = logit;
            scratch.pick_index[k] = job_.index[k * job_.rows + row] = index;
            ++k;
        };
        const int64_t top = job_.top_k > 0 ? column_of(z, part.top) : -1;
        // A row of NaN alone has no largest logit; its loss is NaN, and any index will do.
        if (job_.top_k > 0) pick(part.top.value, std::max<int64_t>(top, 0));
        if (job_.top_k > 1) pick(part.second.value, column_of(z, part.second, top));
        if (job_.below) pick(part.below.value, column_of(z, part.below));
        for (int c = 0; c < job_.candidate_count; ++c) {
            const int64_t index = job_.candidates[row * job_.candidate_count + c];
            pick(logit(z + index), index);
        }
        if (job_.moments) put_moments(part.sums, double(s.sum_exp), statistic(kStatistics + k) + row);
        s.picks = k;
        s.pick_logit = scratch.pick_logit.data();
        s.pick_index = scratch.pick_index.data();
        return s;
    }

    // 1 - p of a row's top class, for which only p > 0.5 needs a look at the other classes.
    T top_rest(int64_t row) const {
        const int64_t top = job_.index[row];
        if (top == job_.target[row]) return statistic(kQ)[row];
        const S* z = logits(row);
        const T max = statistic(kMax)[row], sum_exp = statistic(kSumExp)[row];
        if (sum_exp >= T(2)) return T(1) - T(1) / sum_exp;
        double rest = 0;
        for (int64_t from = 0; from < job_.classes; from += kBlock) {
            rest += sum_block<kNoMoments>(z, from, std::min(kBlock, job_.classes - from), top, max, T(0)).rest;
        }
        return T(rest) / sum_exp;
    }

   private:
    // Those of the softmax alone.
    RowStatistics<T> summary(const Partial<T>& part, int64_t target, T target_logit) const {
        RowStatistics<T> s;
        s.max = finite_max(part.max);
        s.target = target;
        const T rest = T(part.rest), mine = std::exp(target_logit - s.max);
        s.sum_exp = rest + mine;
        s.log_sum = std::log(s.sum_exp);
        const bool none = s.sum_exp == T(0);  // no finite logit at all
        s.q = none ? T(1) : rest / s.sum_exp;
        s.p = none ? T(0) : mine / s.sum_exp;
        s.ce = none ? kInfinity<T> : rest < mine ? std::log1p(rest / mine) : (s.max - target_logit) + s.log_sum;
        return s;
    }

    void put_moments(const Sums& x, double sum_exp, T* moment) const {
        const bool all = job_.moments == kAllMoments;
        const double total = all ? x.low + x.ties : sum_exp, excess = x.excess / total;
        const double entropy = all ? std::log1p(x.low + (x.ties - 1)) - excess : 0;
        const double values[kMoments] = {entropy, excess, x.square / (total * total)};
        for (int k = 0; k < kMoments; ++k) {
            moment[k * job_.rows] = sum_exp > 0 ? T(values[k]) : std::numeric_limits<T>::quiet_NaN();
        }
    }

    FUSEDLOSS_ONE_COPY Partial<T> scan(const S* z, int64_t begin, int64_t end, int64_t target, T target_logit,
                                       T reference, Powers<T>* powers) const {
        Partial<T> part;
        part.moments = job_.moments;
        if (job_.moments == kAllMoments) {
            for (int64_t from = begin; from < end; from += kBlock) {
                const int64_t count = std::min(kBlock, end - from);
                Partial<T> block = sum_block<kAllMoments>(z, from, count, target, max_of(z + from, count), reference);
                block.top = part.top, block.second = part.second, block.below = part.below;
                keep_picks(z + from, from, count, block.max, target_logit, block);
                part.top = part.second = part.below = kNone<T>;
                merge(part, block);
            }
            return part;
        }
        // Exponentials are taken relative to some logit, at most kSlack below the largest so far: so each block is read
        // once, for its maximum and its sum together.
        T base = -kInfinity<T>;
        for (int64_t from = begin; from < end; from += kBlock) {
            const int64_t count = std::min(kBlock, end - from);
            if (base == -kInfinity<T>) base = max_of(z + from, std::min(count, kProbe));
            const auto sum = [&] {
                if (powers) return sum_block<kPowers>(z, from, count, target, base, reference, powers + from / kBlock);
                return job_.moments ? sum_block<kPowerAlone>(z, from, count, target, base, reference)
                                    : sum_block<kNoMoments>(z, from, count, target, base, reference);
            };
            Partial<T> sums = sum();
            if (sums.max > base + kSlack) {
                if (part.rest != 0) rescale(part, double(base) - double(sums.max));
                base = sums.max;
                sums = sum();
            }
            part.max = std::max(part.max, sums.max);
            part.rest += sums.rest;
            part.mean += sums.mean;
            part.sums.square += sums.sums.square;
            keep_picks(z + from, from, count, sums.max, target_logit, part);
        }
        if (part.max != base && part.rest != 0) rescale(part, double(base) - double(part.max));
        return part;
    }

    static void rescale(Partial<T>& part, double lag) {
        const double factor = std::exp(lag);
        part.rest *= factor;
        part.sums.square *= factor * factor;
    }

    // Of a block, relative to the base in place of the largest logit; moments where the base is that.
    template <int Moments>
    Partial<T> sum_block(const S* z, int64_t from, int64_t count, int64_t target, T base, T reference,
                         Powers<T>* powers = nullptr) const {
        base = finite_max(base);
        const bool target_here = target >= from && target < from + count;
        const int hole = target_here ? static_cast<int>(target - from) : -1;
        if constexpr (Moments != kPowers) {
            if (job_.mean) {
                return target_here || class_weight()
                           ? sum_columns<true, true, Moments>(z, from, count, hole, base, reference, powers)
                           : sum_columns<true, false, Moments>(z, from, count, hole, base, reference, powers);
            }
        }
        return target_here ? sum_columns<false, true, Moments>(z, from, count, hole, base, reference, powers)
                           : sum_columns<false, false, Moments>(z, from, count, hole, base, reference, powers);
    }

    // The hole (the target's column in the block, or -1) and class weights need the columns in order.
    template <bool Mean, bool InOrder, int Moments>
    Partial<T> sum_columns(const S* z, int64_t from, int64_t count, int hole, T base, T reference,
                           Powers<T>* powers) const {
        V max = splat(-kInfinity<T>), rest = splat(T(0)), mean = splat(T(0));
        V low = rest, ties = rest, excess = rest, square = rest, power[kTerms<T>] = {};
        Bits to_hole = lanes<T>() - hole;
        each_vector(std::bool_constant<InOrder>{}, z + from, count, [&](V x, int64_t at, int size) {
            max = greater(x, max);
            V e = exp_bounded<T>(x - base);
            if (Moments == kPowerAlone) square += e * e;
            if (Moments == kAllMoments) {
                const auto largest = x == base;
                const V below = largest ? V{} : e;
                low += below;
                ties += largest ? splat(T(1)) : V{};
                excess += below * bounded(x - base);
                square += below * below;
            }
            if (InOrder) {
                e = to_hole == 0 ? V{} : e;
                to_hole += width;
            }
            if (Moments == kPowers) {
                add_powers<T>(e, e, power);
            } else {
                rest += e;
            }
            if (Mean) {
                V ce = x - reference;
                if (InOrder && class_weight()) ce *= load_weight(from + at, size);
                mean += size == width ? ce : lanes<T>() < size ? ce : V{};
            }
        });
        Partial<T> sums{largest<T>(max), total<T>(Moments == kPowers ? power[0] : rest), total<T>(mean), {}};
        if (Moments == kPowerAlone) sums.sums.square = total<T>(square);
        if (Moments == kPowers) {
            *powers = {sums.max, base, T(sums.rest), {}};
            for (int k = 0; k < kTerms<T>; ++k) powers->sum[k] = total<T>(power[k]);
        }
        if (Moments == kAllMoments) {
            sums.sums = {total<T>(low), total<T>(ties), total<T>(excess), total<T>(square) + total<T>(ties)};
        }
        return sums;
    }

    // Top, second and below are kept as values and the blocks that hold them.
    void keep_picks(const S* z, int64_t from, int64_t count, T max, T target_logit, Partial<T>& part) const {
        const Best<T>& least = job_.top_k > 1 ? part.second : part.top;
        if (job_.top_k > 0 && (least.index < 0 || max > least.value)) {
            insert(part.top, part.second, {max, from});
            if (job_.top_k > 1) {
                const int hole = static_cast<int>(find(z, count, max));
                const auto others = [&](V x, int64_t at) {
                    return lanes<T>() == hole - static_cast<int>(at) ? splat(-kInfinity<T>) : x;
                };
                insert(part.top, part.second, {max_of(kInOrder, z, count, others), from});
            }
        }
        if (job_.below) {
            const T below =
                max_of(kAnyOrder, z, count, [&](V x, int64_t) { return x < target_logit ? x : splat(-kInfinity<T>); });
            if (below > part.below.value) part.below = {below, from};
        }
    }

    // The column of a kept pick that is not `but`; negative if there is none.
    int64_t column_of(const S* z, const Best<T>& pick, int64_t but = -1) const {
        if (pick.index < 0) return -1;
        const int64_t count = std::min(kBlock, job_.classes - pick.index);
        int64_t column = find(z + pick.index, count, pick.value);
        if (column >= 0 && pick.index + column == but) {
            const int64_t next = column + 1;
            column = find(z + but + 1, count - next, pick.value);
            if (column >= 0) column += next;
        }
        return column < 0 ? -1 : pick.index + column;
    }

    // The first of the columns that holds the value; negative if none does.
    FUSEDLOSS_ONE_COPY int64_t find(const S* z, int64_t count, T value) const {
        Bits column = lanes<T>(), first = Bits{} + kBlock;
        each_vector(kInOrder, z, count, [&](V x, int64_t, int) {
            const Bits here = x == value ? column : Bits{} + kBlock;
            first = here < first ? here : first;
            column += width;
        });
        const int64_t index = least<T>(first);
        return index < count ? index : -1;
    }

    // The largest of(logits, first column) of the columns.
    template <typename Order, typename Of>
    FUSEDLOSS_ONE_COPY T max_of(Order order, const S* z, int64_t count, const Of& of) const {
        V max = splat(-kInfinity<T>);
        each_vector(order, z, count, [&](V x, int64_t at, int) { max = greater(of(x, at), max); });
        return largest<T>(max);
    }

    T max_of(const S* z, int64_t count) const {
        return max_of(kAnyOrder, z, count, [](V x, int64_t) { return x; });
    }
};

}  // namespace
}  // namespace fusedloss::FUSEDLOSS_ISA
