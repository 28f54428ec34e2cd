// The sums over the rows, class by class, of a summed class term: error and agreement of each class, of which a loss by
// class or set is made.
#pragma once

#include "class_terms.h"
#include "statistics.h"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

constexpr int64_t kRowsAtOnce = 4;    // rows of a block of columns that are added up before the next block's
constexpr int64_t kGroupRows = 1024;  // rows of which sums over the rows may have a part of their own
constexpr int64_t kParts = 64;        // of such parts and blocks of columns, so that all threads find work

template <typename S>
class ClassSumsPass : public ClassTermPass<S> {
    using Base = ClassTermPass<S>;
    using Base::job_, Base::width, Base::logits, Base::ignored, Base::threads_for, Base::each_vector;
    using typename Base::T, typename Base::V;

   public:
    using Base::Base;

    // Threads share out the blocks of columns, and where these are few, groups of rows, whose number depends on the
    // sizes alone: so the order of every sum, hence its bits, does not depend on the threads.
    template <typename Term>
    void class_sums() const {
        const int64_t blocks = (job_.classes + kBlock - 1) / kBlock, padded = blocks * kBlock;
        const int64_t groups = std::max<int64_t>(1, std::min(job_.rows / kGroupRows, kParts / blocks));
        std::vector<T> top_q(job_.rows);
        const StatisticsPass<S> statistics(job_);
        parallel_for(job_.rows, threads_for(job_.rows), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                top_q[row] = ignored(row) ? T(0)
                             : job_.top_q ? static_cast<const T*>(job_.top_q)[row]
                                          : statistics.top_rest(row);
            }
        });
        std::vector<double> error(groups * padded), agreement(groups * padded);
        parallel_for(groups * blocks, threads_for(job_.rows), [&](int64_t begin, int64_t end) {
            while (begin < end) {
                const int64_t group = begin / blocks, stop = std::min(end, (group + 1) * blocks);
                const int64_t first = job_.rows * group / groups, last = job_.rows * (group + 1) / groups;
                for (int64_t row = first; row < last; row += kRowsAtOnce) {
                    for (int64_t block = begin - group * blocks; block < stop - group * blocks; ++block) {
                        T sum[kBlock + width] = {};
                        double* const of_group = &error[group * padded];
                        for (int64_t i = row; i < std::min(row + kRowsAtOnce, last); ++i) {
                            if (ignored(i)) continue;
                            add_row<Term>(i, block * kBlock, top_q[i], sum, of_group, &agreement[group * padded]);
                        }
                        for (int64_t k = 0; k < kBlock; k += width)
                            add_to(of_group + block * kBlock + k, load(sum + k));
                    }
                }
                begin = stop;
            }
        });
        for (int64_t column = 0; column < job_.classes; ++column) {
            double sum[2] = {0, 0};
            for (int64_t group = 0; group < groups; ++group) {
                sum[0] += error[group * padded + column];
                sum[1] += agreement[group * padded + column];
            }
            job_.sums[column] = sum[0];
            job_.sums[job_.classes + column] = sum[1];
        }
    }

   private:
    // Adds a row to the sums of a block of columns: the terms at y = 0 to `sum`, the others to those of all columns.
    template <typename Term>
    void add_row(int64_t row, int64_t from, T top_q, T* sum, double* error, double* agreement) const {
        const int64_t to = std::min(from + kBlock, job_.classes);
        const S* const z = logits(row);
        const ClassRow<T> terms = this->template class_row<Term>(row);
        const T max = terms.max, inverse = terms.inverse, *const params = terms.params;
        const T weight = this->upstream_of(row);
        const int64_t top = terms.top, target = terms.target;
        int64_t at = add_small(terms, z, from, to, weight, sum);
        at = add_terms<true, Term>(terms, z, at, to, weight, sum + (at - from));
        add_terms<false, Term>(terms, z, at, to, weight, sum + (at - from));
        if (target >= from && target < to) {
            const bool is_top = target == top;
            const T p = is_top ? inverse : std::exp(this->logit(z + target) - max) * inverse;
            const T q = is_top ? top_q : T(1) - p;
            const Overlap<T> x = Term::Math::positive(p, q, ScalarPowers::pair(q, Term::exponent(params)), params);
            error[target] += double(weight * x.error);
            agreement[target] += double(weight * x.agreement);
        }
        if (top >= from && top < to && target != top) {
            T slope;
            error[top] += double(weight * Base::template negative_term_at<Term>(inverse, top_q, params, slope));
        }
    }

    // Returns the column before which all probabilities were small, as a polynomial in exp(z - max).
    FUSEDLOSS_ONE_COPY int64_t add_small(const ClassRow<T>& row, const S* z, int64_t from, int64_t to, T weight,
                                         T* sum) const {
        if (!(row.small.limit > T(0))) return from;
        T loss[kTerms<T>];
        row.small.scale(row.small.loss, row.inverse * weight, row.inverse, loss);
        const T bound = row.small.limit / row.inverse;
        Holes<T> holes(row, from, to);
        return from + each_vector(kInOrder, z + from, to - from, [&](V x, int64_t at, int) {
                   const V e = holes.without(exp_bounded<T>(x - row.max));
                   if (exceeds<T>(e, bound)) return false;
                   store(sum + at, load(sum + at) + e * row.small.evaluate(loss, e));
                   return true;
               });
    }

    template <bool Small, typename Term>
    FUSEDLOSS_ONE_COPY int64_t add_terms(const ClassRow<T>& row, const S* z, int64_t from, int64_t to, T weight,
                                         T* sum) const {
        Holes<T> holes(row, from, to);
        return from + each_vector(kInOrder, z + from, to - from, [&](V x, int64_t at, int) {
                   const V p = holes.without(exp_bounded<T>(x - row.max)) * row.inverse;
                   if (Small && exceeds<T>(p, row.small.power_limit)) return false;
                   V slope;
                   store(sum + at, load(sum + at) + negative_term<Small, Term>(row, p, slope) * weight);
                   return true;
               });
    }
};

}  // namespace
}  // namespace fusedloss::FUSEDLOSS_ISA
