// A pair term of a row and the second one: how blocks of both are brought to the loops of pairs.h, the loss of their
// sums, and the gradient.
#pragma once

#include "pairs.h"
#include "statistics.h"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

template <typename S>
class PairTermPass : public Rows<S> {
    using Base = Rows<S>;
    using Base::job_, Base::factor_, Base::width, Base::logits, Base::limit, Base::class_weight, Base::load_weight;
    using Base::statistic, Base::second_statistic, Base::coefficient, Base::fold;
    using typename Base::T, typename Base::V;

   public:
    using Base::Base;

    // visit(Term{}): the term is chosen where its arithmetic is, so that nothing else is compiled once for each. Of
    // rows as they are stored it is a term of logits. `params` are a row's.
    template <typename Row = T, typename Visit>
    void with_pair_term(const T* params, const Visit& visit) const {
        with_functor(job_.epilogue, PairTerms{}, [&](auto term) {
            using Term = decltype(term);
            if constexpr (std::is_same_v<Term, MixtureKl>) {
                if (params && EvenMixtureKl::takes(params)) return visit(EvenMixtureKl{});
            }
            if constexpr (Term::of_logits || std::is_same_v<std::decay_t<Row>, T>) visit(term);
        });
    }

    // The weight of the cross-entropy beside a term, the last of its parameters.
    T hard_weight(const T* params) const {
        T weight = T(0);
        with_pair_term(params, [&](auto term) {
            using Term = decltype(term);
            if (Term::of_logits) weight = params[Term::param_count - 1];
        });
        return weight;
    }

    bool has_teacher() const {
        bool result = false;
        with_pair_term(nullptr, [&](auto term) { result = decltype(term)::of_logits; });
        return result;
    }

    FUSEDLOSS_ONE_COPY void finish(int64_t row, int threads, const RowStatistics<T>& s, T* kept) const {
        T* const loss = this->losses() + row;
        T &second_max = second_statistic(kSecondMax)[row], &second_sum = second_statistic(kSecondSum)[row],
          &plain_sum = second_statistic(kPlainSum)[row];
        second_max = T(0), second_sum = T(1), plain_sum = s.sum_exp;
        if (has_teacher()) {
            Job job = job_;
            job.logits = job_.second, job.row_stride = job_.second_row_stride;
            // As the first row's, so that equal rows have the same bits.
            const RowStatistics<T> second = StatisticsPass<S>(job).softmax_of(row, threads, s.target);
            second_max = second.max, second_sum = second.sum_exp;
        }
        const PairRow<T> pair = pair_row(row);
        const T main = this->common(kMain), hard = hard_weight(pair.params);
        T curvature = T(0);
        with_pair_term(pair.params, [&](auto term) { curvature = decltype(term)::curvature(pair.params); });
        RowStatistics<T> plain = s;
        if (hard != T(0) && factor_ != T(1)) {
            Job job = job_;
            job.common = nullptr;
            plain = StatisticsPass<S>(job).softmax_of(row, threads, s.target);
            plain_sum = plain.sum_exp * std::exp(plain.max - s.max / factor_);
        }
        const TermSums sum = pair_sums(row, pair, threads, kept);
        const T at_target = T(pair_sums(row, pair, s.target, s.target + 1).slope);
        const T z_slope = this->add_z_loss(s, T(1), loss);
        const T slope = main * T(sum.slope);
        *loss += main * T(whole_loss(sum.loss, sum.slope, sum.mass, double(curvature)));
        if (hard != T(0)) *loss += hard * plain.ce;
        // Without a temperature both are factors of the same exponentials.
        const bool apart = hard != T(0) && factor_ != T(1);
        coefficient(kShift)[row] = slope - z_slope - (apart ? T(0) : hard);
        coefficient(kPlain)[row] = apart ? hard / (factor_ * plain_sum) : T(0);
        coefficient(kTargetGradient)[row] = main * at_target - s.p * (slope - z_slope) - hard / factor_ * plain.q;
        for (int k = 0; k < s.picks; ++k) coefficient(kCoefficients + k)[row] = T(0);
    }

