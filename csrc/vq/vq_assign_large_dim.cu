// vq_assign for widths above 32, on tensor cores: a block multiplies 128 rows with 128 codes, a chunk, at a time.
//   1. A warp a row finds its scale, its norm and what fp16 costs it (vq_filter_half.h): two reads of x.
//   2. For each chunk the depth passes through shared memory in steps of 32 as fp16; the sums stay in registers.
//   3. The chunk's maxima raise the rows' lower bounds; then codes that reach them join the row's list, whose stale
//      entries are dropped when it fills. Nothing of size rows x codes is written.
//   4. One code left is the answer. Several are computed again in float32, a warp a row, and those that this cannot
//      separate in float64. A list that overflowed means a float32 search of the row.
// Traffic a row: x twice, and once more for every 128 codes (from the second-level cache); the codebook once a block.
// Why so: a warp's 32 x 64 sums need 6 KiB of operands for 64 Ki multiply-adds, so tensor cores and shared memory are
// kept about equally busy. One pass in fp16 leaves, for random vectors of width 768, 1.13 candidates a row of 512
// codes and 1.27 of 4,096: the band 2 E is 0.0019 X R, the gap behind the best about X R / sqrt(2 C ln K). That is
// cheaper than the three passes of split operands that would leave 1.00.

#include "common/check.h"
#include "vq/vq_search.cuh"

namespace meditok {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 128;
constexpr int kChunkTiles = 4;
constexpr int kDepth = 32;
constexpr int kCandidates = 12;  // a row's list
constexpr int kFull = 4;         // from here on stale entries are dropped after a chunk
static_assert(kCandidates <= 32, "a lane a candidate");
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kBlocks = 1;  // a multiprocessor: 64 KiB of shared memory hold one
#else
constexpr int kBlocks = 2;
#endif

// A warp multiplies 32 rows with 64 codes: 16 of each tile of the chunk, so that a thread's codes are of one tile.
constexpr int kRowWarps = kRows / 32;
constexpr int kProducts =
    8;  // columns of products: product j of all 16 holds codes 2 j and 2 j + 1 of each tile
static_assert(kRowWarps * 2 == kWarps && 2 * kProducts * 2 == kTile, "warps cover the chunk");

// Bytes from row to row of fp16: eight rows of 16 bytes in different banks; tiles shifted so that pairs are, too.
constexpr int kRowBytes = kDepth * 2 + 16;
constexpr int kTileBytes = kTile * kRowBytes + 32;
constexpr int kBiasStride = kTile + 4;
static_assert(kRowBytes % 128 == 80 && kTileBytes % 128 == 32, "ldmatrix without bank conflicts");

struct Shared {
    uint4 x[kRows * kRowBytes / 16];
    uint4 codes[kChunkTiles * kTileBytes / 16];
    float bias[kChunkTiles * kBiasStride];  // lift bias
    float4 bounds[kChunkTiles];             // reach, 2^-b, slack
    float scale[kRows], norm[kRows], alpha[kRows];
    int lower[kRows];  // ordered L; infinite for a settled row
    int count[kRows];  // candidates, kDone or kCanonical
    int code[kRows][kCandidates];
    float upper[kRows][kCandidates];
    int largest_x, largest_reach;
    Frame frame;
};
static_assert(sizeof(Shared) <= 48 * 1024, "static shared memory of every architecture");

// Step 1, for the rows from first_row on. Every thread knows the answer: is a row left for the filter?
__device__ __forceinline__ bool prepare_rows(const AssignParams& params, const PackedLayout& layout,
                                             Shared& shared, int64_t first_row, int64_t group) {
    constexpr int kBatch = 8;
    const PackedView view = packed_view(params.packed, layout, group);
    const int64_t width = params.codebook.width;
    const bool cosine = params.metric == Metric::kCosine;
    const int thread = thread_id(), lane = thread % 32;
    if (thread == 0) shared.largest_x = shared.largest_reach = 0;
    __syncthreads();
    for (int64_t tile = thread; tile < layout.tiles; tile += kThreads) {
        atomicMax(&shared.largest_reach, __float_as_int(view.reach[tile]));
    }
    // A batch of one row, whose elements from `start` on are shared by the lanes.
    auto read = [&](int64_t row, int64_t start, float (&value)[kBatch]) {
        auto column = [&](int i) { return start + i * 32 + lane; };
        read_rows(
            params, group, [&](int) { return row; }, column, [&](int i) { return column(i) < width; }, value);
    };
    bool filtered = false;
    for (int row = thread / 32; row < kRows; row += kWarps) {
        float largest = 0.0f, value[kBatch];
        bool wild = false;
        const bool present = first_row + row < params.rows;
        for (int64_t start = 0; start < width && present; start += kBatch * 32) {
            read(first_row + row, start, value);
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                wild = wild || !(fabsf(value[i]) < kHalfLimit);
                largest = fmaxf(largest, fabsf(value[i]));
            }
        }
        wild = __any_sync(kAllLanes, wild) != 0;
        largest = warp_max(largest);
        if (lane != 0) continue;
        int state = kDone;
        if (present) state = judge_row(params, layout, first_row + row, group, largest, wild);
        shared.count[row] = state;
        shared.scale[row] = state == 0 ? power_of_two(-exponent_of(largest)) : 0.0f;
        if (state == 0) atomicMax(&shared.largest_x, __float_as_int(largest));
        filtered = filtered || state == 0;
    }
    filtered = __syncthreads_or(filtered) != 0;
    if (!filtered) return false;
    const int columns = static_cast<int>((width + kDepth - 1) / kDepth * kDepth);
    const int exponent =
        row_exponent_l2(__int_as_float(shared.largest_x), __int_as_float(shared.largest_reach));
    if (thread == 0) shared.frame = make_frame(params.metric, width, columns, exponent, 0.0f);
    __syncthreads();
    for (int row = thread / 32; row < kRows; row += kWarps) {
        const bool open = shared.count[row] == 0;
        const float scale = !open ? 0.0f : cosine ? shared.scale[row] : power_of_two(exponent);
        float squares = 0.0f, errors = 0.0f, value[kBatch];
        for (int64_t start = 0; start < width && open; start += kBatch * 32) {
            read(first_row + row, start, value);
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const float scaled = value[i] * scale,
                            error = scaled - half_to_float(pack_half2(scaled, 0.0f));
                squares += scaled * scaled;
                errors += error * error;
            }
        }
        // A lane adds up to 2,048 squares, the tree five more: 1.0005 is an upper bound with room.
        const float norm = rough_sqrt(warp_sum(squares)) * 1.0005f,
                    error = rough_sqrt(warp_sum(errors)) * 1.0005f;
        if (lane != 0) continue;
        shared.scale[row] = scale;
        shared.norm[row] = norm;
        shared.alpha[row] = row_alpha(shared.frame, norm, error);
        shared.lower[row] = ordered(open ? -INFINITY : INFINITY);
    }
    __syncthreads();
    return true;
}

