// Sums over the rows of each code, in the order vq_train.h states: rows in order inside blocks of 4,096, the blocks in
// order. A Job says what is added:
//   Sum                                        the type of the sums
//   width
//   value(row, group, column)                  the addend
//   store(group, code, column, count, sum)     the result of `count` rows
// Ordinary codes take 8 or 32 threads a code and slice of columns. A code with more rows than kCrowded takes a block,
// one warp a block of 4,096 rows, so that a collapsed codebook does not leave one warp with all the rows.
#pragma once

#include "vq/vq_order.h"
#include "vq/vq_train_cuda.cuh"

namespace meditok {

constexpr int kSumThreads = 256;
constexpr int kCrowdedThreads = 512;
constexpr int kCrowdedWarps = kCrowdedThreads / 32;
constexpr int64_t kCrowded = 512;
constexpr int kCrowdedBlocks = 512;
constexpr int kAtOnce = 8;  // rows loaded before the first is added

// sum += the rows at positions from..to - 1.
template <class Job>
__device__ inline void add_rows(const Job& job, const int32_t* rows, int32_t from, int32_t to, int64_t group,
                                int64_t column, typename Job::Sum& sum) {
    int32_t position = from;
    for (; position + kAtOnce <= to; position += kAtOnce) {
        typename Job::Sum value[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) value[i] = job.value(rows[position + i], group, column);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) sum += value[i];
    }
    for (; position < to; ++position) sum += job.value(rows[position], group, column);
}

template <int kLanes, class Job>
__global__ void __launch_bounds__(kSumThreads, 4)
    sum_kernel(const __grid_constant__ Job job, const __grid_constant__ RowOrder order) {
    const int64_t cell = static_cast<int64_t>(blockIdx.x) * (kSumThreads / kLanes) + threadIdx.x / kLanes;
    const int64_t column = static_cast<int64_t>(blockIdx.y) * kLanes + threadIdx.x % kLanes;
    if (cell >= order.groups * order.codes || column >= job.width) return;
    const auto [group, code] = split_pair(cell, order.codes);
    const int64_t blocks = row_blocks(order.rows);
    const int32_t begin = order.begin[cell], end = order.last(group, code, blocks - 1);
    if (end - begin > kCrowded) return;
    const int32_t* rows = order.order + group * order.rows;
    using Sum = typename Job::Sum;
    Sum total = 0;
    for (int32_t from = begin; from < end;) {  // a block of rows after the other
        const int64_t block = rows[from] / kStatsRows;
        const int32_t to = order.last(group, code, block);
        Sum partial = 0;
        add_rows(job, rows, from, to, group, column, partial);
        total += partial;
        from = to;
    }
    job.store(group, code, column, end - begin, total);
}

template <class Job>
__global__ void __launch_bounds__(kCrowdedThreads, 2)
    crowded_sum_kernel(const __grid_constant__ Job job, const __grid_constant__ RowOrder order) {
    using Sum = typename Job::Sum;
    __shared__ Sum partials[kCrowdedWarps][32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t column = static_cast<int64_t>(blockIdx.y) * 32 + lane, blocks = row_blocks(order.rows);
    for (int64_t cell = blockIdx.x; cell < order.groups * order.codes; cell += gridDim.x) {
        const auto [group, code] = split_pair(cell, order.codes);
        const int32_t begin = order.begin[cell], end = order.last(group, code, blocks - 1);
        if (end - begin <= kCrowded) continue;  // the same for the whole block
        const int32_t* rows = order.order + group * order.rows;
        Sum total = 0;
        for (int64_t first = 0; first < blocks; first += kCrowdedWarps) {
            const int64_t block = first + warp;
            Sum partial = 0;
            if (block < blocks && column < job.width) {
                add_rows(job, rows, order.first(group, code, block), order.last(group, code, block), group,
                         column, partial);
            }
            partials[warp][lane] = partial;
            __syncthreads();
            for (int i = 0; i < kCrowdedWarps && warp == 0; ++i) total += partials[i][lane];
            __syncthreads();
        }
        if (warp == 0 && column < job.width) job.store(group, code, column, end - begin, total);
    }
}

template <int kLanes, class Job>
void launch_sums_by(const Job& job, const RowOrder& order, cudaStream_t stream) {
    const int64_t cells = order.groups * order.codes;
    const dim3 grid(blocks_for(cells, kSumThreads / kLanes), blocks_for(job.width, kLanes));
    sum_kernel<kLanes><<<grid, kSumThreads, 0, stream>>>(job, order);
    cuda_check(cudaGetLastError(), "row sums");
    if (order.rows <= kCrowded) return;
    const dim3 crowded_grid(static_cast<unsigned>(cells < kCrowdedBlocks ? cells : kCrowdedBlocks),
                            blocks_for(job.width, 32));
    crowded_sum_kernel<<<crowded_grid, kCrowdedThreads, 0, stream>>>(job, order);
    cuda_check(cudaGetLastError(), "row sums (crowded codes)");
}

// Widths up to 8 * 65,535, the largest second extent of a grid.
template <class Job>
void launch_sums(const Job& job, const RowOrder& order, cudaStream_t stream) {
    require(job.width < 8 * 65535, "a width below 524,280 is needed");
    if (job.width <= kNarrow) {
        launch_sums_by<kNarrowLanes>(job, order, stream);
    } else {
        launch_sums_by<kWideLanes>(job, order, stream);
    }
}

}  // namespace meditok
