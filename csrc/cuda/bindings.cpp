// Python bindings of the CUDA kernels. Tensors arrive as integer addresses, so that nothing here links torch.
#include "../bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "job.h"

namespace py = pybind11;

namespace fusedloss {
namespace cuda {
namespace {

struct Launches {
    void (*run)(const Job&);
    void (*sum)(const Job&);
    void (*scale)(const Job&);
    int (*shared_bytes)(const Job&);
};

Launches launches(int dtype) {
    switch (static_cast<DType>(dtype)) {
        case DType::float64:
            return {run_float64, sum_float64, scale_float64, shared_bytes_float64};
        case DType::float32:
            return {run_float32, sum_float32, scale_float32, shared_bytes_float32};
        case DType::bfloat16:
            return {run_bfloat16, sum_bfloat16, scale_bfloat16, shared_bytes_bfloat16};
        case DType::float16:
            return {run_float16, sum_float16, scale_float16, shared_bytes_float16};
    }
    throw std::invalid_argument("no dtype numbered " + std::to_string(dtype));
}

// A member that holds an address.
template <typename Pointer>
void add_address(py::class_<Job>& job, const char* name, Pointer Job::* member) {
    job.def_property(
        name, [member](const Job& x) { return reinterpret_cast<std::uintptr_t>(x.*member); },
        [member](Job& x, std::uintptr_t address) { x.*member = reinterpret_cast<Pointer>(address); });
}

}  // namespace
}  // namespace cuda
}  // namespace fusedloss

PYBIND11_MODULE(FUSEDLOSS_MODULE, module) {
    using namespace fusedloss;
    using namespace fusedloss::cuda;
    module.doc() = "fusedloss CUDA kernels: statistics and gradient passes over rows of logits";

    py::class_<Job> job(module, "Job");
    job.def(py::init([] { return Job{}; }));
    add_address(job, "logits", &Job::logits);
    add_address(job, "target", &Job::target);
    add_address(job, "candidates", &Job::candidates);
    add_address(job, "class_weight", &Job::class_weight);
    add_address(job, "weight_sum", &Job::weight_sum);
    add_address(job, "common", &Job::common);
    add_address(job, "loss", &Job::loss);
    add_address(job, "statistics", &Job::statistics);
    add_address(job, "index", &Job::index);
    add_address(job, "coefficients", &Job::coefficients);
    add_address(job, "grad", &Job::grad);
    add_address(job, "upstream", &Job::upstream);
    add_address(job, "sums", &Job::sums);
    add_address(job, "top_q", &Job::top_q);
    add_address(job, "top_rest", &Job::top_rest);
    add_address(job, "stream", &Job::stream);
    job.def_readwrite("rows", &Job::rows)
        .def_readwrite("row_stride", &Job::row_stride)
        .def_readwrite("classes", &Job::classes)
        .def_readwrite("candidate_count", &Job::candidate_count)
        .def_readwrite("top_k", &Job::top_k)
        .def_readwrite("below", &Job::below)
        .def_readwrite("mean", &Job::mean)
        .def_readwrite("epilogue", &Job::epilogue)
        .def_readwrite("class_term", &Job::class_term)
        .def_readwrite("forward", &Job::forward)
        .def_readwrite("grad_row_stride", &Job::grad_row_stride)
        .def_readwrite("upstream_stride", &Job::upstream_stride)
        .def_readwrite("groups", &Job::groups)
        .def_readwrite("threads", &Job::threads)
        .def_readwrite("parts", &Job::parts)
        .def_readwrite("slots", &Job::slots);
    job.def("set_params", [](Job& x, const std::vector<std::pair<std::uintptr_t, int64_t>>& params) {
        if (params.size() > kMaxParams) throw std::invalid_argument("an epilogue takes at most 4 parameters");
        for (size_t k = 0; k < params.size(); ++k) {
            x.param[k] = reinterpret_cast<const void*>(params[k].first);
            x.param_stride[k] = params[k].second;
        }
    });

    module.def("run", [](const Job& x, int dtype) { launches(dtype).run(x); });
    module.def("sum", [](const Job& x, int dtype) { launches(dtype).sum(x); });
    module.def("scale", [](const Job& x, int dtype) { launches(dtype).scale(x); });
    module.def("shared_bytes", [](const Job& x, int dtype) { return launches(dtype).shared_bytes(x); });
    module.def("limits", [](int device) {
        const Limits x = limits(device);
        return std::make_pair(x.shared_bytes, x.clusters);
    });
    module.def("epilogues", &epilogues);
    module.attr("targets") = FUSEDLOSS_TARGETS;
    module.attr("stages") = kStages;
    module.attr("item_bytes") = kItemBytes;
    module.attr("max_threads") = kMaxThreads;
    module.attr("max_candidates") = kMaxCandidates;
    module.attr("sum_bytes") = kSumThreads * 16;
}
