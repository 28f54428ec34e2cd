// A GPU played by a host, for tests: what csrc/cuda/device.h asks of a device, one thread of a block being a fiber.
//
// It is stricter than a GPU where that shows mistakes. Shared memory is NaN at first, copies arrive when they are
// waited for and not before, the threads run in turn forwards and backwards, and a barrier that not all reach is an
// error.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <stdexcept>
#include <vector>

#define FUSEDLOSS_KERNEL
#define FUSEDLOSS_DEVICE inline
#define FUSEDLOSS_BLOCKS(threads, beside)

namespace fusedloss {
namespace cuda {

using Stream = void*;

struct bfloat16 {
    uint16_t bits;
};
using float16 = _Float16;

namespace host {

constexpr size_t kStack = 1 << 16;

struct Barrier {
    int size = 0, arrived = 0, generation = 0;
};

struct Warp {
    Barrier barrier;
    char exchanged[32][128];
};

struct Block {
    int64_t index, row;
    std::vector<double> memory;  // aligned to 8 bytes at least
    Barrier barrier;
    std::deque<Warp> warps;
    char* shared() { return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 15) / 16 * 16); }
};

struct Copy {
    void* to;
    const void* from;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Block* block;
    int thread;
    bool done;
    std::deque<std::vector<Copy>> groups;  // committed, not yet arrived
    std::vector<Copy> copies;              // not committed
};

struct Cluster {
    std::deque<Block> blocks;
    Barrier barrier;
};

inline Fiber* fiber;
inline Cluster* cluster;
inline ucontext_t scheduler;
inline int64_t progress;
inline void (*body)(const void*);
inline const void* argument;
inline const char* failure;

// Ends the launch; an exception could not leave a fiber.
[[noreturn]] inline void fail(const char* what) {
    failure = what;
    swapcontext(&fiber->context, &scheduler);
    std::abort();
}

inline void wait(Barrier& barrier) {
    const int generation = barrier.generation;
    ++progress;
    if (++barrier.arrived == barrier.size) {
        barrier.arrived = 0;
        ++barrier.generation;
    }
    while (barrier.generation == generation) swapcontext(&fiber->context, &scheduler);
}

inline void enter() {
    body(argument);
    fiber->done = true;
    ++progress;
}

inline void begin(Fiber& fiber, Block& block, int thread) {
    fiber.block = &block;
    fiber.thread = thread;
    fiber.done = false;
    fiber.groups.clear();
    fiber.copies.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
}

// Runs the fibers in turn until all are done.
inline void run(std::deque<Fiber>& fibers) {
    size_t left = fibers.size();
    for (bool forwards = true; left > 0; forwards = !forwards) {
        const int64_t before = progress;
        for (size_t i = 0; i < fibers.size(); ++i) {
            fiber = &fibers[forwards ? i : fibers.size() - 1 - i];
            if (fiber->done) continue;
            swapcontext(&scheduler, &fiber->context);
            if (failure) throw std::runtime_error(failure);
            if (fiber->done) --left;
        }
        if (progress == before) throw std::runtime_error("threads wait at a barrier for ever");
    }
}

}  // namespace host

inline int thread_index() { return host::fiber->thread; }
inline int64_t block_index() { return host::fiber->block->index; }
inline int64_t block_row() { return host::fiber->block->row; }
inline char* shared_memory() { return host::fiber->block->shared(); }
inline void block_sync() { host::wait(host::fiber->block->barrier); }
inline void warp_sync() { host::wait(host::fiber->block->warps[host::fiber->thread / 32].barrier); }
inline void cluster_sync() { host::wait(host::cluster->barrier); }

template <typename X>
X shuffle_xor(const X& x, int bits) {
    static_assert(sizeof(X) <= sizeof(host::Warp::exchanged[0]), "room for it");
    host::Warp& warp = host::fiber->block->warps[host::fiber->thread / 32];
    const int lane = host::fiber->thread % 32;
    std::memcpy(warp.exchanged[lane], &x, sizeof(X));
    host::wait(warp.barrier);
    X other;
    std::memcpy(&other, warp.exchanged[lane ^ bits], sizeof(X));
    host::wait(warp.barrier);
    return other;
}

