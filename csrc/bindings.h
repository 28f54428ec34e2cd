// What the bindings of the CPU engine and of the CUDA kernels share.
#pragma once

#include <pybind11/pybind11.h>

#include "epilogues.h"

namespace fusedloss {

// {name: number of parameters} of epilogues, in the order of the list. Inside of a sum over the rows an epilogue lacks
// the last of its parameters.
template <typename... Functors>
pybind11::dict parameters_of(FunctorList<Functors...>) {
    static_assert(((Functors::param_count <= kMaxParams) && ...), "the engines hold kMaxParams parameters of a row");
    pybind11::dict result;
    ((result[Functors::name] = Functors::param_count), ...);
    return result;
}

template <typename... Functors>
pybind11::dict parameters_of_sums(FunctorList<Functors...>) {
    pybind11::dict result;
    ((result[Functors::name] = Functors::Math::count), ...);
    return result;
}

// Those of rows, of classes, and of sums over the rows.
inline pybind11::tuple epilogues() {
    return pybind11::make_tuple(parameters_of(RowEpilogues{}), parameters_of(ClassTerms{}),
                                parameters_of_sums(SummedTerms{}));
}

}  // namespace fusedloss
