// What csrc/cuda/device.h asks of the runtime to launch kernels, played by a host that keeps count of it.
#pragma once

#include <cstddef>

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorIllegalAddress };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrClusterLaunch };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum { cudaSharedmemCarveoutMaxShared = 100 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };

using cudaStream_t = void*;
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        struct {
            unsigned x, y, z;
        } clusterDim;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

namespace runtime {
inline int device = 0, attributes[2] = {}, value[2] = {}, launches = 0;
inline cudaError_t last = cudaSuccess, fails = cudaSuccess;  // `fails`: what the next call does
inline cudaError_t done() {
    const cudaError_t status = fails;
    fails = cudaSuccess;
    if (status != cudaSuccess) last = status;
    return status;
}
}  // namespace runtime

inline const char* cudaGetErrorString(cudaError_t status) {
    return status == cudaErrorIllegalAddress ? "illegal address" : "invalid value";
}
inline cudaError_t cudaPeekAtLastError() { return runtime::last; }
inline cudaError_t cudaGetLastError() {
    const cudaError_t status = runtime::last;
    runtime::last = cudaSuccess;
    return status;
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = runtime::device;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = 1000;
    return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
    ++runtime::attributes[attribute];
    runtime::value[attribute] = value;
    return runtime::done();
}
template <typename Argument>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t*, void (*)(Argument), const Argument&) {
    const cudaError_t status = runtime::done();
    if (status == cudaSuccess) ++runtime::launches;
    return status;
}
