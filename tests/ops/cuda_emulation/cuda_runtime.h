// Just enough of CUDA's language to run the kernels of csrc/ on a CPU: every thread of a block is a fiber,
// blocks run one after another, barriers and shuffles switch fibers. It proves the logic of a kernel where no
// GPU is at hand; it says nothing about memory models or speed. test_cuda_source.py turns
// `kernel<<<...>>>(...)` into emulate(...).
#pragma once

#include <math.h>
#include <setjmp.h>
#include <string.h>
#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __noinline__
#define __grid_constant__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline const char* cudaGetErrorString(cudaError_t) {
    return "no error";
}
inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
    return *device = 0, cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
    return memset(data, value, bytes), cudaSuccess;
}

// The limits of a GPU of compute capability 9.0, or what a test sets.
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor,
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
namespace emulation {
inline int multiprocessors = 2, block_shared = 227 * 1024, multiprocessor_shared = 228 * 1024,
           architecture = 80;
constexpr int kSharedBytes = 227 * 1024;
alignas(128) inline unsigned char shared[kSharedBytes + 128];
}  // namespace emulation
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
    switch (name) {
        case cudaDevAttrMultiProcessorCount: *value = emulation::multiprocessors; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emulation::block_shared; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = emulation::multiprocessor_shared; break;
        case cudaDevAttrComputeCapabilityMajor: *value = emulation::architecture / 10; break;
        case cudaDevAttrComputeCapabilityMinor: *value = emulation::architecture % 10; break;
    }
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
    if (bytes > emulation::block_shared) throw std::runtime_error("more shared memory than the device has");
    return cudaSuccess;
}

struct cudaFuncAttributes {
    int maxThreadsPerBlock;
};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
    return attributes->maxThreadsPerBlock = 1024, cudaSuccess;
}

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

struct Barrier {
    unsigned arrived = 0, count = 0, generation = 0;
};

struct Block {
    std::vector<ucontext_t> fibers;
    std::vector<jmp_buf> places;  // where a fiber that has started goes on; jumps cost no system call
    std::vector<char> started;
    jmp_buf place;  // of the scheduler
    std::vector<char> finished;
    unsigned current = 0;
    Barrier all;
    std::vector<Barrier> warps, warpgroups;
    std::vector<std::vector<unsigned char>> slots;
    std::vector<std::vector<std::pair<void*, const void*>>>
        copies;  // begun by each thread, not waited for yet
    int total = 0;
    std::function<void()> body;
};
inline Block* block = nullptr;

// The other threads go on.
inline void yield() {
    if (_setjmp(block->places[block->current]) == 0) _longjmp(block->place, 1);
}

inline void wait(Barrier& barrier) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == barrier.count) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    while (barrier.generation == generation) yield();
}

inline void start() {
    block->body();
    block->finished[block->current] = 1;
    _longjmp(block->place, 1);
}

constexpr size_t kStack = 64 * 1024;

// Between two barriers threads run one by one, from the last to the first if `backwards`: a result that depends on it
// lacks a barrier.
inline bool backwards = false;

inline void run_block(unsigned threads, const std::function<void()>& body) {
    Block state;
    block = &state;
    state.fibers.resize(threads);
    static std::vector<char> stacks;  // grows to the largest block
    if (stacks.size() < threads * kStack) stacks.resize(threads * kStack);
    state.finished.assign(threads, 0);
    state.started.assign(threads, 0);
    state.places = std::vector<jmp_buf>(threads);
    state.all.count = threads;
    state.warps.resize((threads + 31) / 32);
    for (Barrier& warp : state.warps) warp.count = 32;
    state.warpgroups.resize((threads + 127) / 128);
    for (Barrier& warpgroup : state.warpgroups) warpgroup.count = 128;
    state.slots.assign(threads, {});
    state.copies.assign(threads, {});
    state.body = body;
    for (unsigned i = 0; i < threads; ++i) {
        getcontext(&state.fibers[i]);
        state.fibers[i].uc_stack.ss_sp = stacks.data() + i * kStack;
        state.fibers[i].uc_stack.ss_size = kStack;
        state.fibers[i].uc_link = nullptr;
        makecontext(&state.fibers[i], start, 0);
    }
    for (unsigned left = threads, stuck = 0; left > 0;) {
        if (++stuck > 100000000) throw std::runtime_error("a barrier was not reached by all threads");
        for (unsigned turn = 0; turn < threads; ++turn) {
            const unsigned i = backwards ? threads - 1 - turn : turn;
            if (state.finished[i]) continue;
            state.current = i;
            threadIdx = dim3(i, 0, 0);
            if (_setjmp(state.place) == 0) {
                if (state.started[i]) _longjmp(state.places[i], 1);
                state.started[i] = 1;
                setcontext(&state.fibers[i]);
            }
            left -= state.finished[i];
        }
    }
    for (const auto& copies : state.copies) {
        if (!copies.empty()) throw std::runtime_error("a thread ended before its copies");
    }
}

