// vq_assign for widths up to 32, on tensor cores: a warp multiplies 64 rows with 8 codes at a time and keeps maxima.
//   1. A block reads its rows once, scales them to the range of fp16 and measures what fp16 costs (vq_filter_half.h).
//   2. Codes lie in shared memory as fp16: all of them, and the block goes on to further rows, or a stage at a time.
//   3. Of every 128 codes, a chunk, a thread keeps one maximum a row, then the row's lower bound, its two best upper
//      bounds, and the chunk of the best. The four threads of a row see one tile of 32 codes each.
//   4. A tile that reaches the row's lower bound is computed again, a lane a code: its candidates join the row's list.
//   5. One candidate is the answer, up to three are scored in float64, more are searched for in float32.
// Traffic a row: x and the id once. The packed codebook once a block of up to 256 rows, once altogether where it stays.
// Why so: a 16 x 8 product leaves a thread 4 sums, which take two three-way maxima where the architecture has them and
// four two-way ones elsewhere. That costs as much as the product or more, so nothing else is done per sum: no index, no
// bound, and no shuffle.
// Cosine starts from zero: maxima of 0 then stand for all negative scores, and a warp that finds a row with nothing
// better goes again with the offset that l2 always has.

#include "common/check.h"
#include "vq/vq_small_dim_memory.cuh"

namespace meditok {

namespace {

constexpr int kGoodStage = 64;  // tiles: a stage worth its barriers

// Step 3: what a thread knows of its kSlots rows.
struct Running {
    float lower[kSlots], first[kSlots], second[kSlots];  // L; the two largest upper bounds
    int chunk[kSlots];                                   // of the largest

    __device__ void reset() {
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
            lower[s] = first[s] = second[s] = -INFINITY;
            chunk[s] = 0;
        }
    }

    // L of the warp's rows to where all warps of a row meet. Without a start, maxima of 0 may stand for negative ones:
    // then a lower bound is none unless positive. False if a row in the filter has none.
    __device__ bool lower_of_rows(Memory memory, int first_row, bool start) {
        const int lane = lane_id();
        bool found = true;
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
            const int row = first_row + 8 * s + lane / 4;
            const float largest = warp_max<4>(lower[s]);
            const bool valid = start || largest > 0.0f;
            if (valid && lane % 4 == 0) atomicMax(&memory.lower()[row], ordered(largest));
            found = found && (valid || memory.count()[row] < 0);
        }
        return __all_sync(kAllLanes, found) != 0;
    }
};

template <int kSteps, bool kStart>
__device__ __forceinline__ void multiply_chunk(Memory memory, const uint32_t (&a)[kRowTiles][2 * kSteps],
                                               const float* alpha, float offset, int chunk,
                                               Running& running) {
    const int lane = lane_id(), quad = lane % 4;
    const unsigned char* codes = memory.codes() + chunk * kChunkTiles * Width<kSteps>::kTileBytes +
                                 lane % 8 / 2 * Width<kSteps>::kTileBytes + (lane / 8 * 2 + lane % 2) * 16;
    const float* start = memory.start() + (chunk * kChunkTiles + quad) * kStartStride;
    float largest[kSlots];
#pragma unroll
    for (int s = 0; s < kSlots; ++s) largest[s] = 0.0f;
#pragma unroll 1
    for (int four = 0; four < 4; ++four) {  // times four products of codes 2 n and 2 n + 1 of each tile
        uint32_t b[kSteps][4];
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            load_matrices(b[step], codes + step * Width<kSteps>::kStepBytes + four * 128);
        }
        const float4 low = *reinterpret_cast<const float4*>(start + four * 8);
        const float4 high = *reinterpret_cast<const float4*>(start + four * 8 + 4);
        const float starts[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const float left = kStart ? starts[2 * n] : 0.0f, right = kStart ? starts[2 * n + 1] : 0.0f;
            const float from[4] = {left, right, left, right};
#pragma unroll
            for (int tile = 0; tile < kRowTiles; ++tile) {
                float sum[4];
                if constexpr (kSteps == 1) {
                    mma_k8(sum, a[tile], b[0][n], from);
                } else {
                    mma_k16(sum, a[tile], b[0][n], b[1][n], from);
                }
#pragma unroll
                for (int step = 2; step < kSteps; step += 2) {
                    mma_k16(sum, a[tile] + 2 * step, b[step][n], b[step + 1][n], sum);
                }
                largest[2 * tile] = max_nonnegative(largest[2 * tile], sum[0], sum[1]);
                largest[2 * tile + 1] = max_nonnegative(largest[2 * tile + 1], sum[2], sum[3]);
            }
        }
    }
    const float4 bounds = memory.bounds()[chunk * kChunkTiles + quad];
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
        const float error = __fmaf_rn(alpha[8 * s], bounds.x, bounds.z);
        const float upper = __fmaf_rn(largest[s], bounds.y, error) - offset;
        running.lower[s] = fmaxf(running.lower[s], __fmaf_rn(largest[s], bounds.y, -error) - offset);
        running.second[s] = fmaxf(running.second[s], fminf(running.first[s], upper));
        running.chunk[s] = upper > running.first[s] ? chunk : running.chunk[s];
        running.first[s] = fmaxf(running.first[s], upper);
    }
}

