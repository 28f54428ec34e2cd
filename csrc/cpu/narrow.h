// The forward of rows of up to kNarrow classes: as many side by side as a vector has lanes, a row in each. Rows that
// are ignored, and those with a logit that is not finite, are left to the code of single rows.
#pragma once

#include "forward.h"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

template <typename S>
class NarrowPass : public ForwardPass<S> {
    using Base = ForwardPass<S>;
    using Base::job_, Base::factor_, Base::width, Base::weight_of, Base::params_of, Base::common, Base::losses;
    using Base::statistic, Base::second_statistic, Base::coefficient;
    using typename Base::T, typename Base::V, typename Base::Bits;

   public:
    using Base::Base;

    template <typename Functor>
    void forward() const {
        narrow<Functor>() ? side_by_side<Functor>() : Base::template forward<Functor>();
    }

    template <typename Term>
    void class_terms() const {  // side by side writes the same statistics once more
        job_.classes <= kNarrow ? side_by_side<Term>() : Base::template class_terms<Term>();
    }

   private:
    template <typename Functor>
    bool narrow() const {
        if (job_.rows == 0 || job_.classes > kNarrow || job_.top_k > 1 || job_.picks() != job_.top_k) return false;
        if (job_.mean || job_.moments) return false;
        if constexpr (std::is_same_v<Functor, AnyPair>) {
            T params[kMaxParams];
            params_of(0, params);
            for (int k = 0; k < kMaxParams && job_.param[k]; ++k) {
                if (job_.param_stride[k] != 0 && job_.rows > 1) return false;
            }
            return factor_ == T(1) || PairTermPass<S>(job_).hard_weight(params) == T(0);
        }
        return true;
    }

    template <typename Functor>
    void side_by_side() const {
        const int64_t groups = (job_.rows + width - 1) / width;
        const Job later = job_.of_gradient();
        const GradientPass<S> gradient(later);
        parallel_for(groups, this->threads_for(job_.rows), [&](int64_t begin, int64_t end) {
            Scratch<T> scratch(job_.picks());
            for (int64_t i = begin; i < end; ++i) group<Functor>(i * width, gradient, scratch);
        });
    }

    // The softmax of the rows in the lanes; `e` is exp(x - max).
    struct Lanes {
        V e[kNarrow];
        V max, target_logit, sum_exp, inverse, log_sum, ce, p, q, top_rest;
        Bits top{};

        FUSEDLOSS_INLINE Lanes(const V* x, int classes, Bits target) : max(x[0]), target_logit(x[0]) {
            for (int j = 1; j < classes; ++j) {
                const auto above = x[j] > max;
                max = above ? x[j] : max;
                top = above ? Bits{} + j : top;
                target_logit = target == j ? x[j] : target_logit;
            }
            V rest{}, mine{};
            top_rest = V{};
            for (int j = 0; j < classes; ++j) {
                e[j] = exp_bounded<T>(x[j] - max);
                rest += target == j ? V{} : e[j];
                mine = target == j ? e[j] : mine;
                top_rest += top == j ? V{} : e[j];
            }
            sum_exp = rest + mine, inverse = T(1) / sum_exp, log_sum = log_positive<T>(sum_exp);
            const V near = log1p_positive<T>(rest < mine ? rest / mine : V{});
            ce = rest < mine ? near : (max - target_logit) + log_sum;
            p = mine * inverse, q = rest * inverse;
        }
    };

    // Powers of the rows in the lanes.
    struct LanePowers {
        static FUSEDLOSS_INLINE V value(V z, V x) { return pair(z, x).value; }
        static FUSEDLOSS_INLINE Power<V> pair(V z, V x) {
            V value;
            const V minus_1 = powm1_bounded<T>(z, x, value);
            return {x == T(0) ? splat(T(1)) : value, x == T(0) ? V{} : minus_1};
        }
    };

    // Rows side by side. An ignored row is left to the scalar code, and one with a logit that is not finite: in their
    // lanes, and in those after the last row, the logits are 0.
    struct Group {
        int64_t first;
        int count;
        bool alone[width] = {};
        Bits target{};
    };