inline void emulate(dim3 grid, dim3 threads, int shared_bytes, const std::function<void()>& body) {
    if (shared_bytes > block_shared) throw std::runtime_error("more shared memory than the device has");
    gridDim = grid;
    blockDim = threads;
    for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
            blockIdx = dim3(x, y, 0);
            memset(shared, 0xff, sizeof shared);  // NaN to whoever reads before writing
            run_block(threads.x, body);
            for (int i = shared_bytes; i < kSharedBytes + 128; ++i) {
                if (shared[i] != 0xff) throw std::runtime_error("written beyond the dynamic shared memory");
            }
        }
    }
}

// A value of every lane of the warp, for the others to read until release().
inline void exchange(const void* value, size_t bytes) {
    const unsigned char* start = static_cast<const unsigned char*>(value);
    block->slots[block->current].assign(start, start + bytes);
    wait(block->warps[block->current / 32]);
}

inline void read(int lane, void* value, size_t bytes) {
    memcpy(value, block->slots[block->current / 32 * 32 + static_cast<unsigned>(lane)].data(), bytes);
}

// The same, in place.
template <class T>
const T* slot(int lane) {
    return reinterpret_cast<const T*>(
        block->slots[block->current / 32 * 32 + static_cast<unsigned>(lane)].data());
}

inline void release() {
    wait(block->warps[block->current / 32]);
}

inline void require_aligned(const void* pointer, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) throw std::runtime_error("misaligned address");
}

}  // namespace emulation

inline void __syncthreads() {
    emulation::wait(emulation::block->all);
}

inline int __syncthreads_count(int predicate) {
    emulation::Block& block = *emulation::block;
    __syncthreads();
    block.total = 0;
    __syncthreads();
    block.total += predicate != 0;
    __syncthreads();
    return block.total;
}

inline int __syncthreads_or(int predicate) {
    return __syncthreads_count(predicate) != 0;
}

inline void __syncwarp() {
    emulation::release();
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
    emulation::exchange(&value, sizeof value);
    emulation::read(lane, &value, sizeof value);
    emulation::release();
    return value;
}

// Doubles are shuffled where a warp agrees on the best float64 score only, five times: so searches are counted.
inline long double_shuffles = 0;

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
    double_shuffles += std::is_same<T, double>::value;
    return __shfl_sync(mask, value, static_cast<int>(emulation::block->current % 32) ^ offset);
}

inline unsigned __ballot_sync(unsigned, int predicate) {
    emulation::exchange(&predicate, sizeof predicate);
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) {
        int vote;
        emulation::read(lane, &vote, sizeof vote);
        votes |= vote != 0 ? 1u << lane : 0u;
    }
    emulation::release();
    return votes;
}

template <class T>
unsigned __match_any_sync(unsigned, T value) {
    emulation::exchange(&value, sizeof value);
    unsigned peers = 0;
    for (int lane = 0; lane < 32; ++lane) {
        T other;
        emulation::read(lane, &other, sizeof other);
        peers |= other == value ? 1u << lane : 0u;
    }
    emulation::release();
    return peers;
}

inline int __any_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) == 0xffffffffu;
}

template <class T>
T atomicAdd(T* address, T value) {
    const T before = *address;
    *address += value;
    return before;
}

template <class T>
T atomicCAS(T* address, T expected, T value) {
    const T before = *address;
    if (before == expected) *address = value;
    return before;
}

template <class T>
T atomicMin(T* address, T value) {
    const T before = *address;
    if (value < before) *address = value;
    return before;
}

template <class T>
T atomicMax(T* address, T value) {
    const T before = *address;
    if (value > before) *address = value;
    return before;
}

inline int __float_as_int(float value) {
    int bits;
    return memcpy(&bits, &value, sizeof bits), bits;
}
inline float __int_as_float(int bits) {
    float value;
    return memcpy(&value, &bits, sizeof value), value;
}
inline int __popc(unsigned bits) {
    return __builtin_popcount(bits);
}

inline float __fadd_rn(float a, float b) {
    return a + b;
}
inline float __fmul_rn(float a, float b) {
    return a * b;
}
inline float __fmaf_rn(float a, float b, float c) {
    return fmaf(a, b, c);
}
inline int __ffs(int bits) {
    return __builtin_ffs(bits);
}