// Step 4: the codes of one tile of the stage that reach a row's lower bound join its list.
template <int kSteps>
__device__ void scan_tile(Memory memory, const Frame& frame, int row, int tile, int first) {
    const int lane = thread_id() % 32;
    const float* x = memory.x() + row * Width<kSteps>::kColumns;
    const unsigned char* code = memory.codes() + tile * Width<kSteps>::kTileBytes + lane * 16;
    const float4 bounds = memory.bounds()[tile];
    float value = memory.start()[tile * kStartStride + lane];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        const uint4 packed = *reinterpret_cast<const uint4*>(code + step * Width<kSteps>::kStepBytes);
        const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
        const float4* part = reinterpret_cast<const float4*>(x + step * 8);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float4 four = part[i];
            value = __fmaf_rn(four.x, half_to_float(pairs[2 * i]), value);
            value = __fmaf_rn(four.y, half_to_float(pairs[2 * i] >> 16), value);
            value = __fmaf_rn(four.z, half_to_float(pairs[2 * i + 1]), value);
            value = __fmaf_rn(four.w, half_to_float(pairs[2 * i + 1] >> 16), value);
        }
    }
    const float error = __fmaf_rn(row_alpha(frame, memory.norm()[row], 0.0f), bounds.x, bounds.z);
    const float upper = __fmaf_rn(value, bounds.y, error) - frame.offset;
    const bool reaches = upper >= from_ordered(memory.lower()[row]);
    const unsigned hits = __ballot_sync(kAllLanes, reaches);
    if (hits == 0) return;
    int position = 0;
    if (lane == 0) position = atomicAdd(&memory.count()[row], __popc(hits));
    position = __shfl_sync(kAllLanes, position, 0) + __popc(hits & ((1u << lane) - 1));
    if (reaches && position < kCandidates) {
        memory.list()[row * kCandidates + position] = (first + tile) * kTile + lane;
    }
}

// Step 4 for a warp: its list of tiles in reach, then each of them. An entry: tile << 7 | all << 6 | row. `all`: more
// than one tile of the thread was in reach, so all that it has seen are scanned.
template <int kSteps>
__device__ void scan(Memory memory, const Frame& frame, const Running& running, int first_row, int part,
                     int first) {
    const int lane = lane_id();
    int* entries = memory.entries() + thread_id() / 32 * kEntries;
    int listed = 0;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
        const int row = 8 * s + lane / 4;
        const float lower = from_ordered(memory.lower()[first_row + row]);
        const bool reaches = running.first[s] >= lower, all = running.second[s] >= lower;
        const unsigned mask = __ballot_sync(kAllLanes, reaches);
        const int position = listed + __popc(mask & ((1u << lane) - 1));
        const int tile = running.chunk[s] * kChunkTiles + lane % 4;
        if (reaches && position < kEntries) entries[position] = tile << 7 | (all ? 64 : 0) | row;
        if (reaches && position >= kEntries) atomicAdd(&memory.count()[first_row + row], kCandidates + 1);
        listed += __popc(mask);
    }
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < (listed < kEntries ? listed : kEntries); ++i) {
        const int entry = entries[i], row = first_row + entry % 64, tile = entry >> 7;
        const bool all = (entry & 64) != 0;
        int from = tile, end = tile + 1;
        if (all) from = part * kChunkTiles + tile % kChunkTiles, end = memory.plan.stage_tiles;
#pragma unroll 1
        for (; from < end; from += memory.plan.parts * kChunkTiles)
            scan_tile<kSteps>(memory, frame, row, from, first);
    }
    __syncwarp();
}

