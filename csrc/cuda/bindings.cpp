// Python bindings of the CUDA kernels.
#include "../bindings.h"

#include <stdexcept>
#include <string>

#include "launch.h"

namespace py = pybind11;

namespace fusedloss::cuda {
namespace {

struct Launches {
    void (*run)(const Launch&);
    void (*sum)(const Launch&);
    void (*scale)(const Launch&);
    int (*shared_bytes)(const Launch&);
};

Launches launches(DType dtype) {
    switch (dtype) {
        case DType::float64:
            return {run_float64, sum_float64, scale_float64, shared_bytes_float64};
        case DType::float32:
            return {run_float32, sum_float32, scale_float32, shared_bytes_float32};
        case DType::bfloat16:
            return {run_bfloat16, sum_bfloat16, scale_bfloat16, shared_bytes_bfloat16};
        case DType::float16:
            return {run_float16, sum_float16, scale_float16, shared_bytes_float16};
    }
    throw std::invalid_argument("no dtype numbered " + std::to_string(static_cast<int>(dtype)));
}

}  // namespace
}  // namespace fusedloss::cuda

PYBIND11_MODULE(FUSEDLOSS_MODULE, module) {
    using namespace fusedloss;
    using namespace fusedloss::cuda;
    module.doc() = "fusedloss CUDA kernels: statistics and gradient passes over rows of logits";

    bind_job<Launch>(module, "Launch")
        .def_readwrite("forward", &Launch::forward)
        .def_readwrite("groups", &Launch::groups)
        .def_readwrite("parts", &Launch::parts)
        .def_readwrite("slots", &Launch::slots)
        .def_readwrite("threads", &Launch::threads)
        .def("set_top_rest", [](Launch& x, Address top_rest) { x.top_rest = at<void>(top_rest); })
        .def("set_stream", [](Launch& x, Address stream) { x.stream = reinterpret_cast<Stream>(stream); });

    module.def("run", [](const Launch& x) { launches(x.dtype).run(x); });
    module.def("sum", [](const Launch& x) { launches(x.dtype).sum(x); });
    module.def("scale", [](int dtype, Address grad, int64_t count, Address factor, int blocks, Address stream) {
        Launch x{};
        x.grad = at<void>(grad);
        x.rows = count;
        x.upstream = at<void>(factor);
        x.groups = blocks;
        x.stream = reinterpret_cast<Stream>(stream);
        launches(static_cast<DType>(dtype)).scale(x);
    });
    module.def("shared_bytes", [](int dtype, int threads, int slots) {
        Launch x{};
        x.threads = threads;
        x.slots = slots;
        return launches(static_cast<DType>(dtype)).shared_bytes(x);
    });
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
