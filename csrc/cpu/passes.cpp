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
#include "class_sums.h"
#include "narrow.h"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

// pass(S{}), S the type of the logits.
template <typename Pass>
void with_storage(const Job& job, const Pass& pass) {
    with_functor(static_cast<int>(job.dtype), FunctorList<double, float, bfloat16, float16>{}, pass);
}

}  // namespace

void forward(const Job& job) {
    with_storage(job, [&](auto storage) {
        const NarrowPass<decltype(storage)> pass(job);
        const auto of = [&](auto functor) { pass.template forward<decltype(functor)>(); };
        if (job.kind == kPairTerm) return of(AnyPair{});
        if (job.epilogue < 0) return pass.template forward<void>();
        job.kind == kClassTerm ? with_functor(job.epilogue, ClassTerms{}, of)
                               : with_functor(job.epilogue, RowEpilogues{}, of);
    });
}

void backward(const Job& job) {
    with_storage(job, [&](auto storage) {
        const GradientPass<decltype(storage)> pass(job);
        const auto of = [&](auto functor) { pass.template backward<decltype(functor)>(); };
        if (job.kind == kPairTerm) return of(AnyPair{});
        job.kind == kClassTerm ? with_functor(job.epilogue, ClassTerms{}, of) : pass.template backward<void>();
    });
}

void class_sums(const Job& job) {
    with_storage(job, [&](auto storage) {
        const ClassSumsPass<decltype(storage)> pass(job);
        with_functor(job.epilogue, SummedTerms{}, [&](auto term) { pass.template class_sums<decltype(term)>(); });
    });
}

void class_terms(const Job& job) {
    with_storage(job, [&](auto storage) {
        const NarrowPass<decltype(storage)> pass(job);
        with_functor(job.epilogue, SummedTerms{}, [&](auto term) { pass.template class_terms<decltype(term)>(); });
    });
}

void term_sums(const Job& job) {
    with_storage(job, [&](auto storage) {
        if (job.kind == kPairTerm) return PairTermPass<decltype(storage)>(job).term_sums();
        const ClassTermPass<decltype(storage)> pass(job);
        with_functor(job.epilogue, ClassTerms{}, [&](auto term) { pass.template term_sums<decltype(term)>(); });
    });
}

}  // namespace fusedloss::FUSEDLOSS_ISA