// Step 5 for the rows of a block.
template <int kSteps>
__device__ __forceinline__ void finish(const AssignParams& params, const PackedLayout& layout, Memory memory,
                                       const Frame& frame, int block) {
    const int64_t first_row = static_cast<int64_t>(block) * memory.plan.rows;
    const int64_t group = blockIdx.x;
    __shared__ int contested;
    const int lane = thread_id() % 32;
    int64_t* ids = params.ids + first_row * params.codebook.groups + group;
    if (thread_id() == 0) contested = 0;
    __syncthreads();
#pragma unroll 1
    for (int base = thread_id() / 32 * 32; base < memory.plan.rows; base += kThreads) {
        const int row = base + lane;
        const int count = memory.count()[row];
        if (count == 1) ids[row * params.codebook.groups] = memory.list()[row * kCandidates];
        if (count > 1 && count <= kCandidates) memory.entries()[atomicAdd(&contested, 1)] = row;
        const bool open = count == kCanonical || count == 0 || count > kCandidates;
#pragma unroll 1
        for (unsigned rest = __ballot_sync(kAllLanes, open); rest != 0; rest &= rest - 1) {
            const int other = base + __ffs(static_cast<int>(rest)) - 1;
            const int64_t id = memory.count()[other] == kCanonical
                                   ? canonical_search(params, layout, first_row + other, group)
                                   : full_search(params, layout, frame, first_row + other, group,
                                                 memory.scale()[other], memory.norm()[other]);
            if (lane == 0) ids[other * params.codebook.groups] = id;
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = thread_id(); i < contested; i += kThreads) {
        const int row = memory.entries()[i];
        ids[row * params.codebook.groups] = score_candidates(
            params, layout, first_row + row, group, memory.list() + row * kCandidates, memory.count()[row]);
    }
}

template <int kSteps>
__global__ void __launch_bounds__(kThreads, Width<kSteps>::kBlocks)
    assign_small_dim_kernel(const __grid_constant__ AssignParams params,
                            const __grid_constant__ PackedLayout layout, const __grid_constant__ Plan plan) {
    __shared__ int reaches[2];
    __shared__ Frame frame;
    const Memory memory{plan};
    find_reaches(params, layout, reaches);
    for (int block = blockIdx.y; block < plan.row_blocks; block += gridDim.y) {
        __syncthreads();
        load_rows<kSteps>(params, layout, memory, frame, block, reaches);
        const bool loaded = plan.stage_tiles >= layout.tiles && block != static_cast<int>(blockIdx.y);
        for (int first = 0; first < layout.tiles; first += plan.stage_tiles) {
            if (!loaded) {
                __syncthreads();
                load_codes<kSteps>(params, layout, memory, first);
            }
            if (!loaded || params.metric == Metric::kL2)
                load_bounds<kSteps>(params, layout, memory, frame, first);
            __syncthreads();
            const int lane = lane_id(), warp = thread_id() / 32;
            const int part = warp % plan.parts, warp_row = warp / plan.parts * kWarpRows;
            uint32_t a[kRowTiles][2 * kSteps];
            bool filtered = false;
#pragma unroll
            for (int s = 0; s < kSlots; ++s) {
                const int row = warp_row + 8 * s + lane / 4;
                filtered = filtered || memory.count()[row] >= 0;
#pragma unroll
                for (int step = 0; step < kSteps; ++step) {
                    const float* x = memory.x() + row * Width<kSteps>::kColumns + step * 8 + lane % 4 * 2;
                    a[s / 2][2 * step + s % 2] = pack_half2(x[0], x[1]);
                }
            }
            filtered = __any_sync(kAllLanes, filtered) != 0;
            Running running;
            bool start = params.metric == Metric::kL2;
            while (filtered) {
                running.reset();
                const float* alpha = memory.alpha() + warp_row + lane / 4;
                const int chunks = plan.stage_tiles / kChunkTiles;
#pragma unroll 1
                for (int chunk = part; chunk < chunks && !start; chunk += plan.parts) {
                    multiply_chunk<kSteps, false>(memory, a, alpha, 0.0f, chunk, running);
                }
#pragma unroll 1
                for (int chunk = part; chunk < chunks && start; chunk += plan.parts) {
                    multiply_chunk<kSteps, true>(memory, a, alpha, frame.offset, chunk, running);
                }
                const bool found = running.lower_of_rows(memory, warp_row, start);
                if (start || found) break;
                start = true;
            }
            __syncthreads();
            if (filtered) scan<kSteps>(memory, frame, running, warp_row, part, first);
        }
        finish<kSteps>(params, layout, memory, frame, block);
    }
}

// ---- launch ----------------------------------------------------------------------------------------------

int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    cuda_check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
    return value;
}