    // Of some columns of a row, from p and h where they are kept. The gradient may be the logits' memory.
    void gradient(int64_t row, S* grad, int64_t begin, int64_t end, const PairFactors<T>& factors,
                  const T* kept) const {
        kept ? kept_gradient(kept, grad, begin, end, factors.main, factors.shift)
             : pair_gradient(row, grad, begin, end, factors);
    }

    void term_sums() const {
        this->over_rows([&](int64_t row, int threads, Scratch<T>&) {
            const TermSums part = this->ignored(row) ? TermSums{} : pair_sums(row, pair_row(row), threads);
            const double sums[] = {part.loss, part.slope, part.mass};
            for (int k = 0; k < 3; ++k) job_.sums[k * job_.rows + row] = sums[k];
        });
    }

   private:
    // Columns of the logits times their factor, up to a whole number of vectors; -inf behind the end.
    FUSEDLOSS_ONE_COPY static void fill_block(const S* z, int64_t count, const S* limit, T factor, T* block) {
        for (int64_t at = 0; at < count; at += width) {
            const int rest = static_cast<int>(std::min<int64_t>(width, count - at));
            const V x = rest == width ? load(z + at) : load_part(z + at, rest, -kInfinity<T>, limit);
            store(block + at, x * factor);
        }
    }

    // The same; where the columns are that already, themselves.
    const T* block_of(const S* z, int64_t count, const S* limit, T* block) const {
        if constexpr (std::is_same_v<S, T>) {
            if (factor_ == T(1) && count % width == 0) return z;
        }
        fill_block(z, count, limit, factor_, block);
        return block;
    }

    // Targets of the columns as the loss takes them; 0 behind the end.
    FUSEDLOSS_ONE_COPY void fill_targets(const T* y, int64_t column, int64_t count, const T* limit, const T* params,
                                         T* block) const {
        for (int64_t at = 0; at < count; at += width) {
            const int rest = static_cast<int>(std::min<int64_t>(width, count - at));
            V x = (rest == width ? load(y + at) : load_part(y + at, rest, T(0), limit)) * params[0] + params[1];
            if (class_weight()) x *= load_weight(column + at, rest);
            store(block + at, rest == width ? x : lanes<T>() < rest ? x : V{});
        }
    }

    PairRow<T> pair_row(int64_t row) const {
        PairRow<T> pair{};
        this->params_of(row, pair.params);
        const T sum = statistic(kSumExp)[row], second_sum = second_statistic(kSecondSum)[row];
        pair.max = statistic(kMax)[row], pair.second_max = second_statistic(kSecondMax)[row];
        pair.inverse = T(1) / sum, pair.second_inverse = T(1) / second_sum;
        pair.offset = pair.second_max - pair.max, pair.far = far_rows(pair.offset);
        pair.log_sum = std::log(sum), pair.second_log_sum = std::log(second_sum);
        pair.lag = has_teacher() ? std::log(second_sum / sum) : pair.log_sum;
        pair.inverse += pair.lag * T(0);  // a NaN among the teacher's logits
        return pair;
    }

    // Whether a block of so many columns is computed with as it is stored.
    bool as_stored(int64_t count) const {
        return kPairs<S> && factor_ == T(1) && count % (2 * width) == 0 && has_teacher();
    }

