// Between the CUDA files of the training path: how many threads share a row, sums over them, and elements of any type.
#pragma once

#include "common/check.h"
#include "vq/vq_cuda.h"
#include "vq/vq_train.h"

namespace meditok {

// Widths up to kNarrow: 8 threads a row, four rows a warp; wider: a warp a row. Lane i has columns i, i + lanes, ...
constexpr int64_t kNarrow = 16;
constexpr int kNarrowLanes = 8;
constexpr int kWideLanes = 32;

// The sum over the lanes of a row, the same bits in each. Every thread of the warp takes part.
template <int kLanes>
__device__ inline double lane_sum(double value) {
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, offset);
    }
    return value;
}

// The sum over a block of kThreads, in a fixed order, known to all. Every thread takes part.
template <int kThreads, class T>
__device__ inline T block_sum(T value) {
    __shared__ T sums[kThreads];
    static_assert((kThreads & (kThreads - 1)) == 0, "halving ends at one");
    const int thread = threadIdx.x;
    __syncthreads();
    sums[thread] = value;
    for (int half = kThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (thread < half) sums[thread] += sums[thread + half];
    }
    __syncthreads();
    return sums[0];
}

// Elements of the rows the mask keeps, at least 1; counted by one block of kThreads.
template <int kThreads>
__device__ inline double used_elements(const unsigned char* mask, int64_t stride, int64_t rows,
                                       int64_t elements_a_row) {
    int64_t used = rows;
    if (mask != nullptr) {
        used = 0;
        for (int64_t row = threadIdx.x; row < rows; row += kThreads) used += mask[row * stride] != 0;
        used = block_sum<kThreads>(used);
    }
    const double elements = static_cast<double>(used) * static_cast<double>(elements_a_row);
    return elements > 1.0 ? elements : 1.0;
}

// What storing `value` as T and reading it again gives.
template <class T>
__device__ inline double rounded(double value) {
    T stored;
    from_double(value, stored);
    return to_double(stored);
}

// Element i of a row of an array with the strides of (rows, groups, width); typed, so that loads are issued together.
template <class T>
__device__ inline double row_element(const void* data, const int64_t* strides, int64_t row, int64_t group,
                                     int64_t i) {
    return to_double(static_cast<const T*>(data)[row * strides[0] + group * strides[1] + i * strides[2]]);
}

template <class T>
__device__ inline double code_element(const Codebook& codebook, int64_t group, int64_t code, int64_t i) {
    return to_double(static_cast<const T*>(
        codebook
            .data)[group * codebook.group_stride + code * codebook.code_stride + i * codebook.column_stride]);
}

__device__ inline double floored(double norm) {
    return norm < kFloor ? kFloor : norm;  // NaN stays
}

// A row and a group (or a group and a code) from one index below 2^32: 32-bit division, because the 64-bit one is a
// function call. The entries refuse more.
struct Pair {
    int64_t first, second;
};

__device__ inline Pair split_pair(int64_t index, int64_t seconds) {
    const uint32_t i = static_cast<uint32_t>(index), n = static_cast<uint32_t>(seconds);
    return Pair{static_cast<int64_t>(i / n), static_cast<int64_t>(i % n)};
}

inline void require_pairs(int64_t rows, int64_t groups, int64_t codes) {
    constexpr int64_t kLimit = int64_t{1} << 31;
    require(
        rows < kLimit && codes < kLimit && rows * groups < 2 * kLimit && groups * codes < 2 * kLimit,
        "fewer than 2^31 rows and codes and 2^32 of them in all groups are needed in one call; split them");
}

inline unsigned blocks_for(int64_t items, int64_t per_block) {
    return static_cast<unsigned>((items + per_block - 1) / per_block);
}

}  // namespace meditok