    // Takes the rows' columns, of(what is stored, column), and leaves those with a number that is not finite alone.
    template <typename Stored, typename Of>
    FUSEDLOSS_INLINE void take_lanes(Group& rows, const Stored* from, int64_t stride, const Of& of, V* x) const {
        const int classes = static_cast<int>(job_.classes);
        Stored lane[kNarrow][width];
        for (int i = 0; i < width; ++i) {
            const bool here = i < rows.count && !rows.alone[i];
            const Stored* const row = from + (rows.first + i) * stride;
            for (int j = 0; j < classes; ++j) lane[j][i] = here ? row[j] : Stored{};
        }
        V zero{};
        for (int j = 0; j < classes; ++j) zero += (x[j] = of(load(lane[j]), j)) * T(0);
        if (total<T>(zero) == T(0)) return;
        const auto finite = zero == V{};
        for (int j = 0; j < classes; ++j) x[j] = finite ? x[j] : V{};
        rows.target = finite ? rows.target : Bits{};
        for (int i = 0; i < width; ++i) rows.alone[i] = rows.alone[i] || zero[i] != T(0);
    }

    Group group_at(int64_t first) const {
        Group rows{first, static_cast<int>(std::min<int64_t>(width, job_.rows - first))};
        for (int i = 0; i < rows.count; ++i) {
            rows.alone[i] = this->ignored(first + i);
            if (!rows.alone[i]) rows.target[i] = static_cast<int>(job_.target[first + i]);
        }
        return rows;
    }

    // of_row(row) of each, and of the last in the lanes after it.
    template <typename OfRow>
    FUSEDLOSS_INLINE V lanes_of(const Group& rows, const OfRow& of_row) const {
        T lane[width];
        for (int i = 0; i < width; ++i) lane[i] = of_row(rows.first + std::min(i, rows.count - 1));
        return load(lane);
    }

    FUSEDLOSS_INLINE V weights_of(Bits columns) const {
        T weights[width];
        for (int i = 0; i < width; ++i) weights[i] = weight_of(columns[i]);
        return load(weights);
    }

    static void put(const Group& rows, T* to, V v) {
        rows.count == width ? store(to + rows.first, v) : store_part(to + rows.first, rows.count, v);
    }

    void put_statistics(const Group& rows, const Lanes& s) const {
        const V values[kStatistics] = {s.max, s.sum_exp, s.q, s.ce, s.target_logit, V{}};
        for (int k = 0; k < kStatistics; ++k) put(rows, statistic(k), values[k]);
        if (job_.top_k == 0) return;
        put(rows, statistic(kStatistics), s.max);
        for (int i = 0; i < rows.count; ++i) job_.index[rows.first + i] = s.top[i];
    }

    // The gradients in the lanes, and what is left to the scalar code.
    template <typename Functor>
    void finish_group(const Group& rows, const V* g, const GradientPass<S>& gradient, Scratch<T>& scratch) const {
        S lane[kNarrow][width];
        for (int j = 0; job_.grad && j < job_.classes; ++j) store(lane[j], g[j]);
        for (int i = 0; i < rows.count; ++i) {
            const int64_t row = rows.first + i;
            if (rows.alone[i]) {
                this->template one_by_one<Functor>(row, 1, gradient, scratch);
            } else if (job_.grad) {
                S* const grad = static_cast<S*>(job_.grad) + row * job_.grad_row_stride;
                for (int j = 0; j < job_.classes; ++j) grad[j] = lane[j][i];
            }
        }
    }

    template <typename Functor>
    FUSEDLOSS_ONE_COPY void group(int64_t first, const GradientPass<S>& gradient, Scratch<T>& scratch) const {
        if constexpr (std::is_same_v<Functor, AnyPair>) {
            T params[kMaxParams];
            params_of(first, params);
            PairTermPass<S>(job_).with_pair_term(
                params, [&](auto term) { pair_group<decltype(term)>(first, params, gradient, scratch); });
        } else {
            row_group<Functor>(first, gradient, scratch);
        }
    }

