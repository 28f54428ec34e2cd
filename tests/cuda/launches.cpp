// Launches kernels that do nothing by csrc/cuda/device.h, and prints what the runtime was asked, and what was thrown.
#include <cstdio>

#include "cuda/device.h"

namespace {

void one(int) {}
void other(int) {}

void start(void (*kernel)(int), int bytes) {
    try {
        fusedloss::cuda::launch(kernel, 1, 1, 1, 32, bytes, nullptr, 0);
    } catch (const std::exception& error) {
        std::printf("%s\n", error.what());
    }
}

}  // namespace

int main() {
    using namespace runtime;
    start(one, 0);
    std::printf("%d\n", attributes[0]);  // without shared memory nothing is asked for
    fails = cudaErrorInvalidValue;
    start(one, 500);  // what failed is asked for again
    start(one, 500);
    start(one, 100);
    start(other, 100);
    device = 1;
    start(one, 100);
    std::printf("%d %d of %d and %d\n", attributes[0], attributes[1], value[0], value[1]);
    fails = cudaErrorInvalidValue;
    start(one, 100);
    start(one, 100);  // which is no fault of this one
    last = cudaErrorIllegalAddress;
    start(one, 100);
    std::printf("%d\n", launches);
}
