// A class term of a row: its sums over the columns but the target and the top class, which are singled out, and its
// gradient. Columns whose probabilities are small, almost all of a large vocabulary, have it as a polynomial
// (SmallTerm).
#pragma once

#include "rows.h"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

constexpr int kReach = 32;  // times the mean: a probability that few of a row are above

template <typename Functor, typename... Terms>
constexpr bool is_one_of(FunctorList<Terms...>) {
    return (std::is_same_v<Functor, Terms> || ...);
}
template <typename Functor>
constexpr bool kIsClassTerm = is_one_of<Functor>(ClassTerms{});

// The terms up to p^degree of a function of p.
template <int degree>
struct Taylor {
    double c[degree + 1] = {};

    friend Taylor operator+(Taylor x, double y) {
        x.c[0] += y;
        return x;
    }
    friend Taylor operator-(double y, const Taylor& x) { return x * -1.0 + y; }
    friend Taylor operator*(Taylor x, double y) {
        for (double& c : x.c) c *= y;
        return x;
    }
    friend Taylor operator*(const Taylor& x, const Taylor& y) {
        Taylor z;
        for (int k = 0; k <= degree; ++k) {
            for (int i = 0; i <= k; ++i) z.c[k] += x.c[i] * y.c[k - i];
        }
        return z;
    }
    friend Taylor operator/(double y, const Taylor& x) {
        Taylor z;
        const double inverse = 1 / x.c[0];
        z.c[0] = y * inverse;
        for (int k = 1; k <= degree; ++k) {
            for (int i = 1; i <= k; ++i) z.c[k] -= x.c[i] * z.c[k - i];
            z.c[k] *= inverse;
        }
        return z;
    }
};

// A class term at y = 0 as a polynomial, exact to the type up to `limit`, which almost every probability of a large
// vocabulary is below: f = sum_k loss_k p^(k + 1) and g = sum_k slope_k p^k. Up to `power_limit`, which may be larger,
// the powers (1 - p)^exponent and (1 - p)^(exponent - 1) in it are.
template <typename T>
struct SmallTerm {
    T loss[kTerms<T>], slope[kTerms<T>], limit = -1;
    T weight[kTerms<T>], weight1[kTerms<T>], power_limit = -1;

    template <typename Term>
    void set(const T* params, int64_t classes) {
        constexpr int n = kTerms<T>;
        const T exponent = Term::exponent(params);
        weight[0] = weight1[0] = 1;
        for (int k = 1; k < n; ++k) {
            weight[k] = weight[k - 1] * (T(k - 1) - exponent) * (T(1) / T(k));
            weight1[k] = weight1[k - 1] * (T(k) - exponent) * (T(1) / T(k));
        }
        power_limit = (sizeof(T) == 4 ? T(0x1p-6) : T(0x1p-12)) / (T(1) + exponent);
        const T most = reach<Term>(params, classes);
        if (most > T(0)) set_polynomial<Term>(params, most);
    }

    // What limits a polynomial of linear terms; 0 where a flat row's largest probabilities would be too large, and it
    // would be tried in vain. For the digits of double that is any row.
    template <typename Term>
    static T reach(const T* params, int64_t classes) {
        const T most = T(0x1p-6) / Term::rate(params);
        return sizeof(T) == 4 && most * T(classes) >= kReach ? most : T(0);
    }

    template <typename Term>
    FUSEDLOSS_ONE_COPY void set_polynomial(const T* of_row, T most) {
        constexpr int n = kTerms<T>;
        double params[kMaxParams];
        std::copy_n(of_row, Term::param_count, params);
        const double exponent = Term::exponent(params);
        Taylor<n> p, power, power1, g;
        p.c[1] = power.c[0] = power1.c[0] = 1;
        for (int k = 1; k <= n; ++k) {
            power.c[k] = power.c[k - 1] * (k - 1 - exponent) / k;
            power1.c[k] = power1.c[k - 1] * (k - exponent) / k;
        }
        const Taylor<n> f = Term::small_negative(p, power, power1, params, g);
        std::copy_n(f.c + 1, n, loss);
        std::copy_n(g.c, n, slope);
        limit = f.c[1] != 0 ? most : most / 4;  // where f begins with p^2, a term less is left
    }

    // The coefficients, times the factor, for p / inverse in place of p.
    static void scale(const T* c, T factor, T inverse, T* to) {
        for (int k = 0; k < kTerms<T>; ++k) {
            to[k] = c[k] * factor;
            factor *= inverse;
        }
    }

