// The forward of rows one by one: the statistics, the loss's epilogue on them, and the gradient where it is asked for,
// while the logits are in a cache.
#pragma once

#include "gradient.h"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

template <typename S>
class ForwardPass : public Rows<S> {
   protected:
    using Base = Rows<S>;
    using Base::common, Base::params_of, Base::weight_of;
    using Base::job_, Base::ignored, Base::statistic, Base::second_statistic, Base::coefficient, Base::losses;
    using typename Base::T;

   public:
    using Base::Base;

    template <typename Functor>
    void forward() const {
        const Job later = job_.of_gradient();
        const GradientPass<S> gradient(later);
        this->over_rows([&](int64_t row, int threads, Scratch<T>& scratch) {
            one_by_one<Functor>(row, threads, gradient, scratch);
        });
    }

    template <typename Functor>
    void one_by_one(int64_t row, int threads, const GradientPass<S>& gradient, Scratch<T>& scratch) const {
        statistics_and_loss<Functor>(row, threads, scratch);
        if (job_.grad) gradient.template write_row<TermOf<Functor>>(row, threads, scratch);
    }

    // The second half of it, from statistics in hand with the top class as the only pick.
    template <typename Term>
    void class_terms() const {
        this->over_rows([&](int64_t row, int threads, Scratch<T>& scratch) {
            if (ignored(row)) return write_zeros(row);
            RowStatistics<T> s{};
            s.max = statistic(kMax)[row];
            s.sum_exp = statistic(kSumExp)[row];
            s.p = s.sum_exp == T(0) ? T(0) : std::exp(statistic(kTargetLogit)[row] - s.max) / s.sum_exp;
            s.target = job_.target[row];
            s.picks = 1;
            finish<Term>(row, threads, s, scratch);
        });
    }

   private:
    template <typename Functor>
    void statistics_and_loss(int64_t row, int threads, Scratch<T>& scratch) const {
        if (ignored(row)) return write_ignored(row);
        if (std::is_same_v<Functor, AnyPair> && job_.grad) scratch.kept.resize(2 * (job_.classes + Base::width));
        if constexpr (kIsClassTerm<Functor>) {
            T params[kMaxParams];
            params_of(row, params);
            const bool powers = !job_.class_weight && !job_.moments &&
                                SmallTerm<T>::template reach<Functor>(params, job_.classes) > T(0);
            scratch.powers.resize(powers ? (job_.classes + kBlock - 1) / kBlock : 0);
        }
        const RowStatistics<T> s = StatisticsPass<S>(job_).statistics(row, threads, scratch);
        if constexpr (std::is_same_v<Functor, AnyPair>) {
            PairTermPass<S>(job_).finish(row, threads, s, scratch.kept.empty() ? nullptr : scratch.kept.data());
        } else if constexpr (!std::is_void_v<Functor>) {
            finish<Functor>(row, threads, s, scratch);
        }
    }

    // An ignored row is not looked at. It gets the statistics of two equal logits, one of them the target, so
    // that a user's loss function sees nothing that is not finite, and loss and coefficients of zero.
    void write_ignored(int64_t row) const {
        const int picks = job_.picks();
        const T log2 = T(0.6931471805599453);
        const T neutral[kStatistics] = {T(0), T(2), T(0.5), log2, T(0), log2}, moments[kMoments] = {log2, T(0), T(0.5)};
        for (int k = 0; k < kStatistics; ++k) statistic(k)[row] = neutral[k];
        for (int k = 0; k < picks; ++k) statistic(kStatistics + k)[row] = T(0), job_.index[k * job_.rows + row] = -1;
        for (int k = 0; job_.moments && k < kMoments; ++k) statistic(kStatistics + picks + k)[row] = moments[k];
        for (int k = 0; job_.second && k < kSeconds; ++k) second_statistic(k)[row] = T(1);
        if (job_.loss) write_zeros(row);
    }

    void write_zeros(int64_t row) const {
        losses()[row] = T(0);
        for (int k = 0; k < kCoefficients + job_.picks(); ++k) coefficient(k)[row] = T(0);
    }

    template <typename Functor>
    FUSEDLOSS_ONE_COPY void finish(int64_t row, int threads, const RowStatistics<T>& s, Scratch<T>& scratch) const {
        const int64_t n = job_.rows;
        T *const loss = losses() + row, *const coefficient = this->coefficient(0) + row;
        if constexpr (kIsClassTerm<Functor>) {
            const T z_slope = this->add_z_loss(s, weight_of(s.target), loss);
            ClassTermPass<S>(job_).template finish<Functor>(row, threads, s, scratch, z_slope, loss);
            for (int k = 0; k < s.picks; ++k) coefficient[(kCoefficients + k) * n] = T(0);
        } else {
            T params[kMaxParams];
            params_of(row, params);
            RowGradient<T> g;
            g.b = scratch.b.data();
            std::fill(scratch.b.begin(), scratch.b.end(), T(0));
            Functor::run(s, params, g);
            const T weight = weight_of(s.target);
            apply_shared(s, this->shared(), weight, job_.classes, g);
            *loss = g.loss;
            coefficient[kA * n] = g.a;
            const T smooth = common(kSmooth);
            coefficient[kU * n] = smooth;
            coefficient[kTargetGradient * n] = g.d - g.a * s.q - smooth * weight;
            for (int k = 0; k < s.picks; ++k) coefficient[(kCoefficients + k) * n] = g.b[k];
        }
    }
};

}  // namespace
}  // namespace fusedloss::FUSEDLOSS_ISA
