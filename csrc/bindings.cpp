// Python bindings of the CPU engine.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "bindings.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace fusedloss {

namespace {

// --- instruction sets ---

struct InstructionSet {
    const char* name;
    bool available;
    Pass *forward, *backward, *class_sums, *class_terms, *term_sums;
};

#define FUSEDLOSS_PASSES(isa) isa::forward, isa::backward, isa::class_sums, isa::class_terms, isa::term_sums

// The best first.
const std::vector<InstructionSet>& all_sets() {
    static const std::vector<InstructionSet> sets = {
#if defined(FUSEDLOSS_HAVE_AVX512)
        {"avx512",
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
         FUSEDLOSS_PASSES(avx512)},
#endif
#if defined(FUSEDLOSS_HAVE_AVX2)
        // Processors with AVX2 have F16C; not every compiler can ask for it.
        {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), FUSEDLOSS_PASSES(avx2)},
#endif
        {"generic", true, FUSEDLOSS_PASSES(generic)},
    };
    return sets;
}

const InstructionSet* current = nullptr;

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

// The first index in [0, count) whose class is outside [lowest, classes) and not `ignored`; -1: none.
int64_t first_invalid(Address target, int64_t count, int64_t classes, int64_t ignored, int64_t lowest) {
    const int64_t* t = at<const int64_t>(target);
    for (int64_t i = 0; i < count; ++i) {
        if ((t[i] < lowest || t[i] >= classes) && t[i] != ignored) return i;
    }
    return -1;
}

int64_t count_valid(Address target, int64_t count, int64_t ignored) {
    const int64_t* t = at<const int64_t>(target);
    return count - std::count(t, t + count, ignored);
}

// A fresh gradient costs more in page faults than in arithmetic; huge pages give most of that back. A hint:
// the kernel may ignore it, and memory that is already mapped is left as it is.
void advise_huge_pages([[maybe_unused]] Address address, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr Address page = 4096;
    const Address begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
    if (end > begin) madvise(at<void>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace
}  // namespace fusedloss

PYBIND11_MODULE(_engine, module) {
    using namespace fusedloss;
    module.doc() = "fusedloss CPU engine: statistics and gradient passes over rows of logits";
    watch_forks();
    use_instruction_set("");

    bind_job<Job>(module, "Job");
    const auto def = [&](const char* name, Pass* InstructionSet::* pass) {
        module.def(name, [pass](const Job& job) {
            py::gil_scoped_release release;
            (current->*pass)(job);
        });
    };
    def("forward", &InstructionSet::forward);
    def("backward", &InstructionSet::backward);
    def("class_sums", &InstructionSet::class_sums);
    def("term_sums", &InstructionSet::term_sums);
    def("class_terms", &InstructionSet::class_terms);
    module.def("first_invalid", &first_invalid, py::arg("target"), py::arg("count"), py::arg("classes"),
               py::arg("ignored"), py::arg("lowest") = 0);
    module.def("count_valid", &count_valid);
    module.def("advise_huge_pages", &advise_huge_pages);
    module.def("epilogues", &epilogues);
    module.def("set_threads_after_fork", [](int threads) {
        if (threads_after_fork()) threads_after_fork() = threads;
    });
    module.def("instruction_sets", &available_sets);
    module.def("instruction_set", [] { return std::string(current->name); });
    module.def("use_instruction_set", &use_instruction_set);
}
