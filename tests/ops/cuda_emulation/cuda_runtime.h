// Just enough of CUDA's language to run the kernels of csrc/ on a CPU: every thread of a block is a fiber,
// blocks run one after another, barriers and shuffles switch fibers. It proves the logic of a kernel where no
// GPU is at hand; it says nothing about memory models or speed. test_cuda_source.py turns
// `kernel<<<...>>>(...)` into emulate(...).
#pragma once

#include <math.h>
#include <string.h>
#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __noinline__
#define __grid_constant__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct float4 {
    float x, y, z, w;
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

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

struct Barrier {
    unsigned arrived = 0, count = 0, generation = 0;
};

struct Block {
    std::vector<ucontext_t> fibers;
    std::vector<std::vector<char>> stacks;
    std::vector<char> finished;
    ucontext_t scheduler;
    unsigned current = 0;
    Barrier all;
    std::vector<Barrier> warps;
    std::vector<float> slots;
    int total = 0;
    std::function<void()> body;
};
inline Block* block = nullptr;

inline void wait(Barrier& barrier) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == barrier.count) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    while (barrier.generation == generation) swapcontext(&block->fibers[block->current], &block->scheduler);
}

inline void start() {
    block->body();
    block->finished[block->current] = 1;
}

inline void run_block(unsigned threads, const std::function<void()>& body) {
    Block state;
    block = &state;
    state.fibers.resize(threads);
    state.stacks.assign(threads, std::vector<char>(64 * 1024));
    state.finished.assign(threads, 0);
    state.all.count = threads;
    state.warps.resize((threads + 31) / 32);
    for (Barrier& warp : state.warps) warp.count = 32;
    state.slots.assign(threads, 0.0f);
    state.body = body;
    for (unsigned i = 0; i < threads; ++i) {
        getcontext(&state.fibers[i]);
        state.fibers[i].uc_stack.ss_sp = state.stacks[i].data();
        state.fibers[i].uc_stack.ss_size = state.stacks[i].size();
        state.fibers[i].uc_link = &state.scheduler;
        makecontext(&state.fibers[i], start, 0);
    }
    for (unsigned left = threads, stuck = 0; left > 0;) {
        if (++stuck > 100000000) throw std::runtime_error("a barrier was not reached by all threads");
        for (unsigned i = 0; i < threads; ++i) {
            if (state.finished[i]) continue;
            state.current = i;
            threadIdx = dim3(i, 0, 0);
            swapcontext(&state.scheduler, &state.fibers[i]);
            left -= state.finished[i];
        }
    }
}

inline void emulate(dim3 grid, dim3 threads, const std::function<void()>& body) {
    gridDim = grid;
    blockDim = threads;
    for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
            blockIdx = dim3(x, y, 0);
            run_block(threads.x, body);
        }
    }
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

inline float __shfl_xor_sync(unsigned, float value, int offset) {
    emulation::Block& block = *emulation::block;
    const unsigned me = block.current;
    emulation::Barrier& warp = block.warps[me / 32];
    block.slots[me] = value;
    emulation::wait(warp);
    const float other = block.slots[me ^ static_cast<unsigned>(offset)];
    emulation::wait(warp);
    return other;
}

template <class T>
T atomicAdd(T* address, T value) {
    const T before = *address;
    *address += value;
    return before;
}

template <class T>
T atomicMin(T* address, T value) {
    const T before = *address;
    if (value < before) *address = value;
    return before;
}

inline float __fmaf_rn(float a, float b, float c) {
    return fmaf(a, b, c);
}
inline int __ffs(int bits) {
    return __builtin_ffs(bits);
}
