// The passes of the CPU engine, compiled once for each instruction set (FUSEDLOSS_ISA names the namespace).
//
//   forward    reads the logits once, block by block, keeping the row's statistics (an online softmax without the
//              target's term), then runs the loss's epilogue on them. A class term reads blocks of large
//              probabilities a second time, with class weights all; a pair term reads two rows. A gradient that is
//              asked for is written row by row, while the logits are in a cache.
//   backward   reads the logits once more and writes their gradient, which may take their place.
//   class_sums reads the logits once more for the sums over the rows, class by class, of a summed class term.
//   term_sums  reads the logits once more for the sums over the classes, row by row, of a class or pair term.
//
// A row is cut into chunks whose partial statistics merge exactly in a fixed order, so that the bits of a
// result do not depend on the number of threads, nor on whether a row was split over them.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "../job.h"
#include "parallel.h"
#include "vector.h"

namespace fusedloss {
namespace FUSEDLOSS_ISA {
namespace {

constexpr int64_t kBlock = 2048;        // columns looked at together: 8 KB of float stay in the L1 cache
constexpr int64_t kChunk = 4 * kBlock;  // columns of one partial statistic
constexpr int64_t kProbe = 256;         // columns whose largest logit is taken for about the largest of a chunk
constexpr int kSlack = 32;              // how far a block's largest logit may be above it
constexpr int64_t kNarrow = 64;         // columns of rows that are looked at side by side, one in each lane
constexpr int64_t kRowsAtOnce = 4;      // rows of a block of columns that are added up before the next block's
constexpr int64_t kGroupRows = 1024;    // rows of which sums over the rows may have a part of their own
constexpr int64_t kParts = 64;          // of such parts and blocks of columns, so that all threads find work

constexpr int kReach = 32;  // times the mean: a probability that few of a row are above

constexpr int kPowers = kAllMoments + 1;  // beside Moments: sums of powers of exp(z - max), for a class term

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <typename T>
constexpr T kLeastLag = T(-1e30);  // of a logit from the largest, in a product with its exponential

template <typename T>
struct Best {
    T value;
    int64_t index;  // the first column of its block; negative: none
};

template <typename T>
constexpr Best<T> kNone = {-kInfinity<T>, -1};

// What the moments are made of, by the largest logit m. Without the largest the sum keeps the digits of the others.
struct Sums {
    double low = 0;     // sum of exp(z - m) over the logits below m
    double ties = 0;    // how many are m
    double excess = 0;  // sum of exp(z - m) (z - m)
    double square = 0;  // sum of exp(2 (z - m))
};

template <typename T>
struct Partial {
    T max = -kInfinity<T>;
    double rest = 0;  // sum of exp(z - max) over all but the target
    double mean = 0;  // sum of w (z - reference)
    Sums sums;
    Best<T> top = kNone<T>, second = kNone<T>, below = kNone<T>;
};

template <typename T>
T finite_max(T max) {
    return max == -kInfinity<T> ? T(0) : max;  // exp(-inf - -inf) would be NaN
}

template <typename T>
void insert(Best<T>& top, Best<T>& second, const Best<T>& x) {
    if (x.index < 0) return;
    if (top.index < 0 || x.value > top.value) {
        second = top;
        top = x;
    } else if (second.index < 0 || x.value > second.value) {
        second = x;
    }
}

// Sums by another m, which is larger by -lag.
inline void shift(Sums& x, double lag) {
    lag = std::max(lag, kLeastLag<double>);  // 0 * -inf would be NaN
    const double factor = std::exp(lag), all = x.low + x.ties;
    x = {factor * all, 0, factor * (x.excess + lag * all), factor * factor * x.square};
}

// `y` comes from columns to the right of `x`: on equal values the lower index stays.
template <typename T>
FUSEDLOSS_ONE_COPY void merge(Partial<T>& x, const Partial<T>& y, bool moments) {
    const T max = std::max(x.max, y.max);
    const double reference = finite_max(max);
    // A part without a finite logit has an empty sum (or a NaN that must pass through).
    if (x.max != max) x.rest *= std::exp(double(x.max) - reference);
    x.rest += y.max != max ? y.rest * std::exp(double(y.max) - reference) : y.rest;
    if (moments) {
        Sums more = y.sums;
        if (x.max != max) shift(x.sums, double(x.max) - reference);
        if (y.max != max) shift(more, double(y.max) - reference);
        x.sums = {x.sums.low + more.low, x.sums.ties + more.ties, x.sums.excess + more.excess,
                  x.sums.square + more.square};
    }
    x.max = max;
    x.mean += y.mean;
    insert(x.top, x.second, y.top);
    insert(x.top, x.second, y.second);
    if (y.below.index >= 0 && (x.below.index < 0 || y.below.value > x.below.value)) x.below = y.below;
}

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

template <typename T>
constexpr int kTerms = sizeof(T) == 4 ? 4 : 5;

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

// The largest of some logits, and the sums of e = exp(z - base) and of w e^k, k = 1 ... kTerms.
template <typename T>
struct Powers {
    T max, base, rest, sum[kTerms<T>];
};

template <typename T, typename V>
FUSEDLOSS_INLINE void add_powers(V e, V weighted, V* sum) {
    const V e2 = e * e, weighted2 = weighted * e;
    sum[0] += weighted;
    sum[1] += weighted2;
    sum[2] += weighted * e2;
    sum[3] += weighted2 * e2;
}

// Sums of a class term over columns that are neither the target nor the top class, whose terms are singled out.
struct ClassPartial {
    double rest = 0;   // sum of exp(z - max) over all but the top class
    double loss = 0;   // sum of w f(p)
    double slope = 0;  // sum of p g
};

// Sums of a pair term: of the loss, of h, and of p - y, which would be 0 if both rows were whole.
struct PairPartial {
    double loss = 0, slope = 0, difference = 0;
};

// Stands for every pair term.
struct AnyPair {};
using AnyPairTerm = FunctorList<AnyPair>;

// What a pair term takes of a row and of the second, or of the rows in the lanes of V.
template <typename T, typename V = T>
struct PairRow {
    T params[kMaxParams];
    V max, inverse, log_sum;  // of the logits: the largest, 1 / S, log S
    V second_max, second_inverse, second_log_sum;
    // Of the second row less that of the first: the largest, and log S; of targets the logits' log S. They are taken
    // off one after the other, since a large common offset would leave no digits of the second.
    V offset, lag;
    decltype(V{} > V{}) far;  // whether far_rows(offset)
};

// log y - log p of a class in two rows of logits.
template <typename T, typename V, typename R>
FUSEDLOSS_INLINE V log_ratio(const PairRow<T, R>& row, V x, V second) {
    return (row.far ? (second - row.second_max) - (x - row.max) : (second - x) - row.offset) - row.lag;
}

// The columns after a block, of which a loop over the block asks for a vector's at a time: memory and arithmetic
// overlap.
struct Ahead {
    const char* memory[2];
    int64_t step[2];  // bytes of a vector

    template <typename A, typename B>
    static Ahead of(const A* x, const B* second, int64_t width) {
        return {{reinterpret_cast<const char*>(x), reinterpret_cast<const char*>(second)},
                {width * int64_t(sizeof(A)), width * int64_t(sizeof(B))}};
    }

