// A stable counting sort of the rows of each group by their code, in blocks of 4,096 rows:
//   count   how often each code occurs in each block: integer atomics, whose order does not matter
//   place   a thread a code: prefix sums over the blocks and over the codes turn counts into first positions
//   order   a warp a block: rows in order, 32 at a time; lanes with equal codes rank themselves (match_any), the first
//           of them moves the code's position on. Nothing depends on which warp runs when.
// Traffic: the ids twice, 4 bytes a row out, 12 bytes a code and block.

#include "vq/vq_order.h"
#include "vq/vq_train_cuda.cuh"

namespace meditok {

namespace {

constexpr int kThreads = 256;
constexpr int kPlaceThreads = 512;
constexpr int kWarp = 32;
constexpr int64_t kSharedCodes = 8192;  // above that the positions stay in global memory
static_assert(kSharedCodes * sizeof(int32_t) <= 32 * 1024, "static shared memory of every architecture");
static_assert(kStatsRows % kWarp == 0, "whole warps fill a block");

__global__ void __launch_bounds__(kThreads) count_kernel(const RowIds rows, const RowOrder order) {
    const int64_t pair = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (pair >= rows.rows * rows.groups) return;
    const auto [row, group] = split_pair(pair, rows.groups);
    const int64_t code = rows.code(row, group);
    if (code >= 0)
        atomicAdd(order.end + (row / kStatsRows * rows.groups + group) * rows.codes + code, int32_t{1});
}

// Turns the counts in order.end into first positions.
__global__ void __launch_bounds__(kPlaceThreads) place_kernel(const RowOrder order, int64_t* counts) {
    __shared__ int32_t sums[kPlaceThreads];
    const int thread = threadIdx.x;
    const int64_t blocks = row_blocks(order.rows), step = order.groups * order.codes;
    for (int64_t group = blockIdx.x; group < order.groups; group += gridDim.x) {
        int32_t base = 0;
        for (int64_t first = 0; first < order.codes; first += kPlaceThreads) {
            const int64_t code = first + thread;
            const bool present = code < order.codes;
            int32_t* column = order.end + group * order.codes + code;
            int32_t total = 0;
            for (int64_t block = 0; block < blocks && present; ++block) total += column[block * step];
            sums[thread] = total;
            for (int offset = 1; offset < kPlaceThreads; offset *= 2) {
                __syncthreads();
                const int32_t before = thread >= offset ? sums[thread - offset] : 0;
                __syncthreads();
                sums[thread] += before;
            }
            __syncthreads();
            int32_t position = base + sums[thread] - total;
            base += sums[kPlaceThreads - 1];
            __syncthreads();
            if (!present) continue;
            order.begin[group * order.codes + code] = position;
            if (counts != nullptr) counts[group * order.codes + code] = total;
            for (int64_t block = 0; block < blocks; ++block) {
                const int32_t count = column[block * step];
                column[block * step] = position;
                position += count;
            }
        }
    }
}

// Turns the first positions in order.end into ends.
__global__ void __launch_bounds__(kWarp) order_kernel(const RowIds rows, const RowOrder order) {
    __shared__ int32_t local[kSharedCodes];
    const int lane = threadIdx.x;
    const int64_t block = blockIdx.x;
    const bool fits = rows.codes <= kSharedCodes;
    for (int64_t group = blockIdx.y; group < rows.groups; group += gridDim.y) {
        int32_t* ends = order.end + (block * rows.groups + group) * rows.codes;
        int32_t* position = fits ? local : ends;
        for (int64_t code = lane; code < rows.codes && fits; code += kWarp) local[code] = ends[code];
        __syncwarp();
        int64_t row = block * kStatsRows + lane;
        int64_t code = row < rows.rows ? rows.code(row, group) : -1;
        for (int64_t first = 0; first < kStatsRows; first += kWarp) {
            const int64_t next_row = row + kWarp;
            const bool more = first + kWarp < kStatsRows && next_row < rows.rows;
            const int64_t next_code = more ? rows.code(next_row, group) : -1;  // read ahead
            const unsigned peers = __match_any_sync(0xffffffffu, static_cast<int>(code));
            const int rank = __popc(peers & ((1u << lane) - 1u));
            const int32_t start = code >= 0 ? position[code] : 0;
            __syncwarp();
            if (code >= 0) {
                if (rank == 0) position[code] = start + __popc(peers);
                order.order[group * rows.rows + start + rank] = static_cast<int32_t>(row);
            }
            __syncwarp();
            row = next_row;
            code = next_code;
        }
        for (int64_t i = lane; i < rows.codes && fits; i += kWarp) ends[i] = local[i];
        __syncwarp();
    }
}

}  // namespace

RowOrder launch_order(const RowIds& rows, unsigned char* scratch, int64_t* counts, void* stream) {
    const int64_t blocks = row_blocks(rows.rows), cells = rows.groups * rows.codes;
    RowOrder order{rows.rows, rows.groups, rows.codes, nullptr, nullptr, nullptr};
    order.begin = reinterpret_cast<int32_t*>(scratch);
    scratch += bytes_of(cells, sizeof(int32_t));
    order.end = reinterpret_cast<int32_t*>(scratch);
    scratch += bytes_of(blocks * cells, sizeof(int32_t));
    order.order = reinterpret_cast<int32_t*>(scratch);
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    cuda_check(cudaMemsetAsync(order.end, 0, static_cast<size_t>(blocks * cells) * sizeof(int32_t), queue),
               "row order memset");
    const unsigned count_blocks = static_cast<unsigned>((rows.rows * rows.groups + kThreads - 1) / kThreads);
    count_kernel<<<count_blocks, kThreads, 0, queue>>>(rows, order);
    cuda_check(cudaGetLastError(), "row order (count)");
    const unsigned groups = static_cast<unsigned>(rows.groups < 65535 ? rows.groups : 65535);
    place_kernel<<<groups, kPlaceThreads, 0, queue>>>(order, counts);
    cuda_check(cudaGetLastError(), "row order (place)");
    const dim3 grid(static_cast<unsigned>(blocks), groups);
    order_kernel<<<grid, kWarp, 0, queue>>>(rows, order);
    cuda_check(cudaGetLastError(), "row order");
    return order;
}

}  // namespace meditok
