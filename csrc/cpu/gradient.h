// The gradient pass: it reads the logits once more and writes their gradient, which may take their place. That of a row
// epilogue has the same form for all of them, and is made here; class and pair terms make their own.
#pragma once

#include "class_terms.h"
#include "pair_terms.h"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

// e (a + c lag + d e), e = exp(lag): the part of a gradient that the probability is a factor of.
template <typename T>
struct Slopes {
    T a, by_excess, by_power;

    template <typename V>
    V gradient(V e, V lag) const {
        return e * (lag * by_excess + e * by_power + a);
    }
};

// Only terms need their functor.
template <typename Functor>
using TermOf = std::conditional_t<kIsClassTerm<Functor> || std::is_same_v<Functor, AnyPair>, Functor, void>;

template <typename S>
class GradientPass : public Rows<S> {
    using Base = Rows<S>;
    using Base::job_, Base::factor_, Base::class_weight, Base::load_weight, Base::weight_of;
    using Base::statistic, Base::coefficient, Base::bounded, Base::transform, Base::over_chunks;
    using typename Base::T, typename Base::V;

   public:
    using Base::Base;

    template <typename Term>
    void backward() const {
        this->over_rows([&](int64_t row, int threads, Scratch<T>& scratch) { write_row<Term>(row, threads, scratch); });
    }

    template <typename Term>
    FUSEDLOSS_ONE_COPY void write_row(int64_t row, int threads, Scratch<T>& scratch) const {
        const S* z = this->logits(row);
        S* grad = static_cast<S*>(job_.grad) + row * job_.grad_row_stride;
        if (this->ignored(row)) return std::fill(grad, grad + job_.classes, S{});
        const T upstream = this->upstream_of(row);

        // Read before the logits are overwritten, written after.
        Exception<T>* const exceptions = scratch.exceptions.data();
        Exception<T>* last = exceptions;
        *last++ = {job_.target[row], coefficient(kTargetGradient)[row] * upstream};
        if constexpr (std::is_same_v<Term, AnyPair>) {
            const PairTermPass<S> pass(job_);
            const T shift = coefficient(kShift)[row], plain = coefficient(kPlain)[row], main = this->common(kMain);
            const PairFactors<T> factors{factor_, main * upstream, shift * upstream, plain * upstream};
            const T* const kept = plain == T(0) && !scratch.kept.empty() ? scratch.kept.data() : nullptr;
            over_chunks(threads,
                        [&](int64_t begin, int64_t end) { pass.gradient(row, grad, begin, end, factors, kept); });
        } else if constexpr (kIsClassTerm<Term>) {
            const ClassTermPass<S> pass(job_);
            const ClassRow<T> terms = pass.template class_row<Term>(row);
            *last++ = {terms.top, coefficient(kTopGradient)[row] * upstream};
            const T shift = coefficient(kShift)[row];
            over_chunks(threads, [&](int64_t begin, int64_t end) {
                pass.template gradient<Term>(terms, z, grad, begin, end, upstream, shift);
            });
        } else {
            const T max = statistic(kMax)[row], inverse = T(1) / statistic(kSumExp)[row];
            const T a = coefficient(kA)[row] * inverse * upstream, u = coefficient(kU)[row] * upstream;
            const int picks = job_.picks(), slope = kCoefficients + picks;
            const T by_excess = job_.moments ? coefficient(slope + kOfExcess)[row] * inverse * upstream : T(0);
            const T by_power = job_.moments ? coefficient(slope + kOfPower)[row] * inverse * inverse * upstream : T(0);
            const Slopes<T> slopes{a, by_excess, by_power};
            for (int k = 0; k < picks; ++k) {
                const int64_t column = job_.index[k * job_.rows + row];
                const T b = coefficient(kCoefficients + k)[row] * upstream;
                if (column < 0 || b == T(0)) continue;
                const auto same = [&](const Exception<T>& x) { return x.column == column; };
                Exception<T>* const at = std::find_if(exceptions, last, same);
                if (at == last) {
                    const T x = this->logit(z + column), lag = std::max(x - max, kLeastLag<T>);
                    *last++ = {column, slopes.gradient(std::exp(lag), lag) - u * weight_of(column)};
                }
                at->value -= b;
            }
            const auto smoothed = [&](auto of) {
                constexpr int smooth = decltype(of)::value;
                over_chunks(threads, [&](int64_t begin, int64_t end) {
                    !job_.moments       ? row_gradient<smooth, kNoMoments>(z, grad, begin, end, max, slopes, u)
                    : by_excess == T(0) ? row_gradient<smooth, kPowerAlone>(z, grad, begin, end, max, slopes, u)
                                        : row_gradient<smooth, kAllMoments>(z, grad, begin, end, max, slopes, u);
                });
            };
            u == T(0)         ? smoothed(std::integral_constant<int, 0>{})
            : !class_weight() ? smoothed(std::integral_constant<int, 1>{})
                              : smoothed(std::integral_constant<int, 2>{});
        }
        for (const Exception<T>* x = exceptions; x != last; ++x) {
            if (x->column >= 0) write(grad + x->column, x->value);
        }
    }

   private:
    // The slopes' gradient less u w. Smooth: 0 without u, 1 with u, 2 with class weights too
    template <int Smooth, int Moments>
    FUSEDLOSS_ONE_COPY void row_gradient(const S* z, S* grad, int64_t begin, int64_t end, T max,
                                         const Slopes<T>& slopes, T u) const {
        if constexpr (std::is_same_v<S, bfloat16> && Smooth == 0 && Moments == kNoMoments) {
            if (job_.classes > kNarrow && RoundedExp::takes(slopes.a)) {
                const RoundedExp exp(slopes.a);
                transform(kAnyOrder, z, grad, begin, end, [&](V x, int64_t, int) { return exp(x - max); });
                return;
            }
        }
        transform(std::bool_constant<Smooth == 2>{}, z, grad, begin, end, [&](V x, int64_t column, int size) {
            V p;
            if constexpr (Moments == kAllMoments) {
                const V lag = x - max;
                p = slopes.gradient(exp_bounded<T>(lag), bounded(lag));
            } else {
                const V e = exp_bounded<T>(x - max);
                p = e * (Moments == kNoMoments ? splat(slopes.a) : e * slopes.by_power + slopes.a);
            }
            return Smooth == 0 ? p : Smooth == 1 ? p - u : p - load_weight(column, size) * u;
        });
    }
};

}  // namespace
}  // namespace fusedloss::FUSEDLOSS_ISA