// Step 2: columns depth ... of the block's rows, two neighbouring columns a thread; of the chunk's codes, a code and 16
// columns a thread.
__device__ __forceinline__ void load_step(const AssignParams& params, const PackedView& view, Shared& shared,
                                          int64_t first_row, int64_t group, int64_t first_tile, int64_t tiles,
                                          int64_t depth) {
    const int64_t width = params.codebook.width;
    const int lane = lane_id(), warp = thread_id() / 32;
    constexpr int kOwnRows = kRows / kWarps;
    float x[kOwnRows];
    auto local = [&](int i) { return warp * kOwnRows + i / 2 * 2 + lane / 16; };
    auto column = [&](int i) { return depth + lane % 16 * 2 + i % 2; };
    auto wanted = [&](int i) { return column(i) < width && shared.scale[local(i)] != 0.0f; };
    read_rows(params, group, [&](int i) { return first_row + local(i); }, column, wanted, x);
#pragma unroll
    for (int i = 0; i < kOwnRows; i += 2) {
        const float scale = shared.scale[local(i)];
        unsigned char* out =
            reinterpret_cast<unsigned char*>(shared.x) + local(i) * kRowBytes + lane % 16 * 4;
        *reinterpret_cast<uint32_t*>(out) = pack_half2(x[i] * scale, x[i + 1] * scale);
    }
    const int tile = warp % kChunkTiles, half = warp / kChunkTiles;
    const bool present = first_tile + tile < tiles;
    const float scale = present ? power_of_two(code_exponent(view.reach[first_tile + tile])) : 0.0f;
    const int64_t start = depth + half * 16;
    const float* code = view.tiles + ((first_tile + tile) * width + start) * kTile + lane;
    float c[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) c[i] = present && start + i < width ? code[i * kTile] * scale : 0.0f;
    unsigned char* out =
        reinterpret_cast<unsigned char*>(shared.codes) + tile * kTileBytes + lane * kRowBytes;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        uint4 packed;
        packed.x = pack_half2(c[8 * i], c[8 * i + 1]);
        packed.y = pack_half2(c[8 * i + 2], c[8 * i + 3]);
        packed.z = pack_half2(c[8 * i + 4], c[8 * i + 5]);
        packed.w = pack_half2(c[8 * i + 6], c[8 * i + 7]);
        reinterpret_cast<uint4*>(out)[half * 2 + i] = packed;
    }
}