    FUSEDLOSS_INLINE void prefetch(int64_t vector) const {
        for (int i = 0; i < 2; ++i) __builtin_prefetch(memory[i] + vector * step[i]);
    }
};

template <typename Term, typename T, typename V, typename R>
FUSEDLOSS_INLINE Both<V> both_of(const PairRow<T, R>& row, V x, V second) {
    Both<V> both{};
    if constexpr (std::is_same_v<Term, EvenMixtureKl>) {
        both.d = log_ratio(row, x, second);
        const auto above = both.d > V{};
        both.larger = exp_bounded<T>(above ? second - row.second_max : x - row.max) *
                      (above ? V{} + row.second_inverse : V{} + row.inverse);
        both.rest = fall_of<T>(magnitude<T>(both.d, kFar<T>), both.fall, both.excess);
        both.p = above ? both.larger * both.rest : both.larger;
        both.log_excess = log_excess<T>(both.fall * Term::share(both.d, row.params));
        return both;
    }
    both.p = exp_bounded<T>(x - row.max) * row.inverse;
    if constexpr (Term::of_logits) {
        both.y = exp_bounded<T>(second - row.second_max) * row.second_inverse;
        both.d = log_ratio(row, x, second);
    } else {
        both.y = second;
        both.d = row.lag - (x - row.max);
    }
    if constexpr (Term::mixes) {
        both.log_p = (x - row.max) - row.log_sum;
        both.log_y = (second - row.second_max) - row.second_log_sum;
        both.log_mixture = log_positive<T>(Term::mixture(both.p, both.y, row.params));
    }
    return both;
}

// The terms of a block's columns, of both rows in the type that is computed with, or as they are stored. p and h
// of each vector go to `kept`, unless it is null.
template <typename Term, typename T, typename S>
FUSEDLOSS_ONE_COPY PairPartial sum_pairs(const PairRow<T>& row, const S* x, const S* second, int64_t count,
                                         const Ahead& ahead, T* kept) {
    using V = typename VectorOf<T>::Value;
    V loss{}, slope{}, difference{};
    const auto add = [&](V z, V other) {
        const auto both = both_of<Term, T, V>(row, z, other);
        const auto term = Term::template term<T>(both, row.params);
        if (kept) {
            store(kept, both.p);
            store(kept + VectorOf<T>::width, term.slope);
            kept += 2 * VectorOf<T>::width;
        }
        loss += term.loss;
        slope += term.slope;
        difference += term.difference;
    };
    constexpr int width = VectorOf<T>::width;
    for (int64_t at = 0; at < count; at += width) {
        ahead.prefetch(at / width);
        if constexpr (std::is_same_v<S, T>) {
            add(load(x + at), load(second + at));
        } else {
            const Pair z = load_pair(x + at), other = load_pair(second + at);
            add(z.even, other.even);
            add(z.odd, other.odd);
            at += width;
        }
    }
    return {double(total<T>(loss)), double(total<T>(slope)), double(total<T>(difference))};
}

// What a gradient takes its terms times.
template <typename T>
struct PairFactors {
    T logits, main, shift, plain;
};

// main h - p shift + plain exp((z - max) / factor of the logits), for a gradient of which `Close` says whether it has
// the digits of close rows; may take the place of the logits.
template <typename Term, bool Close, typename T, typename S>
FUSEDLOSS_ONE_COPY void differentiate_pairs(const PairRow<T>& row, const S* x, const S* second, S* to, int64_t count,
                                            const PairFactors<T>& factors, const Ahead& ahead) {
    using V = typename VectorOf<T>::Value;
    const T main = factors.main, shift = factors.shift, plain = factors.plain, per_factor = T(1) / factors.logits;
    const auto gradient = [&](V z, V other) {
        const Both<V> both = both_of<Term, T, V>(row, z, other);
        V g = Term::template term<T, Close>(both, row.params).slope * main - both.p * shift;
        if (plain != T(0)) g += exp_bounded<T>((z - row.max) * per_factor) * plain;
        return g;
    };
    constexpr int width = VectorOf<T>::width;
    for (int64_t at = 0; at < count; at += width) {
        ahead.prefetch(at / width);
        if constexpr (std::is_same_v<S, T>) {
            store(to + at, gradient(load(x + at), load(second + at)));
        } else {
            const Pair z = load_pair(x + at), other = load_pair(second + at);
            const V even = gradient(z.even, other.even);
            store_pair(to + at, even, gradient(z.odd, other.odd));
            at += width;
        }
    }
}

// e (a + c lag + d e), e = exp(lag): the part of a gradient that the probability is a factor of.
template <typename T>
struct Slopes {
    T a, by_excess, by_power;

    template <typename V>
    V gradient(V e, V lag) const {
        return e * (lag * by_excess + e * by_power + a);
    }
};

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
class Engine {
    using T = typename ComputeOf<S>::type;
    using V = typename VectorOf<T>::Value;
    using Bits = typename VectorOf<T>::Bits;
    static constexpr int width = VectorOf<T>::width;

   public:
    explicit Engine(const Job& job) : job_(job), factor_(common_at<T>(job.common, kLogits)) {}

    template <typename Functor>
    void forward() const {
        if (narrow<Functor>()) return side_by_side<Functor>();
        const Job later = job_.of_gradient();
        const Engine gradient(later);
        over_rows([&](int64_t row, int threads, Scratch<T>& scratch) {
            one_by_one<Functor>(row, threads, scratch);
            if (job_.grad) gradient.template write_gradient<TermOf<Functor>>(row, threads, scratch);
        });
    }

    template <typename Functor>
    void one_by_one(int64_t row, int threads, Scratch<T>& scratch) const {
        if (ignored(row)) return write_ignored(row);
        if (std::is_same_v<Functor, AnyPair> && job_.grad) scratch.kept.resize(2 * (job_.classes + width));
        if constexpr (is_one_of<Functor>(ClassTerms{})) {
            T params[kMaxParams];
            params_of(row, params);
            const bool powers =
                !class_weight() && !job_.moments && SmallTerm<T>::template reach<Functor>(params, job_.classes) > T(0);
            scratch.powers.resize(powers ? (job_.classes + kBlock - 1) / kBlock : 0);
        }
        const RowStatistics<T> s = statistics(row, threads, scratch);
        if constexpr (std::is_same_v<Functor, AnyPair>) {
            finish_pair_term(row, threads, s, scratch.kept.empty() ? nullptr : scratch.kept.data());
        } else if constexpr (!std::is_void_v<Functor>) {
            finish<Functor>(row, threads, s, scratch);
        }
    }

