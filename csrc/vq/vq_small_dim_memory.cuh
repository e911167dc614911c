// The shared memory of vq_assign_small_dim.cu: its plan, and how rows and codes get there.
#pragma once

#include "vq/vq_search.cuh"

namespace meditok {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRowTiles = 4;  // products of 16 rows a warp
constexpr int kWarpRows = 16 * kRowTiles;
constexpr int kSlots = 2 * kRowTiles;  // rows a thread sees: slot s is row 8 s + lane / 4 of the warp's
constexpr int kChunkTiles = 4;
constexpr int kEntries = 128;            // tiles in reach that a warp can list: twice as many as it has rows
constexpr int kCandidates = 3;           // a row's list
constexpr int kStaticBytes = 64;         // of shared memory beside the dynamic part
constexpr int kStartStride = kTile + 4;  // floats: the four tiles of a chunk in different banks
static_assert(kEntries >= kWarpRows && kWarpRows == 64,
              "a tile in reach for every row; an entry has 6 bits for it");

// kSteps products of depth 8.
template <int kSteps>
struct Width {
    static constexpr int kColumns = 8 * kSteps;
    static constexpr int kStepBytes = kTile * 8 * 2;             // (32 codes, 8 columns) of fp16
    static constexpr int kTileBytes = kSteps * kStepBytes + 32;  // as kStartStride
    static constexpr int kStageBytes = kTileBytes + kStartStride * 4 + 16;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    static constexpr int kBlocks = 1;  // a multiprocessor: 64 KiB of shared memory hold one
#else
    static constexpr int kBlocks = kSteps == 1 ? 2 : 1;  // wider rows need the registers
#endif
    static constexpr int kRowBytes = kColumns * 4 + 5 * 4 + kCandidates * 4;
    static_assert(kTileBytes % 16 == 0 && kTileBytes % 128 == 32, "ldmatrix without bank conflicts");
};

// Decided by the host. Offsets are bytes of the dynamic shared memory.
struct Plan {
    int stage_tiles;  // a multiple of kChunkTiles
    int parts;        // warps that share the codes of the same 64 rows
    int rows;         // of a block
    int row_blocks;   // ceil(rows of x / rows)
    int bounds_at, start_at, x_at, scale_at, norm_at, alpha_at, lower_at, count_at, list_at, entries_at,
        bytes;
};

template <int kSteps>
void lay_out(Plan& plan) {
    int end = plan.stage_tiles * Width<kSteps>::kTileBytes;
    auto place = [&](int bytes) { return (end += bytes) - bytes; };
    plan.bounds_at = place(plan.stage_tiles * 16);
    plan.start_at = place(plan.stage_tiles * kStartStride * 4);
    plan.x_at = place(plan.rows * Width<kSteps>::kColumns * 4);
    for (int* at : {&plan.scale_at, &plan.norm_at, &plan.alpha_at, &plan.lower_at, &plan.count_at}) {
        *at = place(plan.rows * 4);
    }
    plan.list_at = place(plan.rows * kCandidates * 4);
    plan.entries_at = place(kWarps * kEntries * 4);
    plan.bytes = end;
}

struct Memory {
    const Plan& plan;

    template <class T>
    __device__ T* at(int offset) const {
        extern __shared__ uint4 dynamic[];
        return reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(dynamic) + offset);
    }
    __device__ unsigned char* codes() const { return at<unsigned char>(0); }  // (stage tiles, kTileBytes)
    // (stage tiles): reach, 2^-b, slack
    __device__ float4* bounds() const { return at<float4>(plan.bounds_at); }
    // (stage tiles, kStartStride): 2^b (lift bias + offset)
    __device__ float* start() const { return at<float>(plan.start_at); }
    __device__ float* x() const { return at<float>(plan.x_at); }          // (rows, kColumns): x'
    __device__ float* scale() const { return at<float>(plan.scale_at); }  // (rows): 2^a
    __device__ float* norm() const { return at<float>(plan.norm_at); }    // (rows): X'
    __device__ float* alpha() const { return at<float>(plan.alpha_at); }  // (rows)
    __device__ int* lower() const {
        return at<int>(plan.lower_at);
    }  // (rows): ordered L; infinite if settled
    __device__ int* count() const {
        return at<int>(plan.count_at);
    }  // (rows): candidates, kDone or kCanonical
    __device__ int* list() const { return at<int>(plan.list_at); }        // (rows, kCandidates)
    __device__ int* entries() const { return at<int>(plan.entries_at); }  // (warps, kEntries)
};

// Step 2: tiles first ... first + stage_tiles - 1 as fp16, a warp a tile, a lane a code.
template <int kSteps>
__device__ __forceinline__ void load_codes(const AssignParams& params, const PackedLayout& layout,
                                           Memory memory, int first) {
    const int64_t group = blockIdx.x;
    const PackedView view = packed_view(params.packed, layout, group);
    const int tiles = static_cast<int>(layout.tiles), width = static_cast<int>(params.codebook.width);
    const int lane = thread_id() % 32;
#pragma unroll 1
    for (int tile = thread_id() / 32; tile < memory.plan.stage_tiles; tile += kWarps) {
        const bool present = first + tile < tiles;
        const float scale = present ? power_of_two(code_exponent(view.reach[first + tile])) : 0.0f;
        const float* code = view.tiles + static_cast<int64_t>(first + tile) * width * kTile + lane;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            float value[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int column = step * 8 + i;
                value[i] = present && column < width ? code[column * kTile] * scale : 0.0f;
            }
            uint4 packed;
            packed.x = pack_half2(value[0], value[1]);
            packed.y = pack_half2(value[2], value[3]);
            packed.z = pack_half2(value[4], value[5]);
            packed.w = pack_half2(value[6], value[7]);
            unsigned char* out =
                memory.codes() + tile * Width<kSteps>::kTileBytes + step * Width<kSteps>::kStepBytes;
            reinterpret_cast<uint4*>(out)[lane] = packed;
        }
    }
}