__device__ __forceinline__ void multiply_step(const Shared& shared, float (&sum)[2][kProducts][4]) {
    const int lane = lane_id(), warp = thread_id() / 32;
    const unsigned char* x = reinterpret_cast<const unsigned char*>(shared.x) +
                             (warp % kRowWarps * 32 + lane % 16) * kRowBytes + lane / 16 * 16;
    // Matrix lane / 8: product (lane / 8) / 2 of two, half (lane / 8) % 2 of the depth; its row lane % 8 is code
    // 2 product + lane % 2 of tile lane % 8 / 2.
    const unsigned char* code =
        reinterpret_cast<const unsigned char*>(shared.codes) + lane % 8 / 2 * kTileBytes +
        (2 * (warp / kRowWarps * kProducts + lane / 16) + lane % 2) * kRowBytes + lane / 8 % 2 * 16;
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
        uint32_t a[2][4];
        load_matrices(a[0], x + step * 32);
        load_matrices(a[1], x + 16 * kRowBytes + step * 32);
#pragma unroll
        for (int j = 0; j < kProducts; j += 2) {
            uint32_t b[4];
            load_matrices(b, code + j * 2 * kRowBytes + step * 32);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                mma_k16(sum[i][j], a[i], b[0], b[1], sum[i][j]);
                mma_k16(sum[i][j + 1], a[i], b[2], b[3], sum[i][j + 1]);
            }
        }
    }
}

__device__ __forceinline__ void load_bounds(const PackedView& view, Shared& shared, int64_t first_tile,
                                            int64_t tiles) {
    const int thread = thread_id();
    if (thread >= kChunkTiles * kTile) return;
    const int tile = thread / kTile, lane = thread % kTile;
    const bool present = first_tile + tile < tiles;
    const float bias = present ? view.bias[first_tile * kTile + thread] : -INFINITY;
    shared.bias[tile * kBiasStride + lane] = bias > -INFINITY ? shared.frame.lift * bias : -INFINITY;
    if (lane != 0) return;
    const float reach = present ? view.reach[first_tile + tile] : 0.0f;
    shared.bounds[tile] =
        float4{reach, power_of_two(-code_exponent(reach)), tile_slack(shared.frame, reach), 0.0f};
}

// The entries of a row's list that reach L move to its front; how many they are.
__device__ inline int drop_stale(Shared& shared, int row) {
    const float lower = from_ordered(shared.lower[row]);
    int kept = 0;
    for (int i = 0; i < shared.count[row]; ++i) {
        if (!(shared.upper[row][i] >= lower)) continue;
        shared.code[row][kept] = shared.code[row][i];
        shared.upper[row][kept++] = shared.upper[row][i];
    }
    return kept;
}

// Step 3.
__device__ __forceinline__ void collect(Shared& shared, int64_t first_tile, float (&sum)[2][kProducts][4]) {
    const int lane = lane_id(), warp = thread_id() / 32, tile = lane % 4;
    const int first = warp / kRowWarps * kProducts * 2;  // of the tile's codes
    const float4 bounds = shared.bounds[tile];
    float error[4], largest[4];
#pragma unroll
    for (int s = 0; s < 4; ++s) {  // rows s * 8 + lane / 4 of the warp's
        const int row = warp % kRowWarps * 32 + s * 8 + lane / 4;
        error[s] = __fmaf_rn(shared.alpha[row], bounds.x, bounds.z);
        largest[s] = -INFINITY;
#pragma unroll
        for (int j = 0; j < kProducts * 2; ++j) {
            float& value = sum[s / 2][j / 2][s % 2 * 2 + j % 2];
            value = __fmaf_rn(value, bounds.y, shared.bias[tile * kBiasStride + first + j]);
            largest[s] = fmaxf(largest[s], value);
        }
        const float lower = warp_max<4>(largest[s] - error[s]);
        if (tile == 0) atomicMax(&shared.lower[row], ordered(lower));
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < 4; ++s) {
        const int row = warp % kRowWarps * 32 + s * 8 + lane / 4;
        const float lower = from_ordered(shared.lower[row]);
        if (!(largest[s] > -INFINITY && largest[s] + error[s] >= lower)) continue;
        unsigned reached = 0;
#pragma unroll
        for (int j = 0; j < kProducts * 2; ++j) {
            const float value = sum[s / 2][j / 2][s % 2 * 2 + j % 2];
            reached |= value > -INFINITY && value + error[s] >= lower ? 1u << j : 0u;
        }
        int position = atomicAdd(&shared.count[row], __popc(reached));
        for (; reached != 0; reached &= reached - 1, ++position) {
            if (position >= kCandidates) break;
            const int j = __ffs(static_cast<int>(reached)) - 1;
            shared.code[row][position] = static_cast<int>(first_tile + tile) * kTile + first + j;
            shared.upper[row][position] = largest[s] + error[s];  // of all of them
        }
    }
    __syncthreads();
    // A list that has overflowed stays so: its count never falls.
    const int row = thread_id();
    if (row < kRows && shared.count[row] > kFull && shared.count[row] <= kCandidates) {
        shared.count[row] = drop_stale(shared, row);
    }
}