    template <int terms = kTerms<T>, typename V>
    static FUSEDLOSS_INLINE V evaluate(const T* c, V p) {
        V sum = splat(c[terms - 1]);
#pragma GCC unroll 8
        for (int k = terms - 2; k >= 0; --k) sum = sum * p + c[k];
        return sum;
    }
};

// What a class term takes of a row.
template <typename T>
struct ClassRow {
    T params[kMaxParams];
    SmallTerm<T> small;
    T max, inverse;  // of the logits: the largest, 1 / S
    int64_t target, top;
};

// The class term at y = 0 of a vector of probabilities, p <= power_limit where Small.
template <bool Small, typename Term, typename T, typename V>
FUSEDLOSS_INLINE V negative_term(const ClassRow<T>& row, V p, V& g) {
    if constexpr (Small) {
        const V weight = row.small.evaluate(row.small.weight, p), weight1 = row.small.evaluate(row.small.weight1, p);
        return Term::small_negative(p, weight, weight1, row.params, g);
    }
    const V q = T(1) - p;
    const V weight = exp_bounded<T>(log_positive<T>(q) * Term::exponent(row.params));
    return Term::small_negative(p, weight, V(weight / q), row.params, g);
}

// Takes the target and the top class from the columns of a block.
template <typename T>
struct Holes {
    using V = typename VectorOf<T>::Value;
    static constexpr int width = VectorOf<T>::width;
    typename VectorOf<T>::Bits to_top, to_target;
    bool any;

    Holes(const ClassRow<T>& row, int64_t from, int64_t to) : to_top(lanes<T>()), to_target(lanes<T>()) {
        const bool top = row.top >= from && row.top < to, target = row.target >= from && row.target < to;
        any = top || target;
        to_top -= top ? static_cast<int>(row.top - from) : -1;
        to_target -= target ? static_cast<int>(row.target - from) : -1;
    }

    // Of the next columns.
    FUSEDLOSS_INLINE V without(V e) {
        if (!any) return e;
        e = (to_top == 0) | (to_target == 0) ? V{} : e;  // p = 0 adds nothing
        to_top += width;
        to_target += width;
        return e;
    }
};

template <typename S>
class ClassTermPass : public Rows<S> {
   protected:
    using Base = Rows<S>;
    using Base::coefficient, Base::statistic, Base::each_vector, Base::transform, Base::fold;
    using Base::job_, Base::logits, Base::class_weight, Base::load_weight, Base::weight_of;
    using typename Base::T, typename Base::V;

   public:
    using Base::Base;

    template <typename Term>
    ClassRow<T> class_row(int64_t row) const {
        ClassRow<T> terms;
        this->params_of(row, terms.params);
        terms.small.template set<Term>(terms.params, job_.classes);
        terms.max = statistic(kMax)[row];
        terms.inverse = T(1) / statistic(kSumExp)[row];
        terms.target = job_.target[row];
        terms.top = job_.index[row];
        return terms;
    }

    // The terms of one probability.
    template <typename Term>
    static T positive_term(T p, T q, T weight, const T* params, T& h) {
        return Term::positive(p, q, ScalarPowers::pair(q, Term::exponent(params)), weight, params, h);
    }
    template <typename Term>
    static T negative_term_at(T p, T q, const T* params, T& h) {
        return Term::negative(p, q, Power<T>{ScalarPowers::value(q, Term::exponent(params)), T(0)}, params, h);
    }