// Tiles that fit beside the rows, at most all of them.
template <int kSteps>
int fitting_tiles(int bytes, const Plan& plan, int64_t tiles) {
    const int rest = bytes - plan.rows * Width<kSteps>::kRowBytes - kWarps * kEntries * 4;
    const int64_t fitting = rest / Width<kSteps>::kStageBytes;
    const int64_t stage = fitting < tiles ? fitting : tiles + kChunkTiles - 1;
    return static_cast<int>(stage / kChunkTiles * kChunkTiles);
}

template <int kSteps>
void launch(const AssignParams& params, int device, cudaStream_t stream) {
    const int64_t groups = params.codebook.groups;
    const PackedLayout layout = packed_layout(groups, params.codebook.codes, params.codebook.width);
    const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
    const int block_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - kStaticBytes;
    const int half_bytes =
        attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) / 2 - 1024 - kStaticBytes;

    // Two warps share the codes of 64 rows, more where rows are few and multiprocessors would idle.
    Plan plan{0, 2, kWarps / 2 * kWarpRows};
    auto row_blocks = [&] { return static_cast<int>((params.rows + plan.rows - 1) / plan.rows); };
    while (row_blocks() * groups < multiprocessors && plan.parts < kWarps) {
        plan.parts *= 2;
        plan.rows /= 2;
    }
    plan.row_blocks = row_blocks();
    // Two blocks a multiprocessor overlap each other's phases, if that leaves a stage worth its barriers.
    plan.stage_tiles = Width<kSteps>::kBlocks == 2 && half_bytes < block_bytes
                           ? fitting_tiles<kSteps>(half_bytes, plan, layout.tiles)
                           : 0;
    if (plan.stage_tiles < kGoodStage && plan.stage_tiles < layout.tiles) {
        plan.stage_tiles = fitting_tiles<kSteps>(block_bytes, plan, layout.tiles);
    }
    lay_out<kSteps>(plan);
    // Blocks with resident codes go on to further rows, so there are as many as run at once.
    const int64_t at_once = (Width<kSteps>::kBlocks * multiprocessors + groups - 1) / groups;
    const bool stay = plan.stage_tiles >= layout.tiles && plan.row_blocks > at_once;
    const int64_t steps = stay ? at_once : plan.row_blocks;
    const dim3 grid(static_cast<unsigned>(groups), static_cast<unsigned>(steps < 65535 ? steps : 65535));
    cuda_check(cudaFuncSetAttribute(assign_small_dim_kernel<kSteps>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, plan.bytes),
               "vq_assign (small width) shared memory");
    assign_small_dim_kernel<kSteps><<<grid, kThreads, plan.bytes, stream>>>(params, layout, plan);
    cuda_check(cudaGetLastError(), "vq_assign (small width)");
}

}  // namespace

void launch_assign_small_dim(const AssignParams& params, int device, void* stream) {
    DeviceGuard guard(device);
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    if (params.codebook.width <= 8) {
        launch<1>(params, device, queue);
    } else if (params.codebook.width <= 16) {
        launch<2>(params, device, queue);
    } else {
        launch<4>(params, device, queue);
    }
}

}  // namespace meditok