// Step 4 for one row with several candidates, a warp.
__device__ __forceinline__ int64_t separate(const AssignParams& params, const PackedView& view,
                                            const Shared& shared, int row, int64_t first_row, int64_t group) {
    constexpr int kBatch = 4;
    const int lane = lane_id(), count = shared.count[row];
    const int64_t width = params.codebook.width;
    float lower = -INFINITY, upper = -INFINITY;  // of the row; of lane's candidate
    for (int i = 0; i < count; ++i) {
        const int64_t code = shared.code[row][i], tile = code / kTile;
        float sum = 0.0f;
        for (int64_t start = 0; start < width; start += kBatch * 32) {
            float x[kBatch], c[kBatch];
            auto column = [&](int k) { return start + k * 32 + lane; };
            auto wanted = [&](int k) { return column(k) < width; };
            read_rows(params, group, [&](int) { return first_row + row; }, column, wanted, x);
#pragma unroll
            for (int k = 0; k < kBatch; ++k) {
                c[k] = wanted(k) ? view.tiles[(tile * width + column(k)) * kTile + code % kTile] : 0.0f;
            }
#pragma unroll
            for (int k = 0; k < kBatch; ++k) sum = __fmaf_rn(x[k] * shared.scale[row], c[k], sum);
        }
        // A lane's chain, a tree of five, the bias, and the rounding of the operands: columns / 32 + 9 times u.
        const float accumulation = static_cast<float>(width / 32 + 20) * 1.1920929e-7f,
                    radius = view.radius[code];
        const float value = warp_sum(sum) + shared.frame.lift * view.bias[code];
        const float error =
            shared.norm[row] * accumulation * radius + tile_slack(shared.frame, radius, accumulation);
        lower = fmaxf(lower, value - error);
        if (lane == i) upper = value + error;
    }
    Best best;
    const bool open = lane < count && upper >= lower;
    if (open) best.code = shared.code[row][lane];
    if (__popc(__ballot_sync(kAllLanes, open)) > 1 && open) {
        best.score = device_score(params, first_row + row, group, best.code, view.norm[best.code]);
    }
    return warp_best(best).code;
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    assign_large_dim_kernel(const __grid_constant__ AssignParams params,
                            const __grid_constant__ PackedLayout layout) {
    __shared__ Shared shared;
    const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows, groups = params.codebook.groups;
    for (int64_t group = blockIdx.y; group < groups; group += gridDim.y) {
        const PackedView view = packed_view(params.packed, layout, group);
        const bool filtered = prepare_rows(params, layout, shared, first_row, group);
        for (int64_t tile = 0; tile < layout.tiles && filtered; tile += kChunkTiles) {
            float sum[2][kProducts][4] = {};
            load_bounds(view, shared, tile, layout.tiles);
            for (int64_t depth = 0; depth < params.codebook.width; depth += kDepth) {
                __syncthreads();
                load_step(params, view, shared, first_row, group, tile, layout.tiles, depth);
                __syncthreads();
                multiply_step(shared, sum);
            }
            collect(shared, tile, sum);
        }
        __syncthreads();
        const int lane = lane_id();
        for (int row = thread_id() / 32; row < kRows; row += kWarps) {
            int count = shared.count[row];
            if (count == kDone) continue;
            if (count > 0 && count <= kCandidates) {
                __syncwarp();
                if (lane == 0) shared.count[row] = drop_stale(shared, row);
                __syncwarp();
                count = shared.count[row];
            }
            int64_t id;
            if (count == 1) {
                id = shared.code[row][0];
            } else if (count > 1 && count <= kCandidates) {
                id = separate(params, view, shared, row, first_row, group);
            } else if (count == kCanonical) {
                id = canonical_search(params, layout, first_row + row, group);
            } else {
                id = full_search(params, layout, shared.frame, first_row + row, group, shared.scale[row],
                                 shared.norm[row]);
            }
            if (lane == 0) params.ids[(first_row + row) * groups + group] = id;
        }
        __syncthreads();
    }
}

}  // namespace

void launch_assign_large_dim(const AssignParams& params, int device, void* stream) {
    DeviceGuard guard(device);
    const PackedLayout layout =
        packed_layout(params.codebook.groups, params.codebook.codes, params.codebook.width);
    const int64_t groups = params.codebook.groups, blocks = (params.rows + kRows - 1) / kRows;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(groups < 65535 ? groups : 65535));
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    assign_large_dim_kernel<<<grid, kThreads, 0, queue>>>(params, layout);
    cuda_check(cudaGetLastError(), "vq_assign (large width)");
}

}  // namespace meditok