    // Adds to the loss; the slope is that of the z-loss.
    template <typename Term>
    void finish(int64_t row, int threads, const RowStatistics<T>& s, const Scratch<T>& scratch, T z_slope,
                T* loss) const {
        const ClassRow<T> terms = class_row<Term>(row);
        const T inverse = terms.inverse, *const params = terms.params;
        const int64_t top = terms.top;
        const TermSums part = fold(
            threads, [&](int64_t begin, int64_t end) { return sweep<Term>(row, terms, begin, end, &scratch.powers); });

        // The target, where it is not the top class, and the top class, whose 1 - p comes from the others'
        // sum.
        double rest = part.mass, slope = part.slope, sum = part.loss;
        T target_p = 0, target_g = 0;
        if (s.target != top) {
            rest += s.p * s.sum_exp;
            target_p = s.p;
            T h;
            sum += positive_term<Term>(target_p, T(1) - target_p, weight_of(s.target), params, h);
            target_g = h / (T(1) - target_p);
            slope += double(target_p) * target_g;
        }
        const T top_q = T(rest) * inverse;
        const T top_p = inverse;  // its logit is the maximum; 1 - q would lose digits where the row is flat
        T h;
        if (s.target == top) {
            sum += positive_term<Term>(top_p, top_q, weight_of(top), params, h);
        } else {
            sum += weight_of(top) * negative_term_at<Term>(top_p, top_q, params, h);
            h *= weight_of(top);
        }
        // dL/dz_top = p (h - slope); for the others p_j (g_j - slope - p h / q), q the top's 1 - p. Where q
        // underflows, so do they.
        const T shift = T(slope) + (top_q > T(0) ? top_p * h / top_q : T(0)) - z_slope;
        const T top_gradient = top_p * (h - T(slope) + z_slope);
        *loss += T(sum);
        coefficient(kShift)[row] = shift;
        coefficient(kTopGradient)[row] = top_gradient;
        coefficient(kTargetGradient)[row] = s.target == top ? top_gradient : target_p * (target_g - shift);
    }

    template <typename Term>
    void term_sums() const {
        this->over_rows([&](int64_t row, int threads, Scratch<T>&) {
            const int64_t n = job_.rows;
            job_.sums[row] = job_.sums[n + row] = 0;
            if (this->ignored(row)) return;
            const ClassRow<T> terms = class_row<Term>(row);
            const TermSums part =
                fold(threads, [&](int64_t begin, int64_t end) { return sweep<Term>(row, terms, begin, end); });
            job_.sums[row] = part.loss;
            job_.sums[n + row] = part.slope;
        });
    }

    // Of the columns [begin, end) of a row; the target's and the top class's are overwritten later.
    template <typename Term>
    void gradient(const ClassRow<T>& row, const S* z, S* grad, int64_t begin, int64_t end, T upstream, T shift) const {
        for (int64_t from = begin; from < end; from += kBlock) {
            const int64_t to = std::min(from + kBlock, end);
            int64_t at = class_weight() ? small_gradient<true>(row, z, grad, from, to, upstream, shift)
                                        : small_gradient<false>(row, z, grad, from, to, upstream, shift);
            at = class_gradient<true, Term>(row, z, grad, at, to, upstream, shift);
            class_gradient<false, Term>(row, z, grad, at, to, upstream, shift);
        }
    }

   private:
    // p (w g - shift) upstream; where Small up to the first column whose probability is not small for the series.
    template <bool Small, typename Term>
    FUSEDLOSS_ONE_COPY int64_t class_gradient(const ClassRow<T>& row, const S* z, S* grad, int64_t begin, int64_t end,
                                              T upstream, T shift) const {
        V most{};
        const auto formula = [&](V x, int64_t column, int size) {
            const V p = exp_bounded<T>(x - row.max) * row.inverse;
            if (Small) most = greater(p, most);
            V g;
            negative_term<Small, Term>(row, p, g);
            if (class_weight()) g *= load_weight(column, size);
            return p * (g - shift) * upstream;
        };
        const auto stop = [&] { return Small && exceeds<T>(most, row.small.power_limit); };
        return class_weight() ? transform(kInOrder, z, grad, begin, end, formula, stop)
                              : transform(kAnyOrder, z, grad, begin, end, formula, stop);
    }

    // The same up to the first column with a larger probability, as a polynomial in exp(z - max).
    template <bool Weighted>
    FUSEDLOSS_ONE_COPY int64_t small_gradient(const ClassRow<T>& row, const S* z, S* grad, int64_t begin, int64_t end,
                                              T upstream, T shift) const {
        // A NaN would lose its way in the short rounding.
        if (!(row.small.limit > T(0)) || !std::isfinite(upstream * shift)) return begin;
        constexpr int terms = sizeof(S) == 2 ? kTerms<T> - 1 : kTerms<T>;  // which 16 bits do not need
        T slope[kTerms<T>];
        const T factor = row.inverse * upstream;
        row.small.scale(row.small.slope, factor, row.inverse, slope);
        if (!Weighted) slope[0] = (row.small.slope[0] - shift) * factor;
        const T bound = row.small.limit / row.inverse;
        V most{};
        const auto formula = [&](V x, int64_t column, int size) {
            const V e = exp_stored<S>(x - row.max);
            most = greater(e, most);
            V g = row.small.template evaluate<terms>(slope, e);
            if constexpr (Weighted) g = g * load_weight(column, size) - shift * factor;
            if constexpr (std::is_same_v<S, bfloat16>) {
                return round_near(e * g);
            } else {
                return e * g;
            }
        };
        const auto stop = [&] { return exceeds<T>(most, bound); };
        return transform(std::bool_constant<Weighted>{}, z, grad, begin, end, formula, stop);
    }

