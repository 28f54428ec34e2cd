// Python bindings of the CPU engine. Tensors arrive as integer addresses, so that nothing here links torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "bindings.h"
#include "cpu/parallel.h"
#include "engine.h"

namespace py = pybind11;

namespace fusedloss {

template <typename... Row, typename... Terms>
EpilogueKind find_kind(const std::string& name, FunctorList<Row...>, FunctorList<Terms...>) {
    if (((name == Row::name) || ...)) return EpilogueKind::row;
    if (((name == Terms::name) || ...)) return EpilogueKind::class_term;
    return EpilogueKind::none;
}

EpilogueKind epilogue_kind(const std::string& name) { return find_kind(name, RowEpilogues{}, ClassTerms{}); }

namespace {

// --- instruction sets ---

struct InstructionSet {
    const char* name;
    bool available;
    void (*forward)(const Rows&, const Epilogue&, const Outputs&);
    void (*backward)(const Rows&, const Epilogue&, const Gradient&);
    void (*class_sums)(const Rows&, const Epilogue&, const ClassSums&);
    void (*class_terms)(const Rows&, const Epilogue&, const Outputs&);
    void (*term_sums)(const Rows&, const Epilogue&, const ClassSums&);
};

#define FUSEDLOSS_PASSES(isa) isa::forward, isa::backward, isa::class_sums, isa::class_terms, isa::term_sums

std::vector<InstructionSet> instruction_sets() {
    std::vector<InstructionSet> sets;  // the best first
#if defined(FUSEDLOSS_HAVE_AVX512)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    sets.push_back({"avx512", avx512, FUSEDLOSS_PASSES(avx512)});
#endif
#if defined(FUSEDLOSS_HAVE_AVX2)
    // Processors with AVX2 have F16C; not every compiler can ask for it.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    sets.push_back({"avx2", avx2, FUSEDLOSS_PASSES(avx2)});
#endif
    sets.push_back({"generic", true, FUSEDLOSS_PASSES(generic)});
    return sets;
}

const InstructionSet* current = nullptr;

const std::vector<InstructionSet>& all_sets() {
    static const std::vector<InstructionSet> sets = instruction_sets();
    return sets;
}

void use_instruction_set(const std::string& name) {
    for (const auto& set : all_sets()) {
        if (set.available && (name.empty() || name == set.name)) {
            current = &set;
            return;
        }
    }
    throw std::invalid_argument("instruction set '" + name + "' is not available here");
}

std::vector<std::string> available_sets() {
    std::vector<std::string> names;
    for (const auto& set : all_sets()) {
        if (set.available) names.push_back(set.name);
    }
    return names;
}

// --- arguments ---

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// The caller has seen to the name and to the number of the parameters.
Epilogue make_epilogue(const std::string& name, const std::vector<std::pair<Address, int64_t>>& params,
                       Address common = 0) {
    Epilogue epilogue{name, {}, {}, static_cast<int>(params.size()), at<void>(common)};
    for (size_t k = 0; k < params.size(); ++k) {
        epilogue.param[k] = at<void>(params[k].first);
        epilogue.param_stride[k] = params[k].second;
    }
    return epilogue;
}

// The first index in [0, count) whose class is outside [lowest, classes) and not `ignored`; -1: none.
int64_t first_invalid(Address target, int64_t count, int64_t classes, int64_t ignored, int64_t lowest) {
    const int64_t* t = at<const int64_t>(target);
    for (int64_t i = 0; i < count; ++i) {
        if ((t[i] < lowest || t[i] >= classes) && t[i] != ignored) return i;
    }
    return -1;
}

// A fresh gradient costs more in page faults than in arithmetic; huge pages give most of that back. A hint:
// the kernel may ignore it, and memory that is already mapped is left as it is.
void advise_huge_pages(Address address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr Address page = 4096;
    const Address begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
    if (end > begin) madvise(at<void>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)address;
    (void)bytes;
#endif
}

}  // namespace
}  // namespace fusedloss

