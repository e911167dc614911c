// attention on tensor cores (mma.sync), the forward: softmax as it goes, nothing of size queries x keys in memory.
//
// A block of four warps has 128 (halves, widths up to 64) or 64 queries of one head, each warp a quarter of them:
//   1. The queries and the first keys and values come into shared memory; further tiles of keys are fetched while the
//      one before is worked on, where two fit.
//   2. A tile: scores = q kᵀ; the row's maximum grows and what was summed shrinks by as much; p = 2^(score - maximum);
//      out += p v, the p going from sums to operands without leaving registers.
//   3. out / sum of p, rounded once, leaves through shared memory in vectors of 16 bytes, at the strides given.
// Causal: tiles beyond the diagonal are neither read nor computed; long blocks come first. Mean over heads: a block goes
// through all heads of its queries and adds their results in shared memory, each thread its own; no head is written.
// Traffic: q and out once; k and v once per block of queries, mostly from the second-level cache.
// Why so: with 32 rows a warp a fragment of k or v is used twice, so shared memory feeds the tensor cores without being
// the limit; 64 and more columns of out and of scores then fill the registers of two blocks a multiprocessor. At width
// 128 and for tf32 that is 16 rows, and 32 keys where rows are long, so that 99 KiB of shared memory are enough.

#include "attention/attention_tiles.cuh"
#include "common/check.h"