    // Threads share out the blocks of columns, and where these are few, groups of rows, whose number depends on the
    // sizes alone: so the order of every sum, hence its bits, does not depend on the threads.
    template <typename Term>
    void class_sums() const {
        const int64_t blocks = (job_.classes + kBlock - 1) / kBlock, padded = blocks * kBlock;
        const int64_t groups = std::max<int64_t>(1, std::min(job_.rows / kGroupRows, kParts / blocks));
        std::vector<T> top_q(job_.rows);
        parallel_for(job_.rows, threads_for(job_.rows), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                top_q[row] = ignored(row) ? T(0) : job_.top_q ? static_cast<const T*>(job_.top_q)[row] : top_rest(row);
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

    // The second half of forward, from statistics in hand with the top class as the only pick.
    template <typename Term>
    void class_terms() const {
        if (job_.classes <= kNarrow) return side_by_side<Term>();  // writes the same statistics once more
        over_rows([&](int64_t row, int threads, Scratch<T>& scratch) {
            const int64_t n = job_.rows;
            if (ignored(row)) {
                static_cast<T*>(job_.loss)[row] = T(0);
                for (int k = 0; k <= kCoefficients; ++k) static_cast<T*>(job_.coefficients)[k * n + row] = T(0);
                return;
            }
            const T* const statistic = static_cast<const T*>(job_.statistics) + row;
            RowStatistics<T> s{};
            s.max = statistic[kMax * n];
            s.sum_exp = statistic[kSumExp * n];
            s.p = s.sum_exp == T(0) ? T(0) : std::exp(statistic[kTargetLogit * n] - s.max) / s.sum_exp;
            s.target = job_.target[row];
            s.picks = 1;
            finish<Term>(row, threads, s, scratch);
        });
    }

    template <typename Term>
    void term_sums() const {
        over_rows([&](int64_t row, int threads, Scratch<T>&) {
            const int64_t n = job_.rows;
            job_.sums[row] = job_.sums[n + row] = 0;
            if constexpr (std::is_same_v<Term, AnyPair>) {
                const PairPartial part = ignored(row) ? PairPartial{} : pair_sums(row, pair_row(row), threads);
                const double sums[] = {part.loss, part.slope, part.difference};
                for (int k = 0; k < 3; ++k) job_.sums[k * n + row] = sums[k];
                return;
            } else {
                if (ignored(row)) return;
                const ClassRow<T> terms = class_row<Term>(row);
                const ClassPartial part = fold<ClassPartial>(
                    threads, [&](int64_t begin, int64_t end) { return sweep<Term>(row, terms, begin, end); });
                job_.sums[row] = part.loss;
                job_.sums[n + row] = part.slope;
            }
        });
    }

    template <typename Functor>
    void backward() const {
        over_rows(
            [&](int64_t row, int threads, Scratch<T>& scratch) { write_gradient<Functor>(row, threads, scratch); });
    }

   private:
    T logit(const S* z) const { return read(z) * factor_; }
    const S* logits(int64_t row) const { return static_cast<const S*>(job_.logits) + row * job_.row_stride; }
    const S* limit() const { return logits(job_.rows - 1) + job_.classes; }
    const T* weight_limit() const { return class_weight() + job_.classes; }
    const T* class_weight() const { return static_cast<const T*>(job_.class_weight); }
    T weight_of(int64_t column) const { return class_weight() && column >= 0 ? class_weight()[column] : T(1); }
    T upstream_of(int64_t row) const {
        return job_.upstream ? static_cast<const T*>(job_.upstream)[row * job_.upstream_stride] : T(1);
    }
    bool ignored(int64_t row) const { return job_.target[row] == kIgnored; }
    double weight_sum() const { return job_.weight_sum ? *job_.weight_sum : double(job_.classes); }
    int64_t chunks() const { return (job_.classes + kChunk - 1) / kChunk; }

    void params_of(int64_t row, T* params) const {
        for (int k = 0; k < kMaxParams && job_.param[k]; ++k) {
            params[k] = static_cast<const T*>(job_.param[k])[row * job_.param_stride[k]];
        }
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
        if (job_.rows < 2 * threads && chunks() > 1) {
            Scratch<T> scratch(job_.picks());
            for (int64_t row = 0; row < job_.rows; ++row) each(row, threads, scratch);
        } else {
            parallel_for(job_.rows, threads, [&](int64_t begin, int64_t end) {
                Scratch<T> scratch(job_.picks());
                for (int64_t row = begin; row < end; ++row) each(row, 1, scratch);
            });
        }
    }

    // Folds scan(begin, end) over the chunks of a row, from left to right.
    template <typename Part, typename Scan>
    Part fold(int threads, const Scan& scan) const {
        const auto chunk = [&](int64_t i) { return scan(i * kChunk, std::min((i + 1) * kChunk, job_.classes)); };
        if (threads == 1) {
            Part sum = chunk(0);
            for (int64_t i = 1; i < chunks(); ++i) merge(sum, chunk(i));
            return sum;
        }
        std::vector<Part> parts(chunks());
        parallel_for(chunks(), threads, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) parts[i] = chunk(i);
        });
        for (int64_t i = 1; i < chunks(); ++i) merge(parts[0], parts[i]);
        return parts[0];
    }

    static void merge(PairPartial& x, const PairPartial& y) {
        x.loss += y.loss;
        x.slope += y.slope;
        x.difference += y.difference;
    }
    static void merge(ClassPartial& x, const ClassPartial& y) {
        x.rest += y.rest;
        x.loss += y.loss;
        x.slope += y.slope;
    }
    void merge(Partial<T>& x, const Partial<T>& y) const { FUSEDLOSS_ISA::merge(x, y, job_.moments); }

    // --- statistics pass ---

    // Those of the softmax alone.
    RowStatistics<T> summary(const Partial<T>& part, int64_t target, T target_logit) const {
        RowStatistics<T> s;
        s.max = finite_max(part.max);
        s.target = target;
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
        return s;
    }

    // Those of a row without its picks.
    FUSEDLOSS_ONE_COPY RowStatistics<T> softmax_of(int64_t row, int threads, int64_t target) const {
        const S* z = logits(row);
        const T target_logit = logit(z + target);
        return summary(fold<Partial<T>>(threads,
                                        [&](int64_t begin, int64_t end) {
                                            return scan(z, begin, end, target, target_logit, T(0), nullptr);
                                        }),
                       target, target_logit);
    }

