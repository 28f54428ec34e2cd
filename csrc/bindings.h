// What the bindings of the CPU engine and of the CUDA kernels share. Tensors arrive as integer addresses, so that
// nothing here links torch.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <utility>
#include <vector>

#include "job.h"

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

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// A job, or a launch of one, whose members are given in their order.
template <typename J>
pybind11::class_<J> bind_job(pybind11::module_& module, const char* name) {
    return pybind11::class_<J>(module, name)
        .def(pybind11::init([](int dtype, Address logits, int64_t rows, int64_t classes, int64_t row_stride,
                               Address target, Address candidates, int candidate_count, int top_k, bool below,
                               bool mean, int moments, Address class_weight, Address weight_sum, int epilogue, int kind,
                               const std::vector<std::pair<Address, int64_t>>& params, Address common, Address second,
                               int64_t second_row_stride, Address loss, Address statistics, Address index,
                               Address coefficients, Address grad, int64_t grad_row_stride, Address upstream,
                               int64_t upstream_stride, Address sums, Address top_q, int threads) {
            J job{};
            static_cast<Job&>(job) = {static_cast<DType>(dtype),
                                      at<void>(logits),
                                      rows,
                                      classes,
                                      row_stride,
                                      at<const int64_t>(target),
                                      at<const int64_t>(candidates),
                                      candidate_count,
                                      top_k,
                                      below,
                                      mean,
                                      moments,
                                      at<void>(class_weight),
                                      at<const double>(weight_sum),
                                      epilogue,
                                      kind,
                                      at<void>(common),
                                      at<void>(second),
                                      second_row_stride,
                                      at<void>(loss),
                                      at<void>(statistics),
                                      at<int64_t>(index),
                                      at<void>(coefficients),
                                      at<void>(grad),
                                      grad_row_stride,
                                      at<void>(upstream),
                                      upstream_stride,
                                      at<double>(sums),
                                      at<void>(top_q),
                                      threads};
            if (params.size() > kMaxParams) throw std::invalid_argument("an epilogue takes at most 4 parameters");
            for (size_t k = 0; k < params.size(); ++k) {
                job.param[k] = at<void>(params[k].first);
                job.param_stride[k] = params[k].second;
            }
            return job;
        }));
}

// Those of rows, of classes, of pairs, and of sums over the rows.
inline pybind11::tuple epilogues() {
    return pybind11::make_tuple(parameters_of(RowEpilogues{}), parameters_of(ClassTerms{}), parameters_of(PairTerms{}),
                                parameters_of_sums(SummedTerms{}));
}

}  // namespace fusedloss