    template <typename Functor>
    FUSEDLOSS_INLINE void row_group(int64_t first, const GradientPass<S>& gradient, Scratch<T>& scratch) const {
        const int classes = static_cast<int>(job_.classes);
        Group rows = group_at(first);
        V x[kNarrow], params[kMaxParams];
        take_lanes(rows, this->logits(0), job_.row_stride, [&](V z, int) { return this->tempered(z); }, x);
        for (int k = 0; k < kMaxParams && job_.param[k]; ++k) {
            const T* const param = static_cast<const T*>(job_.param[k]);
            params[k] = lanes_of(rows, [&](int64_t row) { return param[row * job_.param_stride[k]]; });
        }
        const Lanes s(x, classes, rows.target);
        put_statistics(rows, s);
        const auto target = rows.target, top = s.top;
        const V p = s.p, inverse = s.inverse;
        const V factor = lanes_of(rows, [&](int64_t row) { return this->upstream_of(row); });
        if constexpr (kIsClassTerm<Functor>) {
            const T z_loss = common(kZLoss);
            const V target_weight = weights_of(target), lse = s.max + s.log_sum, z_weight = target_weight * z_loss;
            const V z_slope = z_weight * lse * T(2);
            const V top_q = s.top_rest * inverse, top_p = inverse;
            const V target_q = target == top ? top_q : T(1) - p, target_p = target == top ? top_p : p;
            V target_h, top_h{}, slope{}, slopes[kNarrow];
            V loss = z_weight * lse * lse;
            loss += Functor::positive(target_p, target_q, LanePowers::pair(target_q, Functor::exponent(params)),
                                      target_weight, params, target_h);
            for (int j = 0; j < classes; ++j) {
                const V p_j = top == j ? top_p : s.e[j] * inverse;
                const V q_j = top == j ? top_q : T(1) - p_j;
                V h;
                V f = Functor::negative(p_j, q_j, LanePowers::pair(q_j, Functor::exponent(params)), params, h);
                const T w = weight_of(j);
                h = target == j ? target_h : h * w;
                loss += target == j ? V{} : f * w;
                top_h = top == j ? h : top_h;
                const V g = h / q_j;
                slope += top == j ? V{} : p_j * g;
                x[j] = p_j, slopes[j] = g;
            }
            const V shift = slope + (top_q > T(0) ? top_p * top_h / top_q : V{}) - z_slope;
            const V top_gradient = top_p * (top_h - slope + z_slope);
            const V target_gradient = target == top ? top_gradient : p * (target_h / target_q - shift);

            put(rows, coefficient(kShift), shift);
            put(rows, coefficient(kTopGradient), top_gradient);
            put(rows, coefficient(kTargetGradient), target_gradient);
            put(rows, coefficient(kCoefficients), V{});
            put(rows, losses(), loss);
            for (int j = 0; job_.grad && j < classes; ++j) {
                V g = x[j] * (slopes[j] - shift) * factor;
                g = top == j ? top_gradient * factor : g;
                x[j] = target == j ? target_gradient * factor : g;
            }
        } else if constexpr (!std::is_void_v<Functor>) {
            const RowStatistics<V, Bits> row{s.max, s.sum_exp, s.log_sum,  s.ce,   s.q,   p,
                                             V{},   target,    job_.top_k, &s.max, &s.top};
            V b{};
            RowGradient<V> g;
            g.b = &b;
            Functor::template run<LanePowers>(row, params, g);
            const V weight = weights_of(target), smooth = splat(common(kSmooth));
            apply_shared(row, this->shared(), weight, job_.classes, g);
            const V target_gradient = g.d - g.a * s.q - smooth * weight;
            put(rows, losses(), g.loss);
            put(rows, coefficient(kA), g.a);
            put(rows, coefficient(kU), smooth);
            put(rows, coefficient(kTargetGradient), target_gradient);
            if (job_.top_k > 0) put(rows, coefficient(kCoefficients), b);
            const V a = g.a * inverse * factor, of_top = b * factor, u = smooth * factor;
            for (int j = 0; job_.grad && j < classes; ++j) {
                const V grad = target == j ? target_gradient * factor : s.e[j] * a - u * weight_of(j);
                x[j] = top == j ? grad - of_top : grad;
            }
        }
        finish_group<Functor>(rows, x, gradient, scratch);
    }

