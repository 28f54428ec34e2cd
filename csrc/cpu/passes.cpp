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

// pass(S{}, functor), S the type of the logits, with a null pointer to the job's functor among those of the list, to
// void for none.
template <typename Pass, typename... Functors>
void run(const Job& job, int number, FunctorList<Functors...> functors, const Pass& pass) {
    with_storage(job.dtype,
                 [&](auto storage) { with_functor(number, [&](auto* functor) { pass(storage, functor); }, functors); });
}

template <typename Pointer>
using Pointed = std::remove_pointer_t<Pointer>;

// pass(S{}, Term{}) of the job's class term among those of the list.
template <typename Terms, typename Pass>
void run_term(const Job& job, Terms terms, const Pass& pass) {
    run(job, job.epilogue, terms, [&](auto storage, auto* functor) {
        using Term = Pointed<decltype(functor)>;
        if constexpr (!std::is_void_v<Term>) pass(storage, Term{});
    });
}

}  // namespace

void forward(const Job& job) {
    const auto pass = [&](auto storage, auto* functor) {
        NarrowPass<decltype(storage)>(job).template forward<Pointed<decltype(functor)>>();
    };
    if (job.kind == kPairTerm) return run(job, 0, AnyPairTerm{}, pass);
    job.kind == kClassTerm ? run(job, job.epilogue, ClassTerms{}, pass) : run(job, job.epilogue, RowEpilogues{}, pass);
}

void backward(const Job& job) {
    const auto pass = [&](auto storage, auto* functor) {
        GradientPass<decltype(storage)>(job).template backward<Pointed<decltype(functor)>>();
    };
    if (job.kind == kPairTerm) return run(job, 0, AnyPairTerm{}, pass);
    run(job, job.kind == kClassTerm ? job.epilogue : -1, ClassTerms{}, pass);
}

void class_sums(const Job& job) {
    run_term(job, SummedTerms{}, [&](auto storage, auto term) {
        ClassSumsPass<decltype(storage)>(job).template class_sums<decltype(term)>();
    });
}

void class_terms(const Job& job) {
    run_term(job, SummedTerms{}, [&](auto storage, auto term) {
        NarrowPass<decltype(storage)>(job).template class_terms<decltype(term)>();
    });
}

void term_sums(const Job& job) {
    if (job.kind == kPairTerm) {
        return with_storage(job.dtype, [&](auto storage) { PairTermPass<decltype(storage)>(job).term_sums(); });
    }
    run_term(job, ClassTerms{}, [&](auto storage, auto term) {
        ClassTermPass<decltype(storage)>(job).template term_sums<decltype(term)>();
    });
}

}  // namespace fusedloss::FUSEDLOSS_ISA