    // body(x, second, first column, columns) for each block of both rows' columns.
    template <typename Body>
    void each_pair_block(int64_t row, const PairRow<T>& pair, int64_t begin, int64_t end, const Body& body) const {
        T x[kBlock], second[kBlock];
        const auto* const teacher = static_cast<const S*>(job_.second);
        const auto* const targets = static_cast<const T*>(job_.second);
        const int64_t last = (job_.rows - 1) * job_.second_row_stride + job_.classes;
        for (int64_t from = begin; from < end; from += kBlock) {
            const int64_t count = std::min(kBlock, end - from), at = row * job_.second_row_stride + from;
            const S* const z = logits(row) + from;
            if constexpr (kPairs<S>) {  // as they are stored, but for a product, which would be rounded here or there
                if (as_stored(count)) {
                    body(z, teacher + at, from, count, Ahead::of(z + kBlock, teacher + at + kBlock, width));
                    continue;
                }
            }
            const T* const own = block_of(z, count, limit(), x);
            if (has_teacher()) {
                const T* const other = block_of(teacher + at, count, teacher + last, second);
                body(own, other, from, count, Ahead::of(z + kBlock, teacher + at + kBlock, width));
            } else {
                fill_targets(targets + at, from, count, targets + last, pair.params, second);
                body(own, second, from, count, Ahead::of(z + kBlock, targets + at + kBlock, width));
            }
        }
    }

    TermSums pair_sums(int64_t row, const PairRow<T>& pair, int64_t begin, int64_t end, T* kept = nullptr) const {
        TermSums part;
        each_pair_block(row, pair, begin, end,
                        [&](const auto* x, const auto* second, int64_t from, int64_t count, const Ahead& ahead) {
                            with_pair_term<decltype(*x)>(pair.params, [&](auto term) {
                                T* const to = kept ? kept + 2 * from : nullptr;
                                merge(part, sum_pairs<decltype(term)>(pair, x, second, count, ahead, to));
                            });
                        });
        return part;
    }

    TermSums pair_sums(int64_t row, const PairRow<T>& pair, int threads, T* kept = nullptr) const {
        return fold(threads, [&](int64_t begin, int64_t end) { return pair_sums(row, pair, begin, end, kept); });
    }

    // main h - p shift
    FUSEDLOSS_ONE_COPY void kept_gradient(const T* kept, S* grad, int64_t begin, int64_t end, T main, T shift) const {
        kept += 2 * begin;
        const auto next = [&] {
            const V p = load(kept), h = load(kept + width);
            kept += 2 * width;
            return h * main - p * shift;
        };
        for (int64_t from = begin; from < end; from += kBlock) {
            const int64_t to = std::min(from + kBlock, end);
            int64_t at = from;
            if constexpr (kPairs<S>) {
                for (; as_stored(to - from) && at < to; at += 2 * width) {
                    const V even = next();
                    store_pair(grad + at, even, next());
                }
            }
            for (; at < to; at += width) {
                const int rest = static_cast<int>(std::min<int64_t>(width, to - at));
                rest == width ? store(grad + at, next()) : store_part(grad + at, rest, next());
            }
        }
    }

    void pair_gradient(int64_t row, S* grad, int64_t begin, int64_t end, const PairFactors<T>& factors) const {
        const PairRow<T> pair = pair_row(row);
        // 16 bits do not show the digits of close rows, but that equal ones have a gradient of 0.
        const bool near = pair.offset == T(0) && pair.lag == T(0);
        T block[kBlock];
        const auto body = [&](const auto* x, const auto* second, int64_t from, int64_t count, const Ahead& ahead) {
            using Row = std::decay_t<decltype(*x)>;
            const bool direct = std::is_same_v<Row, S> && count % width == 0;
            Row* const to = direct ? reinterpret_cast<Row*>(grad + from) : reinterpret_cast<Row*>(block);
            with_pair_term<Row>(pair.params, [&](auto term) {
                using Term = decltype(term);
                near ? differentiate_pairs<Term, true>(pair, x, second, to, count, factors, ahead)
                     : differentiate_pairs<Term, (sizeof(S) > 2)>(pair, x, second, to, count, factors, ahead);
            });
            for (int64_t at = 0; !direct && at < count; at += width) {
                const int rest = static_cast<int>(std::min<int64_t>(width, count - at));
                rest == width ? store(grad + from + at, load(block + at))
                              : store_part(grad + from + at, rest, load(block + at));
            }
        };
        each_pair_block(row, pair, begin, end, body);
    }
};

}  // namespace
}  // namespace fusedloss::FUSEDLOSS_ISA