    // Blocks whose powers are not in hand are read once more.
    template <typename Term>
    FUSEDLOSS_ONE_COPY TermSums sweep(int64_t row, const ClassRow<T>& terms, int64_t begin, int64_t end,
                                      const std::vector<Powers<T>>* powers = nullptr) const {
        TermSums part;
        for (int64_t from = begin; from < end; from += kBlock) {
            const int64_t to = std::min(from + kBlock, end);
            const bool top = terms.top >= from && terms.top < to && terms.top != terms.target;
            if (powers && !powers->empty() && take_powers(terms, (*powers)[from / kBlock], top, part)) continue;
            const S* const z = logits(row);
            int64_t at = sum_powers(terms, z, from, to, part);
            at = sum_terms<true, Term>(terms, z, at, to, part);
            sum_terms<false, Term>(terms, z, at, to, part);
        }
        return part;
    }

    // Adds the sums of small terms, without the top class's where that is among them; returns false if one is not
    // small.
    FUSEDLOSS_ONE_COPY bool take_powers(const ClassRow<T>& terms, const Powers<T>& block, bool top,
                                        TermSums& part) const {
        // The powers of numbers up to exp(kSlack / 2) are finite.
        if (!(std::exp(block.max - terms.max) * terms.inverse <= terms.small.limit)) return false;
        if (block.max - block.base > kSlack / 2) return false;
        const double unit = std::exp(double(block.base) - terms.max), own = top ? 1 / unit : 0;
        double raised = unit * terms.inverse, power = own;
        part.mass += (block.rest - own) * unit;
        for (int k = 0; k < kTerms<T>; ++k) {
            const double sum = raised * (block.sum[k] - power);
            part.loss += terms.small.loss[k] * sum;
            part.slope += terms.small.slope[k] * sum;
            raised *= unit * terms.inverse;
            power *= own;
        }
        return true;
    }

    // Of the columns before the first whose probability is not small for the polynomial, which is returned.
    FUSEDLOSS_ONE_COPY int64_t sum_powers(const ClassRow<T>& row, const S* z, int64_t from, int64_t to,
                                          TermSums& part) const {
        if (!(row.small.limit > T(0))) return from;
        const T bound = row.small.limit / row.inverse;
        V rest{}, power[kTerms<T>] = {};
        Holes<T> holes(row, from, to);
        const int64_t count = each_vector(kInOrder, z + from, to - from, [&](V x, int64_t at, int size) {
            const V e = holes.without(exp_bounded<T>(x - row.max));
            if (exceeds<T>(e, bound)) return false;
            rest += e;
            add_powers<T>(e, class_weight() ? V(e * load_weight(from + at, size)) : e, power);
            return true;
        });
        if (count == 0) return from;
        Powers<T> sums{-kInfinity<T>, row.max, total<T>(rest), {}};
        for (int k = 0; k < kTerms<T>; ++k) sums.sum[k] = total<T>(power[k]);
        take_powers(row, sums, false, part);
        return from + count;
    }

    // The same, where Small of the columns before the first whose probability is not small for the series.
    template <bool Small, typename Term>
    FUSEDLOSS_ONE_COPY int64_t sum_terms(const ClassRow<T>& row, const S* z, int64_t from, int64_t to,
                                         TermSums& part) const {
        V rest{}, loss{}, slope{};
        Holes<T> holes(row, from, to);
        const int64_t count = each_vector(kInOrder, z + from, to - from, [&](V x, int64_t at, int size) {
            const V e = holes.without(exp_bounded<T>(x - row.max)), p = e * row.inverse;
            if (Small && exceeds<T>(p, row.small.power_limit)) return false;
            V g;
            V f = negative_term<Small, Term>(row, p, g);
            if (class_weight()) {
                const V w = load_weight(from + at, size);
                f *= w;
                g *= w;
            }
            rest += e;
            loss += f;
            slope += p * g;
            return true;
        });
        if (count == 0) return from;
        part.mass += total<T>(rest);
        part.loss += total<T>(loss);
        part.slope += total<T>(slope);
        return from + count;
    }
};

}  // namespace
}  // namespace fusedloss::FUSEDLOSS_ISA