// The bounds of the same tiles; for l2 they depend on the rows of the block.
template <int kSteps>
__device__ __forceinline__ void load_bounds(const AssignParams& params, const PackedLayout& layout,
                                            Memory memory, const Frame& frame, int first) {
    const int64_t group = blockIdx.x;
    const PackedView view = packed_view(params.packed, layout, group);
    const int tiles = static_cast<int>(layout.tiles);
#pragma unroll 2
    for (int i = thread_id(); i < memory.plan.stage_tiles * kTile; i += kThreads) {
        const int tile = i / kTile, lane = i % kTile;
        const bool present = first + tile < tiles;
        const float reach = present ? view.reach[first + tile] : 0.0f;
        const float bias = present ? view.bias[static_cast<int64_t>(first) * kTile + i] : -INFINITY;
        const int exponent = code_exponent(reach);
        const float start = power_of_two(exponent) * (frame.lift * bias + frame.offset);
        memory.start()[tile * kStartStride + lane] = bias > -INFINITY ? start : -INFINITY;
        if (lane == 0) {
            memory.bounds()[tile] = float4{reach, power_of_two(-exponent), tile_slack(frame, reach), 0.0f};
        }
    }
}

// The smallest reach of a tile that is not 0, as bits, and the largest.
__device__ __forceinline__ void find_reaches(const AssignParams& params, const PackedLayout& layout,
                                             int* reaches) {
    const int64_t group = blockIdx.x;
    const PackedView view = packed_view(params.packed, layout, group);
    __syncthreads();
    if (thread_id() == 0) reaches[0] = __float_as_int(INFINITY), reaches[1] = 0;
    __syncthreads();
    for (int64_t tile = thread_id(); tile < layout.tiles; tile += kThreads) {
        const int reach = __float_as_int(view.reach[tile]);
        if (reach > 0) atomicMin(&reaches[0], reach), atomicMax(&reaches[1], reach);
    }
    __syncthreads();
}

// Step 1: rows first_row ... of one group, and what they have in common.
template <int kSteps>
__device__ __forceinline__ void load_rows(const AssignParams& params, const PackedLayout& layout,
                                          Memory memory, Frame& frame, int block, const int* reaches) {
    const int64_t first_row = static_cast<int64_t>(block) * memory.plan.rows;
    const int64_t group = blockIdx.x;
    constexpr int kColumns = Width<kSteps>::kColumns;
    __shared__ int largest_x;
    const bool cosine = params.metric == Metric::kCosine;
    if (thread_id() == 0) largest_x = 0;
    constexpr int kBatch = 8;
    for (int start = thread_id(); start < memory.plan.rows * kColumns; start += kBatch * kThreads) {
        float value[kBatch];
        auto at = [&](int i) { return start + i * kThreads; };
        auto row = [&](int i) { return first_row + at(i) / kColumns; };
        auto column = [&](int i) { return at(i) % kColumns; };
        auto wanted = [&](int i) {
            return at(i) < memory.plan.rows * kColumns && row(i) < params.rows &&
                   column(i) < params.codebook.width;
        };
        read_rows(params, group, row, column, wanted, value);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            if (at(i) < memory.plan.rows * kColumns) memory.x()[at(i)] = value[i];
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int row = thread_id(); row < memory.plan.rows; row += kThreads) {
        const float* x = memory.x() + row * kColumns;
        float largest = 0.0f;
        bool wild = false;
#pragma unroll 8
        for (int i = 0; i < kColumns; ++i) {
            wild = wild || !(fabsf(x[i]) < kHalfLimit);
            largest = fmaxf(largest, fabsf(x[i]));
        }
        int state = kDone;
        if (first_row + row < params.rows)
            state = judge_row(params, layout, first_row + row, group, largest, wild);
        memory.count()[row] = state;
        if (state == 0) memory.scale()[row] = power_of_two(-exponent_of(largest));  // of cosine
        if (state == 0 && !cosine) atomicMax(&largest_x, __float_as_int(largest));
    }
    __syncthreads();
    const float smallest_reach = reaches[1] > 0 ? __int_as_float(reaches[0]) : 0.0f;
    const int exponent = row_exponent_l2(__int_as_float(largest_x), __int_as_float(reaches[1]));
    if (thread_id() == 0)
        frame = make_frame(params.metric, params.codebook.width, kColumns, exponent, smallest_reach);
    __syncthreads();
#pragma unroll 1
    for (int row = thread_id(); row < memory.plan.rows; row += kThreads) {
        float* x = memory.x() + row * kColumns;
        const bool filtered = memory.count()[row] == 0;
        if (!cosine) memory.scale()[row] = frame.lift;
        const float scale = filtered ? memory.scale()[row] : 0.0f;
        float squares = 0.0f, errors = 0.0f;
#pragma unroll 8
        for (int i = 0; i < kColumns; ++i) {
            const float value = filtered ? x[i] * scale : 0.0f;
            const float error = value - half_to_float(pack_half2(value, 0.0f));
            squares += value * value;
            errors += error * error;
            x[i] = value;
        }
        // At most 32 squares are summed: 1e-6 of the root, covered. What underflows is part of the slack.
        const float norm = rough_sqrt(squares) * (kRoundUp * kRoundUp);
        memory.norm()[row] = norm;
        memory.alpha()[row] = row_alpha(frame, norm, rough_sqrt(errors) * (kRoundUp * kRoundUp));
        memory.lower()[row] = ordered(filtered ? -INFINITY : INFINITY);
    }
    __syncthreads();
}

}  // namespace

}  // namespace meditok