    FUSEDLOSS_ONE_COPY RowStatistics<T> statistics(int64_t row, int threads, Scratch<T>& scratch) const {
        const S* z = logits(row);
        const int64_t target = job_.target[row];
        const T target_logit = logit(z + target);
        const T first = logit(z);
        const T reference = std::isfinite(first) ? first : T(0);
        Powers<T>* const powers = scratch.powers.empty() ? nullptr : scratch.powers.data();
        const Partial<T> part = fold<Partial<T>>(threads, [&](int64_t begin, int64_t end) {
            return scan(z, begin, end, target, target_logit, reference, powers);
        });
        RowStatistics<T> s = summary(part, target, target_logit);
        if (job_.mean) {
            const double sum_ce = weight_sum() * (double(s.log_sum) + (double(s.max) - reference)) - part.mean;
            s.mean_ce = T(sum_ce / double(job_.classes));
        } else {
            s.mean_ce = T(0);
        }

        T* const statistic = static_cast<T*>(job_.statistics) + row;
        const int64_t n = job_.rows;
        statistic[kMax * n] = s.max;
        statistic[kSumExp * n] = s.sum_exp;
        statistic[kQ * n] = s.q;
        statistic[kCe * n] = s.ce;
        statistic[kTargetLogit * n] = target_logit;
        statistic[kMeanCe * n] = s.mean_ce;
        int k = 0;
        const auto pick = [&](T logit, int64_t index) {
            scratch.pick_logit[k] = statistic[(kStatistics + k) * n] = logit;
            scratch.pick_index[k] = job_.index[k * n + row] = index;
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
        if (job_.moments) put_moments(part.sums, double(s.sum_exp), statistic + (kStatistics + k) * n);
        s.picks = k;
        s.pick_logit = scratch.pick_logit.data();
        s.pick_index = scratch.pick_index.data();
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
        if (job_.moments == kAllMoments) {
            for (int64_t from = begin; from < end; from += kBlock) {
                const int64_t count = std::min(kBlock, end - from);
                const BlockSums x = sum_block<kAllMoments>(z, from, count, target, max_of(z + from, count), reference);
                Partial<T> block;
                block.max = x.max, block.rest = x.rest, block.mean = x.mean, block.sums = x.sums;
                block.top = part.top, block.second = part.second, block.below = part.below;
                keep_picks(z + from, from, count, x.max, target_logit, block);
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
            BlockSums sums = sum();
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

    struct BlockSums {
        T max;              // the largest logit
        double rest, mean;  // as in Partial, but relative to the base
        Sums sums;          // where the base is the largest logit
    };

    template <int Moments>
    BlockSums sum_block(const S* z, int64_t from, int64_t count, int64_t target, T base, T reference,
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
    BlockSums sum_columns(const S* z, int64_t from, int64_t count, int hole, T base, T reference,
                          Powers<T>* powers) const {
        V max = splat(-kInfinity<T>), rest = splat(T(0)), mean = splat(T(0));
        V low = rest, ties = rest, excess = rest, square = rest, power[kTerms<T>] = {};
        const T* const weight = class_weight();
        Bits to_hole = lanes<T>() - hole;
        each_vector<InOrder>(z + from, count, [&](V x, int64_t at, int size) {
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
                if (InOrder && weight) ce *= load_weight(from + at, size);
                mean += size == width ? ce : lanes<T>() < size ? ce : V{};
            }
        });
        BlockSums sums{largest<T>(max), total<T>(Moments == kPowers ? power[0] : rest), total<T>(mean), {}};
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

    // A lag of -inf, whose exponential is 0, as a number: its product with that and a slope is 0.
    static V bounded(V lag) { return greater(lag, splat(kLeastLag<T>)); }

    V load_weight(int64_t column, int size) const {
        const T* const weight = class_weight() + column;
        return size == width ? load(weight) : load_part(weight, size, T(0), weight_limit());
    }

    // body(logits, first column, columns) for each vector of the columns; beyond them it is -inf. Out of order, where
    // that is faster, the vectors of a pair begin at the same column. Returns the column at whose vector a body that
    // returns something, which takes them in order, returned false.
    template <bool InOrder, typename Body>
    FUSEDLOSS_INLINE int64_t each_vector(const S* z, int64_t count, const Body& body) const {
        const auto take = [&](V x, int64_t at, int size) {
            if constexpr (std::is_void_v<decltype(body(x, at, size))>) {
                body(x, at, size);
                return true;
            } else {
                static_assert(InOrder, "of a pair one may be done");
                return body(x, at, size);
            }
        };
        int64_t at = 0;
        if constexpr (!InOrder && kPairs<S>) {
            for (; at + 2 * width <= count; at += 2 * width) {
                prefetch_after(z + at);
                const Pair x = load_pair(z + at);
                take(x.even * factor_, at, width);
                take(x.odd * factor_, at, width);
            }
        }
        for (; at + width <= count; at += width) {
            prefetch_after(z + at);
            if (!take(load(z + at) * factor_, at, width)) return at;
        }
        const int rest = static_cast<int>(count - at);
        if (rest > 0 && !take(load_part(z + at, rest, -kInfinity<T>, limit()) * factor_, at, rest)) return at;
        return count;
    }

    // Top, second and below are kept as values and the blocks that hold them.
    void keep_picks(const S* z, int64_t from, int64_t count, T max, T target_logit, Partial<T>& part) const {
        const Best<T>& least = job_.top_k > 1 ? part.second : part.top;
        if (job_.top_k > 0 && (least.index < 0 || max > least.value)) {
            insert(part.top, part.second, {max, from});
            if (job_.top_k > 1)
                insert(part.top, part.second, {max_but(z, count, static_cast<int>(find(z, count, max))), from});
        }
        if (job_.below) {
            const T below = max_below(z, count, target_logit);
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
        each_vector<true>(z, count, [&](V x, int64_t, int) {
            const Bits here = x == value ? column : Bits{} + kBlock;
            first = here < first ? here : first;
            column += width;
        });
        const int64_t index = least<T>(first);
        return index < count ? index : -1;
    }

    FUSEDLOSS_ONE_COPY T max_of(const S* z, int64_t count) const {
        V max = splat(-kInfinity<T>);
        each_vector<false>(z, count, [&](V x, int64_t, int) { max = greater(x, max); });
        return largest<T>(max);
    }

    // The largest logit of the columns but one (-1: none).
    FUSEDLOSS_ONE_COPY T max_but(const S* z, int64_t count, int hole) const {
        V max = splat(-kInfinity<T>);
        auto to_hole = lanes<T>() - hole;
        each_vector<true>(z, count, [&](V x, int64_t, int) {
            max = greater(to_hole == 0 ? splat(-kInfinity<T>) : x, max);
            to_hole += width;
        });
        return largest<T>(max);
    }

    // The largest logit below a bound.
    FUSEDLOSS_ONE_COPY T max_below(const S* z, int64_t count, T bound) const {
        V max = splat(-kInfinity<T>);
        each_vector<false>(z, count,
                           [&](V x, int64_t, int) { max = greater(x < bound ? x : splat(-kInfinity<T>), max); });
        return largest<T>(max);
    }

    // An ignored row is not looked at. It gets the statistics of two equal logits, one of them the target, so
    // that a user's loss function sees nothing that is not finite, and loss and coefficients of zero.
    void write_ignored(int64_t row) const {
        const int64_t n = job_.rows;
        const int picks = job_.picks();
        const T log2 = T(0.6931471805599453);
        const T neutral[kStatistics] = {T(0), T(2), T(0.5), log2, T(0), log2};
        for (int k = 0; k < kStatistics + picks; ++k) {
            static_cast<T*>(job_.statistics)[k * n + row] = k < kStatistics ? neutral[k] : T(0);
        }
        for (int k = 0; k < picks; ++k) job_.index[k * n + row] = -1;
        const T moments[kMoments] = {log2, T(0), T(0.5)};
        for (int k = 0; job_.moments && k < kMoments; ++k) {
            static_cast<T*>(job_.statistics)[(kStatistics + picks + k) * n + row] = moments[k];
        }
        for (int k = 0; job_.second && k < kSeconds; ++k) second_statistic(row)[k * n] = T(1);
        if (!job_.loss) return;
        static_cast<T*>(job_.loss)[row] = T(0);
        for (int k = 0; k < kCoefficients + picks; ++k) static_cast<T*>(job_.coefficients)[k * n + row] = T(0);
    }

    // --- epilogues ---

    T common(int k) const { return common_at<T>(job_.common, k); }

    Shared<T> shared() const {
        Shared<T> x;
        x.main = common(kMain);
        x.smooth = common(kSmooth);
        x.z_loss = common(kZLoss);
        x.weight_sum = T(weight_sum());
        return x;
    }

    template <typename Functor>
    FUSEDLOSS_ONE_COPY void finish(int64_t row, int threads, const RowStatistics<T>& s, Scratch<T>& scratch) const {
        const int64_t n = job_.rows;
        T* const loss = static_cast<T*>(job_.loss) + row;
        T* const coefficient = static_cast<T*>(job_.coefficients) + row;
        if constexpr (is_one_of<Functor>(ClassTerms{})) {
            const T z_slope = add_z_loss(s, weight_of(s.target), loss);
            finish_class_term<Functor>(row, threads, s, scratch, z_slope, loss, coefficient);
            for (int k = 0; k < s.picks; ++k) coefficient[(kCoefficients + k) * n] = T(0);
        } else {
            T params[kMaxParams];
            params_of(row, params);
            RowGradient<T> g;
            g.b = scratch.b.data();
            std::fill(scratch.b.begin(), scratch.b.end(), T(0));
            Functor::run(s, params, g);
            const T weight = weight_of(s.target);
            apply_shared(s, shared(), weight, job_.classes, g);
            *loss = g.loss;
            coefficient[kA * n] = g.a;
            const T smooth = common(kSmooth);
            coefficient[kU * n] = smooth;
            coefficient[kTargetGradient * n] = g.d - g.a * s.q - smooth * weight;
            for (int k = 0; k < s.picks; ++k) coefficient[(kCoefficients + k) * n] = g.b[k];
        }
    }

    // L = w z_loss lse^2, to which a term adds; returns the slope: dL/dz_j = slope p_j.
    T add_z_loss(const RowStatistics<T>& s, T weight, T* loss) const {
        const T lse = s.max + s.log_sum;
        const T factor = common(kZLoss) * weight;
        *loss = factor != T(0) ? factor * lse * lse : T(0);
        return factor != T(0) ? T(2) * factor * lse : T(0);
    }

    template <typename Term>
    ClassRow<T> class_row(int64_t row) const {
        ClassRow<T> terms;
        params_of(row, terms.params);
        terms.small.template set<Term>(terms.params, job_.classes);
        const T* const statistic = static_cast<const T*>(job_.statistics) + row;
        terms.max = statistic[kMax * job_.rows];
        terms.inverse = T(1) / statistic[kSumExp * job_.rows];
        terms.target = job_.target[row];
        terms.top = job_.index[row];
        return terms;
    }

    template <typename Term>
    void finish_class_term(int64_t row, int threads, const RowStatistics<T>& s, const Scratch<T>& scratch, T z_slope,
                           T* loss, T* coefficient) const {
        const int64_t n = job_.rows;
        const ClassRow<T> terms = class_row<Term>(row);
        const T inverse = terms.inverse, *const params = terms.params;
        const int64_t top = terms.top;
        const ClassPartial part = fold<ClassPartial>(
            threads, [&](int64_t begin, int64_t end) { return sweep<Term>(row, terms, begin, end, &scratch.powers); });

        // The target, where it is not the top class, and the top class, whose 1 - p comes from the others'
        // sum.
        double rest = part.rest, slope = part.slope, sum = part.loss;
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
        coefficient[kShift * n] = shift;
        coefficient[kTopGradient * n] = top_gradient;
        coefficient[kTargetGradient * n] = s.target == top ? top_gradient : target_p * (target_g - shift);
    }

    template <typename Term>
    static T positive_term(T p, T q, T weight, const T* params, T& h) {
        return Term::positive(p, q, ScalarPowers::pair(q, Term::exponent(params)), weight, params, h);
    }
    template <typename Term>
    static T negative_term_at(T p, T q, const T* params, T& h) {
        return Term::negative(p, q, Power<T>{ScalarPowers::value(q, Term::exponent(params)), T(0)}, params, h);
    }

    // Blocks whose powers are not in hand are read once more.
    template <typename Term>
    FUSEDLOSS_ONE_COPY ClassPartial sweep(int64_t row, const ClassRow<T>& terms, int64_t begin, int64_t end,
                                          const std::vector<Powers<T>>* powers = nullptr) const {
        ClassPartial part;
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

    // Takes the target and the top class from the columns of a block.
    struct Holes {
        Bits to_top, to_target;
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

    // Adds the sums of small terms, without the top class's where that is among them; returns false if one is not
    // small.
    FUSEDLOSS_ONE_COPY bool take_powers(const ClassRow<T>& terms, const Powers<T>& block, bool top,
                                        ClassPartial& part) const {
        // The powers of numbers up to exp(kSlack / 2) are finite.
        if (!(std::exp(block.max - terms.max) * terms.inverse <= terms.small.limit)) return false;
        if (block.max - block.base > kSlack / 2) return false;
        const double unit = std::exp(double(block.base) - terms.max), own = top ? 1 / unit : 0;
        double raised = unit * terms.inverse, power = own;
        part.rest += (block.rest - own) * unit;
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
                                          ClassPartial& part) const {
        if (!(row.small.limit > T(0))) return from;
        const T bound = row.small.limit / row.inverse;
        V rest{}, power[kTerms<T>] = {};
        Holes holes(row, from, to);
        const int64_t count = each_vector<true>(z + from, to - from, [&](V x, int64_t at, int size) {
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
                                         ClassPartial& part) const {
        V rest{}, loss{}, slope{};
        Holes holes(row, from, to);
        const int64_t count = each_vector<true>(z + from, to - from, [&](V x, int64_t at, int size) {
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
        part.rest += total<T>(rest);
        part.loss += total<T>(loss);
        part.slope += total<T>(slope);
        return from + count;
    }

    // --- pair terms ---

    T* second_statistic(int64_t row) const {
        const int after = kStatistics + job_.picks() + (job_.moments ? kMoments : 0);
        return static_cast<T*>(job_.statistics) + after * job_.rows + row;
    }

    // visit(Term{}): the term is chosen where its arithmetic is, so that nothing else is compiled once for each. Of
    // rows as they are stored it is a term of logits. `params` are a row's.
    template <typename Row = T, typename Visit>
    void with_pair_term(const T* params, const Visit& visit) const {
        with_functor(
            job_.epilogue,
            [&](auto* functor) {
                using Term = std::remove_pointer_t<decltype(functor)>;
                constexpr bool stored = !std::is_same_v<std::decay_t<Row>, T>;
                if constexpr (std::is_same_v<Term, MixtureKl>) {
                    if (params && EvenMixtureKl::takes(params)) return visit(EvenMixtureKl{});
                }
                if constexpr (!std::is_void_v<Term>) {
                    if constexpr (Term::of_logits || !stored) visit(Term{});
                }
            },
            PairTerms{});
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
        const int64_t n = job_.rows;
        PairRow<T> pair{};
        params_of(row, pair.params);
        const T* const statistic = static_cast<const T*>(job_.statistics) + row;
        const T* const more = second_statistic(row);
        const T sum = statistic[kSumExp * n], second_sum = more[kSecondSum * n];
        pair.max = statistic[kMax * n], pair.second_max = more[kSecondMax * n];
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

    PairPartial pair_sums(int64_t row, const PairRow<T>& pair, int64_t begin, int64_t end, T* kept = nullptr) const {
        PairPartial part;
        each_pair_block(row, pair, begin, end,
                        [&](const auto* x, const auto* second, int64_t from, int64_t count, const Ahead& ahead) {
                            with_pair_term<decltype(*x)>(pair.params, [&](auto term) {
                                T* const to = kept ? kept + 2 * from : nullptr;
                                merge(part, sum_pairs<decltype(term)>(pair, x, second, count, ahead, to));
                            });
                        });
        return part;
    }

    PairPartial pair_sums(int64_t row, const PairRow<T>& pair, int threads, T* kept = nullptr) const {
        return fold<PairPartial>(threads,
                                 [&](int64_t begin, int64_t end) { return pair_sums(row, pair, begin, end, kept); });
    }

    FUSEDLOSS_ONE_COPY void finish_pair_term(int64_t row, int threads, const RowStatistics<T>& s, T* kept) const {
        const int64_t n = job_.rows;
        T* const loss = static_cast<T*>(job_.loss) + row;
        T* const coefficient = static_cast<T*>(job_.coefficients) + row;
        T* const more = second_statistic(row);
        more[kSecondMax * n] = T(0), more[kSecondSum * n] = T(1), more[kPlainSum * n] = s.sum_exp;
        if (has_teacher()) {
            Job job = job_;
            job.logits = job_.second, job.row_stride = job_.second_row_stride;
            // As the first row's, so that equal rows have the same bits.
            const RowStatistics<T> second = Engine(job).softmax_of(row, threads, s.target);
            more[kSecondMax * n] = second.max, more[kSecondSum * n] = second.sum_exp;
        }
        const PairRow<T> pair = pair_row(row);
        const T main = common(kMain), hard = hard_weight(pair.params);
        T curvature = T(0);
        with_pair_term(pair.params, [&](auto term) { curvature = decltype(term)::curvature(pair.params); });
        RowStatistics<T> plain = s;
        if (hard != T(0) && factor_ != T(1)) {
            Job job = job_;
            job.common = nullptr;
            plain = Engine(job).softmax_of(row, threads, s.target);
            more[kPlainSum * n] = plain.sum_exp * std::exp(plain.max - s.max / factor_);
        }
        const PairPartial sum = pair_sums(row, pair, threads, kept);
        const T at_target = T(pair_sums(row, pair, s.target, s.target + 1).slope);
        const T z_slope = add_z_loss(s, T(1), loss);
        const T slope = main * T(sum.slope);
        *loss += main * T(whole_loss(sum.loss, sum.slope, sum.difference, double(curvature)));
        if (hard != T(0)) *loss += hard * plain.ce;
        // Without a temperature both are factors of the same exponentials.
        const bool apart = hard != T(0) && factor_ != T(1);
        coefficient[kShift * n] = slope - z_slope - (apart ? T(0) : hard);
        coefficient[kPlain * n] = apart ? hard / (factor_ * more[kPlainSum * n]) : T(0);
        coefficient[kTargetGradient * n] = main * at_target - s.p * (slope - z_slope) - hard / factor_ * plain.q;
        for (int k = 0; k < s.picks; ++k) coefficient[(kCoefficients + k) * n] = T(0);
    }

    // --- both of these for narrow rows: as many side by side as a vector has lanes ---

    template <typename Functor>
    bool narrow() const {
        if (job_.classes > kNarrow || job_.top_k > 1 || job_.picks() != job_.top_k || job_.mean || job_.moments) {
            return false;
        }
        if constexpr (std::is_same_v<Functor, AnyPair>) {
            T params[kMaxParams];
            if (job_.rows > 0) params_of(0, params);
            for (int k = 0; k < kMaxParams && job_.param[k]; ++k) {
                if (job_.param_stride[k] != 0 && job_.rows > 1) return false;
            }
            return job_.rows > 0 && (factor_ == T(1) || hard_weight(params) == T(0));
        }
        return true;
    }

    template <typename Functor>
    void side_by_side() const {
        const int64_t groups = (job_.rows + width - 1) / width;
        const Job later = job_.of_gradient();
        const Engine gradient(later);
        parallel_for(groups, threads_for(job_.rows), [&](int64_t begin, int64_t end) {
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
            rows.alone[i] = ignored(first + i);
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
    T* statistic(int k) const { return static_cast<T*>(job_.statistics) + k * job_.rows; }
    T* coefficient(int k) const { return static_cast<T*>(job_.coefficients) + k * job_.rows; }

    void put_statistics(const Group& rows, const Lanes& s) const {
        put(rows, statistic(kMax), s.max);
        put(rows, statistic(kSumExp), s.sum_exp);
        put(rows, statistic(kQ), s.q);
        put(rows, statistic(kCe), s.ce);
        put(rows, statistic(kTargetLogit), s.target_logit);
        put(rows, statistic(kMeanCe), V{});
        if (job_.top_k == 0) return;
        put(rows, statistic(kStatistics), s.max);
        for (int i = 0; i < rows.count; ++i) job_.index[rows.first + i] = s.top[i];
    }

    // The gradients in the lanes, and what is left to the scalar code.
    template <typename Functor>
    void finish_group(const Group& rows, const V* g, const Engine& gradient, Scratch<T>& scratch) const {
        S lane[kNarrow][width];
        for (int j = 0; job_.grad && j < job_.classes; ++j) store(lane[j], g[j]);
        for (int i = 0; i < rows.count; ++i) {
            const int64_t row = rows.first + i;
            if (rows.alone[i]) {
                one_by_one<Functor>(row, 1, scratch);
                if (job_.grad) gradient.template write_gradient<TermOf<Functor>>(row, 1, scratch);
            } else if (job_.grad) {
                S* const grad = static_cast<S*>(job_.grad) + row * job_.grad_row_stride;
                for (int j = 0; j < job_.classes; ++j) grad[j] = lane[j][i];
            }
        }
    }

    template <typename Functor>
    FUSEDLOSS_ONE_COPY void group(int64_t first, const Engine& gradient, Scratch<T>& scratch) const {
        if constexpr (std::is_same_v<Functor, AnyPair>) {
            T params[kMaxParams];
            params_of(first, params);
            with_pair_term(params, [&](auto term) { pair_group<decltype(term)>(first, params, gradient, scratch); });
        } else {
            row_group<Functor>(first, gradient, scratch);
        }
    }

    template <typename Functor>
    FUSEDLOSS_INLINE void row_group(int64_t first, const Engine& gradient, Scratch<T>& scratch) const {
        const int classes = static_cast<int>(job_.classes);
        Group rows = group_at(first);
        V x[kNarrow], params[kMaxParams];
        take_lanes(rows, logits(0), job_.row_stride, [&](V z, int) { return z * factor_; }, x);
        for (int k = 0; k < kMaxParams && job_.param[k]; ++k) {
            const T* const param = static_cast<const T*>(job_.param[k]);
            params[k] = lanes_of(rows, [&](int64_t row) { return param[row * job_.param_stride[k]]; });
        }
        const Lanes s(x, classes, rows.target);
        put_statistics(rows, s);
        const auto target = rows.target, top = s.top;
        const V p = s.p, inverse = s.inverse;
        const V factor = lanes_of(rows, [&](int64_t row) { return upstream_of(row); });
        if constexpr (is_one_of<Functor>(ClassTerms{})) {
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
            put(rows, static_cast<T*>(job_.loss), loss);
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
            apply_shared(row, shared(), weight, job_.classes, g);
            const V target_gradient = g.d - g.a * s.q - smooth * weight;
            put(rows, static_cast<T*>(job_.loss), g.loss);
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
    FUSEDLOSS_ONE_COPY void pair_group(int64_t first, const T* params, const Engine& gradient,
                                       Scratch<T>& scratch) const {
        const int classes = static_cast<int>(job_.classes);
        Group rows = group_at(first);
        V x[kNarrow], second[kNarrow];
        const auto of_logits = [&](V z, int) { return z * factor_; };
        take_lanes(rows, logits(0), job_.row_stride, of_logits, x);
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
        T* const more = statistic(kStatistics + job_.picks());
        put(rows, more + kSecondMax * job_.rows, pair.second_max);
        put(rows, more + kSecondSum * job_.rows, second_sum);
        put(rows, more + kPlainSum * job_.rows, s.sum_exp);

        const T main = common(kMain), z_loss = common(kZLoss), curvature = Term::curvature(params);
        const T hard = hard_weight(params);
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
        put(rows, static_cast<T*>(job_.loss), loss);
        put(rows, coefficient(kShift), shift);
        put(rows, coefficient(kPlain), V{});
        put(rows, coefficient(kTargetGradient), target_gradient);
        for (int k = 0; k < job_.top_k; ++k) put(rows, coefficient(kCoefficients + k), V{});
        const V factor = lanes_of(rows, [&](int64_t row) { return upstream_of(row); });
        for (int j = 0; job_.grad && j < classes; ++j) {
            x[j] = (rows.target == j ? target_gradient : second[j] * main - x[j] * shift) * factor;
        }
        finish_group<AnyPair>(rows, x, gradient, scratch);
    }

    // --- sums over the rows ---

    // 1 - p of a row's top class, for which only p > 0.5 needs a look at the other classes.
    T top_rest(int64_t row) const {
        const int64_t n = job_.rows, top = job_.index[row];
        const T* const statistic = static_cast<const T*>(job_.statistics) + row;
        if (top == job_.target[row]) return statistic[kQ * n];
        const S* z = logits(row);
        const T max = statistic[kMax * n], sum_exp = statistic[kSumExp * n];
        if (sum_exp >= T(2)) return T(1) - T(1) / sum_exp;
        double rest = 0;
        for (int64_t from = 0; from < job_.classes; from += kBlock) {
            rest += sum_block<kNoMoments>(z, from, std::min(kBlock, job_.classes - from), top, max, T(0)).rest;
        }
        return T(rest) / sum_exp;
    }

    // Adds a row to the sums of a block of columns: the terms at y = 0 to `sum`, the others to those of all columns.
    template <typename Term>
    void add_row(int64_t row, int64_t from, T top_q, T* sum, double* error, double* agreement) const {
        const int64_t to = std::min(from + kBlock, job_.classes);
        const S* const z = logits(row);
        const ClassRow<T> terms = class_row<Term>(row);
        const T max = terms.max, inverse = terms.inverse, *const params = terms.params;
        const T weight = upstream_of(row);
        const int64_t top = terms.top, target = terms.target;
        int64_t at = add_small(terms, z, from, to, weight, sum);
        at = add_terms<true, Term>(terms, z, at, to, weight, sum + (at - from));
        add_terms<false, Term>(terms, z, at, to, weight, sum + (at - from));
        if (target >= from && target < to) {
            const bool is_top = target == top;
            const T p = is_top ? inverse : std::exp(logit(z + target) - max) * inverse;
            const T q = is_top ? top_q : T(1) - p;
            const Overlap<T> x = Term::Math::positive(p, q, ScalarPowers::pair(q, Term::exponent(params)), params);
            error[target] += double(weight * x.error);
            agreement[target] += double(weight * x.agreement);
        }
        if (top >= from && top < to && target != top) {
            T slope;
            error[top] += double(weight * negative_term_at<Term>(inverse, top_q, params, slope));
        }
    }

    // Returns the column before which all probabilities were small, as a polynomial in exp(z - max).
    FUSEDLOSS_ONE_COPY int64_t add_small(const ClassRow<T>& row, const S* z, int64_t from, int64_t to, T weight,
                                         T* sum) const {
        if (!(row.small.limit > T(0))) return from;
        T loss[kTerms<T>];
        row.small.scale(row.small.loss, row.inverse * weight, row.inverse, loss);
        const T bound = row.small.limit / row.inverse;
        Holes holes(row, from, to);
        return from + each_vector<true>(z + from, to - from, [&](V x, int64_t at, int) {
                   const V e = holes.without(exp_bounded<T>(x - row.max));
                   if (exceeds<T>(e, bound)) return false;
                   store(sum + at, load(sum + at) + e * row.small.evaluate(loss, e));
                   return true;
               });
    }

    template <bool Small, typename Term>
    FUSEDLOSS_ONE_COPY int64_t add_terms(const ClassRow<T>& row, const S* z, int64_t from, int64_t to, T weight,
                                         T* sum) const {
        Holes holes(row, from, to);
        return from + each_vector<true>(z + from, to - from, [&](V x, int64_t at, int) {
                   const V p = holes.without(exp_bounded<T>(x - row.max)) * row.inverse;
                   if (Small && exceeds<T>(p, row.small.power_limit)) return false;
                   V slope;
                   store(sum + at, load(sum + at) + negative_term<Small, Term>(row, p, slope) * weight);
                   return true;
               });
    }

    // --- gradient pass ---

    template <typename Functor>
    FUSEDLOSS_ONE_COPY void write_gradient(int64_t row, int threads, Scratch<T>& scratch) const {
        const S* z = logits(row);
        S* grad = static_cast<S*>(job_.grad) + row * job_.grad_row_stride;
        if (ignored(row)) {
            std::fill(grad, grad + job_.classes, S{});
            return;
        }
        const int64_t n = job_.rows;
        const T* const statistic = static_cast<const T*>(job_.statistics) + row;
        const T* const coefficient = static_cast<const T*>(job_.coefficients) + row;
        const T max = statistic[kMax * n];
        const T inverse = T(1) / statistic[kSumExp * n];
        const T upstream = upstream_of(row);
        const int64_t target = job_.target[row];
        const T target_gradient = coefficient[kTargetGradient * n] * upstream;

        // Read before the logits are overwritten, written after.
        Exception<T>* const exceptions = scratch.exceptions.data();
        Exception<T>* last = exceptions;
        *last++ = {target, target_gradient};
        if constexpr (std::is_same_v<Functor, AnyPair>) {
            const T shift = coefficient[kShift * n], plain = coefficient[kPlain * n], main = common(kMain);
            over_chunks(threads, [&](int64_t begin, int64_t end) {
                if (plain == T(0) && !scratch.kept.empty()) {
                    kept_gradient(scratch.kept.data(), grad, begin, end, main * upstream, shift * upstream);
                } else {
                    pair_gradient(row, grad, begin, end, main * upstream, shift * upstream, plain * upstream);
                }
            });
        } else if constexpr (is_one_of<Functor>(ClassTerms{})) {
            const ClassRow<T> terms = class_row<Functor>(row);
            *last++ = {terms.top, coefficient[kTopGradient * n] * upstream};
            const T shift = coefficient[kShift * n];
            over_chunks(threads, [&](int64_t begin, int64_t end) {
                for (int64_t from = begin; from < end; from += kBlock) {
                    const int64_t to = std::min(from + kBlock, end);
                    int64_t at = class_weight() ? small_gradient<true>(terms, z, grad, from, to, upstream, shift)
                                                : small_gradient<false>(terms, z, grad, from, to, upstream, shift);
                    at = class_gradient<true, Functor>(terms, z, grad, at, to, upstream, shift);
                    class_gradient<false, Functor>(terms, z, grad, at, to, upstream, shift);
                }
            });
        } else {
            const T a = coefficient[kA * n] * inverse * upstream, u = coefficient[kU * n] * upstream;
            const int picks = job_.picks();
            const T* const slope = coefficient + (kCoefficients + picks) * n;
            const T by_excess = job_.moments ? slope[kOfExcess * n] * inverse * upstream : T(0);
            const T by_power = job_.moments ? slope[kOfPower * n] * inverse * inverse * upstream : T(0);
            const Slopes<T> slopes{a, by_excess, by_power};
            for (int k = 0; k < picks; ++k) {
                const int64_t column = job_.index[k * n + row];
                const T b = coefficient[(kCoefficients + k) * n] * upstream;
                if (column < 0 || b == T(0)) continue;
                const auto same = [&](const Exception<T>& x) { return x.column == column; };
                Exception<T>* const at = std::find_if(exceptions, last, same);
                if (at == last) {
                    const T x = logit(z + column), lag = x == max ? T(0) : std::max(x - max, kLeastLag<T>);
                    *last++ = {column, slopes.gradient(std::exp(lag), lag) - u * weight_of(column)};
                }
                at->value -= b;
            }
            over_chunks(threads, [&](int64_t begin, int64_t end) {
                if (job_.moments) {
                    class_weight() ? moment_gradient<true>(z, grad, begin, end, max, slopes, u)
                                   : moment_gradient<false>(z, grad, begin, end, max, slopes, u);
                } else if (u == T(0)) {
                    row_gradient<0>(z, grad, begin, end, max, a, u);
                } else if (!class_weight()) {
                    row_gradient<1>(z, grad, begin, end, max, a, u);
                } else {
                    row_gradient<2>(z, grad, begin, end, max, a, u);
                }
            });
        }
        for (const Exception<T>* x = exceptions; x != last; ++x) {
            if (x->column >= 0) write(grad + x->column, x->value);
        }
    }

    template <typename Body>
    void over_chunks(int threads, const Body& body) const {
        if (threads == 1) return body(int64_t(0), job_.classes);
        parallel_for(chunks(), threads,
                     [&](int64_t begin, int64_t end) { body(begin * kChunk, std::min(end * kChunk, job_.classes)); });
    }

    // grad[column] = formula(logits, column, columns), a vector at a time; the two may be the same memory. Returns the
    // column before which nothing was written, where after a formula stop() is true.
    template <bool InOrder, typename Formula, typename Stop = std::false_type>
    FUSEDLOSS_INLINE int64_t transform(const S* z, S* grad, int64_t begin, int64_t end, const Formula& formula,
                                       const Stop& stop = {}) const {
        int64_t column = begin;
        if constexpr (!InOrder && kPairs<S>) {
            for (; column + 2 * width <= end; column += 2 * width) {
                prefetch_after(z + column);
                const Pair x = load_pair(z + column);
                const auto even = formula(x.even * factor_, column, width),
                           odd = formula(x.odd * factor_, column, width);
                if (stop()) return column;
                store_pair(grad + column, even, odd);
            }
        }
        for (; column + width <= end; column += width) {
            prefetch_after(z + column);
            const auto x = formula(load(z + column) * factor_, column, width);
            if (stop()) return column;
            store(grad + column, x);
        }
        if (column < end) {
            const int rest = static_cast<int>(end - column);
            const auto x = formula(load_part(z + column, rest, -kInfinity<T>, limit()) * factor_, column, rest);
            if (stop()) return column;
            store_part(grad + column, rest, x);
        }
        return end;
    }

    // a exp(z - max) - u w; Smooth: 0 without u, 1 with u, 2 with class weights too
    template <int Smooth>
    FUSEDLOSS_ONE_COPY void row_gradient(const S* z, S* grad, int64_t begin, int64_t end, T max, T a, T u) const {
        if constexpr (std::is_same_v<S, bfloat16> && Smooth == 0) {
            if (job_.classes > kNarrow && RoundedExp::takes(a)) {
                const RoundedExp exp(a);
                transform<false>(z, grad, begin, end, [&](V x, int64_t, int) { return exp(x - max); });
                return;
            }
        }
        transform<Smooth == 2>(z, grad, begin, end, [&](V x, int64_t column, int size) {
            const V p = exp_bounded<T>(x - max) * a;
            return Smooth == 0 ? p : Smooth == 1 ? p - u : p - load_weight(column, size) * u;
        });
    }

    // The same with slopes of moments.
    template <bool Weighted>
    FUSEDLOSS_ONE_COPY void moment_gradient(const S* z, S* grad, int64_t begin, int64_t end, T max,
                                            const Slopes<T>& slopes, T u) const {
        const auto smoothing = [&](int64_t column, int size) {
            return Weighted ? load_weight(column, size) * u : splat(u);
        };
        if (slopes.by_excess == T(0)) {
            transform<Weighted>(z, grad, begin, end, [&](V x, int64_t column, int size) {
                const V e = exp_bounded<T>(x - max);
                return e * (e * slopes.by_power + slopes.a) - smoothing(column, size);
            });
            return;
        }
        transform<Weighted>(z, grad, begin, end, [&](V x, int64_t column, int size) {
            // A compiler may round the product with the factor in one place and not in another.
            const V lag = x == max ? V{} : x - max;
            return slopes.gradient(exp_bounded<T>(lag), bounded(lag)) - smoothing(column, size);
        });
    }

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
        return class_weight() ? transform<true>(z, grad, begin, end, formula, stop)
                              : transform<false>(z, grad, begin, end, formula, stop);
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
        return transform<Weighted>(z, grad, begin, end, formula, [&] { return exceeds<T>(most, bound); });
    }

    // The same from p and h in hand.
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

    // The gradient may be the logits' memory.
    void pair_gradient(int64_t row, S* grad, int64_t begin, int64_t end, T main, T shift, T plain) const {
        const PairRow<T> pair = pair_row(row);
        const PairFactors<T> factors{factor_, main, shift, plain};
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

    template <typename Functor, typename... Terms>
    static constexpr bool is_one_of(FunctorList<Terms...>) {
        return (std::is_same_v<Functor, Terms> || ...);
    }

    // The gradient has the same form for every row epilogue, so that only terms need their functor.
    template <typename Functor>
    using TermOf =
        std::conditional_t<is_one_of<Functor>(ClassTerms{}) || std::is_same_v<Functor, AnyPair>, Functor, void>;

    const Job& job_;
    const T factor_;  // of the logits
};

template <typename Visit>
void with_storage(DType dtype, const Visit& visit) {
    switch (dtype) {
        case DType::float64:
            return visit(double{});
        case DType::float32:
            return visit(float{});
        case DType::bfloat16:
            return visit(bfloat16{});
        case DType::float16:
            return visit(float16{});
    }
}

// Calls pass(engine, functor) with a null pointer to the job's functor among those of the list, to void for none.
template <typename Pass, typename... Functors>
void run(const Job& job, int number, FunctorList<Functors...> functors, const Pass& pass) {
    with_storage(job.dtype, [&](auto storage) {
        const Engine<decltype(storage)> engine(job);
        with_functor(number, [&](auto* functor) { pass(engine, functor); }, functors);
    });
}

template <typename Pointer>
using Pointed = std::remove_pointer_t<Pointer>;

}  // namespace

void forward(const Job& job) {
    const auto pass = [](const auto& engine, auto* functor) { engine.template forward<Pointed<decltype(functor)>>(); };
    if (job.kind == kPairTerm) return run(job, 0, AnyPairTerm{}, pass);
    job.kind == kClassTerm ? run(job, job.epilogue, ClassTerms{}, pass) : run(job, job.epilogue, RowEpilogues{}, pass);
}

void backward(const Job& job) {
    const auto pass = [](const auto& engine, auto* functor) { engine.template backward<Pointed<decltype(functor)>>(); };
    if (job.kind == kPairTerm) return run(job, 0, AnyPairTerm{}, pass);
    run(job, job.kind == kClassTerm ? job.epilogue : -1, ClassTerms{}, pass);
}

void class_sums(const Job& job) {
    run(job, job.epilogue, SummedTerms{}, [](const auto& engine, auto* functor) {
        using Term = Pointed<decltype(functor)>;
        if constexpr (!std::is_void_v<Term>) engine.template class_sums<Term>();
    });
}

void term_sums(const Job& job) {
    const auto pass = [](const auto& engine, auto* functor) {
        using Term = Pointed<decltype(functor)>;
        if constexpr (!std::is_void_v<Term>) engine.template term_sums<Term>();
    };
    job.kind == kPairTerm ? run(job, 0, AnyPairTerm{}, pass) : run(job, job.epilogue, ClassTerms{}, pass);
}

void class_terms(const Job& job) {
    run(job, job.epilogue, SummedTerms{}, [](const auto& engine, auto* functor) {
        using Term = Pointed<decltype(functor)>;
        if constexpr (!std::is_void_v<Term>) engine.template class_terms<Term>();
    });
}

}  // namespace FUSEDLOSS_ISA
}  // namespace fusedloss