template <typename X>
const X* cluster_peer(X* shared, int rank) {
    const auto offset = reinterpret_cast<char*>(shared) - shared_memory();
    return reinterpret_cast<X*>(host::cluster->blocks.at(rank).shared() + offset);
}

inline void copy_16_bytes(void* shared, const void* global) {
    if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16) {
        host::fail("a copy of 16 bytes is not aligned to them");
    }
    host::fiber->copies.push_back({shared, global});
}
inline void commit_copies() {
    host::fiber->groups.push_back(std::move(host::fiber->copies));
    host::fiber->copies.clear();
}
template <int Pending>
void wait_copies() {
    auto& groups = host::fiber->groups;
    for (; groups.size() > Pending; groups.pop_front()) {
        for (const host::Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
    }
}

inline int kept(int x) { return x; }
inline int shared_address(const void* shared) {
    return static_cast<int>(static_cast<const char*>(shared) - shared_memory());
}
inline void* shared_pointer(int address) { return shared_memory() + address; }
inline uint32_t shift_right(uint32_t low, uint32_t high, int bits) {
    return static_cast<uint32_t>((uint64_t(high) << 32 | low) >> bits);
}

inline float read(float x) { return x; }
inline double read(double x) { return x; }
inline float read(float16 x) { return x; }
inline float read(bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline void write(float* to, float x) { *to = x; }
inline void write(double* to, double x) { *to = x; }
inline void write(float16* to, float x) { *to = static_cast<float16>(x); }
inline void write(bfloat16* to, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
    to->bits = uint16_t(bits >> 16);
}

template <typename S, typename T>
void write_two(S* to, T x, T y) {
    write(to, x);
    write(to + 1, y);
}

template <typename T>
T exponent_of(T factor) {
    return factor;
}
template <typename T>
T fast_exp(T x, T factor = T(1)) {
    return std::exp(x * factor);
}
template <typename T>
T rounded_product(T x, T y) {
    return x * y;
}

template <typename Argument>
void launch(void (*kernel)(Argument), int64_t columns, int64_t rows, int cluster_size, int threads,
            int64_t shared_bytes, Stream, const Argument& argument) {
    static std::deque<host::Fiber> fibers;  // their stacks serve every launch
    host::failure = nullptr;
    const auto call = [kernel](const void* a) { kernel(*static_cast<const Argument*>(a)); };
    static const auto* current = &call;
    current = &call;
    host::body = [](const void* a) { (*current)(a); };
    host::argument = &argument;
    while (fibers.size() < size_t(threads) * cluster_size) {
        fibers.emplace_back();
        fibers.back().stack.reset(new char[host::kStack]);
    }
    fibers.resize(size_t(threads) * cluster_size);
    for (int64_t first = 0; first < columns * rows; first += cluster_size) {
        host::Cluster cluster;
        host::cluster = &cluster;
        cluster.barrier.size = threads * cluster_size;
        for (int rank = 0; rank < cluster_size; ++rank) {
            cluster.blocks.emplace_back();
            host::Block& block = cluster.blocks.back();
            block.index = (first + rank) % columns;
            block.row = (first + rank) / columns;
            block.memory.assign(shared_bytes / 8 + 3, std::nan(""));
            block.barrier.size = threads;
            block.warps.resize(threads / 32);
            for (host::Warp& warp : block.warps) warp.barrier.size = 32;
            for (int thread = 0; thread < threads; ++thread) {
                host::begin(fibers[rank * threads + thread], block, thread);
            }
        }
        host::run(fibers);
    }
}

struct Limits {
    int shared_bytes;
    bool clusters;
};
inline Limits limits(int) { return {227 * 1024, true}; }

}  // namespace cuda
}  // namespace fusedloss