PYBIND11_MODULE(_engine, module) {
    using namespace fusedloss;
    module.doc() = "fusedloss CPU engine: statistics and gradient passes over rows of logits";
    watch_forks();
    use_instruction_set("");

    py::class_<Rows>(module, "Rows")
        .def(py::init([](int dtype, Address logits, int64_t rows, int64_t classes, int64_t row_stride, Address target,
                         Address candidates, int candidate_count, int top_k, bool below, bool mean,
                         Address class_weight, double weight_sum, int threads) {
            return Rows{static_cast<DType>(dtype),
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
                        at<void>(class_weight),
                        weight_sum,
                        threads_after_fork() ? threads_after_fork() : threads};
        }));

    module.def("forward",
               [](const Rows& rows, const std::string& name, const std::vector<std::pair<Address, int64_t>>& params,
                  Address common, Address loss, Address statistics, Address index, Address coefficients) {
                   const Epilogue epilogue = make_epilogue(name, params, common);
                   const Outputs out{at<void>(loss), at<void>(statistics), at<int64_t>(index), at<void>(coefficients)};
                   py::gil_scoped_release release;
                   current->forward(rows, epilogue, out);
               });
    module.def("backward",
               [](const Rows& rows, const std::string& name, const std::vector<std::pair<Address, int64_t>>& params,
                  Address statistics, Address index, Address coefficients, Address grad_output,
                  int64_t grad_output_stride, Address grad, int64_t grad_row_stride) {
                   const Epilogue epilogue = make_epilogue(name, params);
                   const Gradient gradient{at<void>(statistics),  at<const int64_t>(index), at<void>(coefficients),
                                           at<void>(grad_output), grad_output_stride,       at<void>(grad),
                                           grad_row_stride};
                   py::gil_scoped_release release;
                   current->backward(rows, epilogue, gradient);
               });
    module.def("class_sums",
               [](const Rows& rows, const std::string& name, const std::vector<std::pair<Address, int64_t>>& params,
                  Address statistics, Address index, Address row_weight, int64_t row_weight_stride, Address top_q,
                  Address sums) {
                   const Epilogue epilogue = make_epilogue(name, params);
                   const ClassSums out{at<void>(statistics), at<const int64_t>(index), at<void>(row_weight),
                                       row_weight_stride,    at<void>(top_q),          at<double>(sums)};
                   py::gil_scoped_release release;
                   current->class_sums(rows, epilogue, out);
               });
    module.def("term_sums", [](const Rows& rows, const std::string& name,
                               const std::vector<std::pair<Address, int64_t>>& params, Address statistics,
                               Address index, Address sums) {
        const Epilogue epilogue = make_epilogue(name, params);
        const ClassSums out{at<void>(statistics), at<const int64_t>(index), nullptr, 0, nullptr, at<double>(sums)};
        py::gil_scoped_release release;
        current->term_sums(rows, epilogue, out);
    });
    module.def("class_terms",
               [](const Rows& rows, const std::string& name, const std::vector<std::pair<Address, int64_t>>& params,
                  Address statistics, Address index, Address loss, Address coefficients) {
                   const Epilogue epilogue = make_epilogue(name, params);
                   const Outputs out{at<void>(loss), at<void>(statistics), at<int64_t>(index), at<void>(coefficients)};
                   py::gil_scoped_release release;
                   current->class_terms(rows, epilogue, out);
               });
    module.def("first_invalid", &first_invalid, py::arg("target"), py::arg("count"), py::arg("classes"),
               py::arg("ignored"), py::arg("lowest") = 0);
    module.def("advise_huge_pages", &advise_huge_pages);
    module.def("epilogues", &epilogues);
    module.def("set_threads_after_fork", [](int threads) {
        if (threads_after_fork()) threads_after_fork() = threads;
    });
    module.def("instruction_sets", &available_sets);
    module.def("instruction_set", [] { return std::string(current->name); });
    module.def("use_instruction_set", &use_instruction_set);
}