namespace meditok {

namespace {

template <class Operand, int kWidth>
struct Shape {
    using Element = typename Operand::Element;
    static constexpr int kRowTiles = kWidth <= 64 && !kIsFloat<Operand> ? 2 : 1;
    static constexpr int kWarpRows = kRowTiles * 16, kRows = kWarps * kWarpRows;
    static constexpr int kColumns = kWidth <= 64 ? 64 : 32;
    static constexpr int kStride = kRowBytes<Element, kWidth>;
    static constexpr int kOwnBytes = kRows * kStride, kTileBytes = kColumns * kStride;
    static constexpr int kMaskBytes = kRows * kMaskStride<kColumns> * 4;
    static constexpr int kMeanBytes = kRows * kWidth * 4;
};

struct Plan {
    int row_blocks;  // of one head
    int stages;      // 2: a tile of keys and values is fetched while another is used
    int mask_start, mean_start, bytes;
    bool vectors[4];  // q, k, v, out
};

template <class Operand, int kWidth>
__device__ __forceinline__ void forward(const AttentionParams& params, const Plan& plan,
                                        unsigned char* shared) {
    using S = Shape<Operand, kWidth>;
    using Element = typename Operand::Element;
    constexpr int kColumnTiles = S::kColumns / 8;
    const bool causal = params.mask_kind == MaskKind::kCausal;
    const int row_block = plan.row_blocks - 1 - static_cast<int>(blockIdx.x) % plan.row_blocks;
    const int other = static_cast<int>(blockIdx.x) / plan.row_blocks;
    const int heads = static_cast<int>(params.heads), keys = static_cast<int>(params.keys);
    const int batch = params.mean ? other : other / heads;
    const int first_head = params.mean ? 0 : other % heads, end_head = params.mean ? heads : first_head + 1;
    const int first_row = row_block * S::kRows, warp_row = thread_id() / 32 * S::kWarpRows;
    const int last_key = causal && first_row + S::kRows < keys ? first_row + S::kRows : keys;
    const int tiles = (last_key + S::kColumns - 1) / S::kColumns;
    const float scale = static_cast<float>(params.scale) * kLog2E;
    const bool masked = params.mask_kind == MaskKind::kBool || params.mask_kind == MaskKind::kAdditive;

    unsigned char* own = shared + warp_row * S::kStride;
    float* mask = reinterpret_cast<float*>(shared + plan.mask_start);
    float* mean = reinterpret_cast<float*>(shared + plan.mean_start) + thread_id();

#pragma unroll 1
    for (int head = first_head; head < end_head; ++head) {
        const auto k = head_of<Element>(params.k, params.k_strides, batch, head, params.keys, params.width,
                                        plan.vectors[1]);
        const auto v = head_of<Element>(params.v, params.v_strides, batch, head, params.keys, params.width,
                                        plan.vectors[2]);
        auto fetch = [&](int tile) {
            unsigned char* stage = shared + S::kOwnBytes + tile % plan.stages * 2 * S::kTileBytes;
            load_tile<S::kColumns, kWidth>(stage, k, tile * S::kColumns);
            load_tile<S::kColumns, kWidth>(stage + S::kTileBytes, v, tile * S::kColumns);
        };
        load_tile<S::kRows, kWidth>(shared,
                                    head_of<Element>(params.q, params.q_strides, batch, head, params.queries,
                                                     params.width, plan.vectors[0]),
                                    first_row);
        if (tiles > 0) fetch(0);
        float out[S::kRowTiles][kWidth / 8][4];
        float largest[S::kRowTiles][2], sum[S::kRowTiles][2];
#pragma unroll
        for (int m = 0; m < S::kRowTiles; ++m) {
            largest[m][0] = largest[m][1] = -INFINITY;
            sum[m][0] = sum[m][1] = 0.0f;
#pragma unroll
            for (int n = 0; n < kWidth / 8; ++n)
                out[m][n][0] = out[m][n][1] = out[m][n][2] = out[m][n][3] = 0.0f;
        }
#pragma unroll 1
        for (int tile = 0; tile < tiles; ++tile) {
            wait_copies();
            __syncthreads();  // this tile is there, and all warps have left the one before
            if (plan.stages == 2 && tile + 1 < tiles) fetch(tile + 1);
            const int first_key = tile * S::kColumns;
            if (masked) {
                load_mask<S::kRows, S::kColumns, false>(mask, params, batch, head, first_row, first_key);
                __syncthreads();
            }
            const unsigned char* stage = shared + S::kOwnBytes + tile % plan.stages * 2 * S::kTileBytes;
            float score[S::kRowTiles][kColumnTiles][4];
            scores<Operand, kWidth>(score, own, stage);
            // The largest score times the scale is the largest product only where the scale is positive.
            const bool cut = masked || !(scale > 0.0f) ||
                             is_cut(causal, first_row + warp_row, first_key, S::kColumns, keys);
            float shrink[2];
#pragma unroll
            for (int m = 0; m < S::kRowTiles; ++m) {
                if (cut) {
                    const int row = warp_row + m * 16;
                    apply_mask<false>(score[m], scale,
                                      masked ? mask + row * kMaskStride<S::kColumns> : nullptr, causal,
                                      first_row + row, first_key, keys);
                }
                softmax_step(score[m], cut ? 1.0f : scale, largest[m], sum[m], shrink);
#pragma unroll
                for (int n = 0; n < kWidth / 8; ++n) {
                    out[m][n][0] *= shrink[0], out[m][n][1] *= shrink[0];
                    out[m][n][2] *= shrink[1], out[m][n][3] *= shrink[1];
                }
            }
            accumulate<Operand, kWidth>(out, score, stage + S::kTileBytes);
            if (plan.stages == 1 && tile + 1 < tiles) {
                __syncthreads();
                fetch(tile + 1);
            }
        }
        wait_copies();
        __syncthreads();
#pragma unroll
        for (int m = 0; m < S::kRowTiles; ++m) {
            float factor[2];
            finish_softmax(factor, params, batch, head, first_row + warp_row + m * 16, largest[m], sum[m]);
            if (!params.mean) {
                put_rows<Operand, kWidth>(own + m * 16 * S::kStride, out[m], factor[0], factor[1]);
                continue;
            }
            const float share = 1.0f / static_cast<float>(heads);
#pragma unroll
            for (int n = 0; n < kWidth / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float* place = mean + ((m * (kWidth / 8) + n) * 4 + i) * kThreads;
                    out[m][n][i] *= factor[i / 2] * share;
                    if (head > 0) out[m][n][i] += *place;
                    *place = out[m][n][i];
                }
            }
            if (head + 1 == end_head)
                put_rows<Operand, kWidth>(own + m * 16 * S::kStride, out[m], 1.0f, 1.0f);
        }
    }
    __syncwarp();
    const auto out = head_of<Element>(params.out, params.out_strides, batch, params.mean ? 0 : first_head,
                                      params.queries, params.width, plan.vectors[3]);
    store_rows<S::kWarpRows, kWidth>(own, out, first_row + warp_row);
}

template <class Operand, int kWidth>
__global__ void __launch_bounds__(kMaxThreads<Operand>, 2)
    attention_forward_kernel(const __grid_constant__ AttentionParams params,
                             const __grid_constant__ Plan plan) {
    extern __shared__ uint4 shared[];
    if constexpr (MEDITOK_ARCHITECTURE >= Operand::kArchitecture) {
        forward<Operand, kWidth>(params, plan, reinterpret_cast<unsigned char*>(shared));
    }
}

// ---- launch ------------------------------------------------------------------------------------------------

template <class Operand, int kWidth>
bool launch(const AttentionParams& params, const Place& place) {
    using S = Shape<Operand, kWidth>;
    const bool masked = params.mask_kind == MaskKind::kBool || params.mask_kind == MaskKind::kAdditive;
    Plan plan{};
    for (plan.stages = 2; plan.stages > 0; --plan.stages) {
        plan.mask_start = S::kOwnBytes + plan.stages * 2 * S::kTileBytes;
        plan.mean_start = plan.mask_start + (masked ? S::kMaskBytes : 0);
        plan.bytes = plan.mean_start + (params.mean ? S::kMeanBytes : 0);
        if (plan.bytes <= place.shared_bytes) break;
    }
    if (plan.stages == 0 || !is_compiled(attention_forward_kernel<Operand, kWidth>, kThreads)) return false;
    const auto vectors = [&](const void* data, const AttentionStrides& strides) {
        return has_vectors(data, strides, params.width, params.type);
    };
    plan.vectors[0] = vectors(params.q, params.q_strides);
    plan.vectors[1] = vectors(params.k, params.k_strides);
    plan.vectors[2] = vectors(params.v, params.v_strides);
    plan.vectors[3] = vectors(params.out, params.out_strides);
    plan.row_blocks = static_cast<int>((params.queries + S::kRows - 1) / S::kRows);
    const int64_t blocks = plan.row_blocks * params.batch * (params.mean ? 1 : params.heads);
    const unsigned grid = grid_of(blocks);
    const cudaStream_t stream = static_cast<cudaStream_t>(place.stream);
    cuda_check(cudaFuncSetAttribute(attention_forward_kernel<Operand, kWidth>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, plan.bytes),
               "attention shared memory");
    attention_forward_kernel<Operand, kWidth><<<grid, kThreads, plan.bytes, stream>>>(params, plan);
    cuda_check(cudaGetLastError(), "attention");
    return true;
}

template <class Operand>
bool launch_width(const AttentionParams& params, const Place& place) {
    return params.width <= 64 ? launch<Operand, 64>(params, place) : launch<Operand, 128>(params, place);
}

}  // namespace

bool launch_attention_mma(const AttentionParams& params, const Place& place) {
    const DeviceGuard guard(place.device);
    switch (params.type) {
        case Dtype::kFloat16: return launch_width<HalfOperand>(params, place);
        case Dtype::kBfloat16: return launch_width<Bfloat16Operand>(params, place);
        default: return launch_width<Tf32Operand>(params, place);
    }
}

Place place_of(int device, void* stream) {
    const auto attribute = [device](cudaDeviceAttr name) {
        int value = 0;
        cuda_check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
        return value;
    };
    return {device, stream,
            attribute(cudaDevAttrComputeCapabilityMajor) * 10 + attribute(cudaDevAttrComputeCapabilityMinor),
            attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), attribute(cudaDevAttrMultiProcessorCount)};
}

}  // namespace meditok