    // Of a pair term, whose parameters are those of all rows.
    template <typename Term>
    FUSEDLOSS_ONE_COPY void pair_group(int64_t first, const T* params, const GradientPass<S>& gradient,
                                       Scratch<T>& scratch) const {
        const int classes = static_cast<int>(job_.classes);
        Group rows = group_at(first);
        V x[kNarrow], second[kNarrow];
        const auto of_logits = [&](V z, int) { return this->tempered(z); };
        take_lanes(rows, this->logits(0), job_.row_stride, of_logits, x);
        if constexpr (Term::of_logits) {
            take_lanes(rows, static_cast<const S*>(job_.second), job_.second_row_stride, of_logits, second);
        } else {
            const auto of_targets = [&](V y, int j) { return (y * params[0] + params[1]) * weight_of(j); };
            take_lanes(rows, static_cast<const T*>(job_.second), job_.second_row_stride, of_targets, second);
        }
        const Lanes s(x, classes, rows.target);
        put_statistics(rows, s);
        PairRow<T, V> pair{};
        std::copy_n(params, kMaxParams, pair.params);
        pair.max = s.max, pair.inverse = s.inverse, pair.lag = pair.log_sum = s.log_sum;
        V second_sum = splat(T(1));
        if constexpr (Term::of_logits) {
            const Lanes other(second, classes, rows.target);
            pair.second_max = other.max, pair.second_inverse = other.inverse, pair.second_log_sum = other.log_sum;
            pair.offset = other.max - s.max, pair.far = far_rows(pair.offset);
            pair.lag = log_positive<T>(other.sum_exp / s.sum_exp);
            second_sum = other.sum_exp;
        }
        put(rows, second_statistic(kSecondMax), pair.second_max);
        put(rows, second_statistic(kSecondSum), second_sum);
        put(rows, second_statistic(kPlainSum), s.sum_exp);

        const T main = common(kMain), z_loss = common(kZLoss), curvature = Term::curvature(params);
        const T hard = PairTermPass<S>(job_).hard_weight(params);
        V sum{}, slope{}, difference{}, at_target{};
        for (int j = 0; j < classes; ++j) {
            const auto both = both_of<Term, T, V>(pair, x[j], second[j]);
            const auto term = Term::template term<T>(both, params);
            sum += term.loss, slope += term.slope, difference += term.difference;
            at_target = rows.target == j ? term.slope : at_target;
            x[j] = both.p, second[j] = term.slope;
        }
        const V lse = s.max + s.log_sum, z_slope = lse * (T(2) * z_loss);
        const V rounded = difference * (slope - difference * (curvature / 2));
        const V loss = lse * z_loss * lse + (sum - rounded) * main + s.ce * hard;  // lse^2 may be infinite
        const V shift = slope * main - z_slope - hard;
        const V target_gradient = at_target * main - s.p * (slope * main - z_slope) - s.q * (hard / factor_);
        put(rows, losses(), loss);
        put(rows, coefficient(kShift), shift);
        put(rows, coefficient(kPlain), V{});
        put(rows, coefficient(kTargetGradient), target_gradient);
        for (int k = 0; k < job_.top_k; ++k) put(rows, coefficient(kCoefficients + k), V{});
        const V factor = lanes_of(rows, [&](int64_t row) { return this->upstream_of(row); });
        for (int j = 0; job_.grad && j < classes; ++j) {
            x[j] = (rows.target == j ? target_gradient : second[j] * main - x[j] * shift) * factor;
        }
        finish_group<AnyPair>(rows, x, gradient, scratch);
    }
};

}  // namespace
}  // namespace fusedloss::FUSEDLOSS_ISA
