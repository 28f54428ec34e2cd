// What the kernels ask of the device they run on, in a few words, so that tests can run them on a host: there these
// words come from tests/cuda/host_device.h.
#pragma once

#include <cstdint>
#include <limits>

#if defined(FUSEDLOSS_HOST_DEVICE)
#include <host_device.h>
#else
#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>

#define FUSEDLOSS_KERNEL __global__
#define FUSEDLOSS_DEVICE __device__ __forceinline__
#define FUSEDLOSS_BLOCKS(threads, beside) __launch_bounds__(threads, beside)

namespace fusedloss::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

FUSEDLOSS_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FUSEDLOSS_DEVICE int64_t block_index() { return blockIdx.x; }
FUSEDLOSS_DEVICE int64_t block_row() { return blockIdx.y; }

FUSEDLOSS_DEVICE char* shared_memory() {
    extern __shared__ __align__(16) char memory[];
    return memory;
}
FUSEDLOSS_DEVICE void block_sync() { __syncthreads(); }
FUSEDLOSS_DEVICE void warp_sync() { __syncwarp(); }

// A value of any type from the thread of the warp whose number differs by these bits.
template <typename X>
FUSEDLOSS_DEVICE X shuffle_xor(const X& x, int bits) {
    static_assert(sizeof(X) % 4 == 0, "in words");
    union Words {
        X x;
        unsigned word[sizeof(X) / 4];
        __device__ Words() {}
    } from, to;
    from.x = x;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(X) / 4); ++i) {
        to.word[i] = __shfl_xor_sync(0xffffffffu, from.word[i], bits);
    }
    return to.x;
}

// Clusters are there from sm_90 on; before, a block is its own.
FUSEDLOSS_DEVICE void cluster_sync() {
#if defined(_CG_HAS_CLUSTER_GROUP)
    cooperative_groups::this_cluster().sync();
#endif
}
template <typename X>
FUSEDLOSS_DEVICE const X* cluster_peer(X* shared, int rank) {
#if defined(_CG_HAS_CLUSTER_GROUP)
    return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
#else
    return shared;
#endif
}

// 16 bytes to shared memory, behind the threads' back: in groups, of which the last few may still be on their way.
FUSEDLOSS_DEVICE void copy_16_bytes(void* shared, const void* global) { __pipeline_memcpy_async(shared, global, 16); }
FUSEDLOSS_DEVICE void commit_copies() { __pipeline_commit(); }
template <int Pending>
FUSEDLOSS_DEVICE void wait_copies() {
    __pipeline_wait_prior(Pending);
}

// A number that the compiler keeps, where it would compute it again and again to save a register.
FUSEDLOSS_DEVICE int kept(int x) {
    asm("" : "+r"(x));
    return x;
}

// Where in shared memory something is: as good as a pointer, and a single register.
FUSEDLOSS_DEVICE int shared_address(const void* shared) { return static_cast<int>(__cvta_generic_to_shared(shared)); }
FUSEDLOSS_DEVICE void* shared_pointer(int address) { return __cvta_shared_to_generic(address); }

// The low word of two, shifted by fewer bits than a word has.
FUSEDLOSS_DEVICE uint32_t shift_right(uint32_t low, uint32_t high, int bits) {
    return __funnelshift_r(low, high, bits);
}

FUSEDLOSS_DEVICE float read(float x) { return x; }
FUSEDLOSS_DEVICE double read(double x) { return x; }
FUSEDLOSS_DEVICE float read(bfloat16 x) { return __uint_as_float(uint32_t(__bfloat16_as_ushort(x)) << 16); }
FUSEDLOSS_DEVICE float read(float16 x) { return __half2float(x); }
FUSEDLOSS_DEVICE void write(float* to, float x) { *to = x; }
FUSEDLOSS_DEVICE void write(double* to, double x) { *to = x; }
FUSEDLOSS_DEVICE void write(bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }
FUSEDLOSS_DEVICE void write(float16* to, float x) { *to = __float2half_rn(x); }

// Both at once, where they are the halves of a word.
template <typename S, typename T>
FUSEDLOSS_DEVICE void write_two(S* to, T x, T y) {
    write(to, x);
    write(to + 1, y);
}
FUSEDLOSS_DEVICE void write_two(bfloat16* to, float x, float y) {
    *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(x, y);
}
FUSEDLOSS_DEVICE void write_two(float16* to, float x, float y) {
    *reinterpret_cast<__half2*>(to) = __floats2half2_rn(x, y);
}

// exp(factor x) by exponent_of(factor), for x <= 0; off by |factor x| / 2 units in the last place, as the rounding of x
// is. Results below the normal numbers are 0.
FUSEDLOSS_DEVICE float exponent_of(float factor) { return factor * 1.442695041f; }
FUSEDLOSS_DEVICE double exponent_of(double factor) { return factor; }
FUSEDLOSS_DEVICE float fast_exp(float x, float exponent) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * exponent));
    return y;
}
FUSEDLOSS_DEVICE double fast_exp(double x, double exponent) { return exp(x * exponent); }

template <typename T>
FUSEDLOSS_DEVICE T fast_exp(T x) {
    return fast_exp(x, exponent_of(T(1)));
}

// A product that is rounded, whatever is subtracted from it: fused with the difference of two products, of which only
// the other is rounded, it would leave the rounding error of a large one for a result.
FUSEDLOSS_DEVICE float rounded_product(float x, float y) { return __fmul_rn(x, y); }
FUSEDLOSS_DEVICE double rounded_product(double x, double y) { return __dmul_rn(x, y); }

}  // namespace fusedloss::cuda
#endif

namespace fusedloss::cuda {

using Stream = cudaStream_t;

// The error that is thrown is no longer there for the next call to find.
inline void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Lets a kernel have all shared memory that a block can, and a multiprocessor give its blocks all that it has, once on
// each device: a launch with less must not take it from another thread's.
inline void allow_shared_memory(const void* kernel) {
    static std::mutex mutex;
    static std::set<std::pair<const void*, int> > allowed;
    int device = 0, bytes = 0;
    check(cudaGetDevice(&device), "the current CUDA device");
    const std::lock_guard<std::mutex> lock(mutex);
    if (allowed.count({kernel, device})) return;
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "limits of a CUDA device");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "shared memory of a CUDA kernel");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
          "shared memory of a CUDA kernel");
    allowed.insert({kernel, device});
}

// Starts `columns` x `rows` blocks, which each `cluster` beside each other can look into one another's memory.
template <typename Argument>
void launch(void (*kernel)(Argument), int64_t columns, int64_t rows, int cluster, int threads, int64_t shared_bytes,
            Stream stream, const Argument& argument) {
    check(cudaPeekAtLastError(), "a CUDA call before the launch of a kernel");
    if (shared_bytes > 0) allow_shared_memory(reinterpret_cast<const void*>(kernel));
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(columns), static_cast<unsigned>(rows));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, argument), "launch of a CUDA kernel, or work that was launched before");
}

// What a device has: bytes of shared memory for a block, and whether blocks form clusters.
struct Limits {
    int shared_bytes;
    bool clusters;
};
inline Limits limits(int device) {
    int bytes = 0, clusters = 0;
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "limits of a CUDA device");
    check(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device), "limits of a CUDA device");
    return {bytes, clusters != 0};
}

}  // namespace fusedloss::cuda
#endif
