// attention in float32 on the ordinary units, the forward: the steps of attention_forward.cu with the products of
// attention_simt.cuh. A block has 64 queries of one head and goes through keys by 32 (width 128: 32 by 16); p passes
// through shared memory. Mean over heads: a block goes through the heads of its queries and adds them up there, too.
// Traffic: q and out once; k and v once per block of queries, mostly from the second-level cache.
// Why so: four rows and four columns of scores a thread are 64 multiply-adds for eight loads of four floats, and 60 KiB
// of shared memory at most fit every device.

#include "attention/attention_simt.cuh"

namespace meditok {

namespace {

template <int kWidth>
using Shape = SimtShape<kWidth, kWidth <= 64 ? 4 : 2>;

template <int kWidth>
__global__ void __launch_bounds__(kThreads, 2)
    attention_simt_forward_kernel(const __grid_constant__ AttentionParams params, int row_blocks) {
    using S = Shape<kWidth>;
    extern __shared__ uint4 shared[];
    float* q = reinterpret_cast<float*>(shared);
    float* k = q + S::kOwnFloats;
    float* v = k + S::kTileFloats;
    float* weights = v + S::kTileFloats;
    const bool causal = params.mask_kind == MaskKind::kCausal;
    const int row_block = row_blocks - 1 - static_cast<int>(blockIdx.x) % row_blocks;
    const int other = static_cast<int>(blockIdx.x) / row_blocks;
    const int heads = static_cast<int>(params.heads), keys = static_cast<int>(params.keys);
    const int batch = params.mean ? other : other / heads;
    const int first_head = params.mean ? 0 : other % heads, end_head = params.mean ? heads : first_head + 1;
    const int first_row = row_block * S::kRows, warp_row = thread_id() / 32 * S::kWarpRows;
    const int last_key = causal && first_row + S::kRows < keys ? first_row + S::kRows : keys;
    const float scale = static_cast<float>(params.scale) * kLog2E;
    float* own_weights = weights + warp_row * S::kWeightStride;

    typename S::Totals out;
    float factor[S::kThreadRows];
#pragma unroll
    for (int i = 0; i < S::kThreadRows; ++i) factor[i] = 1.0f;
#pragma unroll 1
    for (int head = first_head; head < end_head; ++head) {
        const SimtHead k_head =
            simt_head(params.k, params.type, params.k_strides, batch, head, params.keys, params.width);
        const SimtHead v_head =
            simt_head(params.v, params.type, params.v_strides, batch, head, params.keys, params.width);
        __syncthreads();
        load_floats<S, S::kRows>(
            q, simt_head(params.q, params.type, params.q_strides, batch, head, params.queries, params.width),
            first_row);
        float largest[S::kThreadRows], sum[S::kThreadRows];
#pragma unroll
        for (int i = 0; i < S::kThreadRows; ++i) {
            largest[i] = -INFINITY;
            sum[i] = 0.0f;
#pragma unroll
            for (int j = 0; j < S::kChunks * 4; ++j) out[i][j] = 0.0f;
        }
#pragma unroll 1
        for (int first_key = 0; first_key < last_key; first_key += S::kColumns) {
            __syncthreads();
            load_floats<S, S::kColumns>(k, k_head, first_key);
            load_floats<S, S::kColumns>(v, v_head, first_key);
            __syncthreads();
            typename S::Scores score;
            simt_scores<S>(score, q + warp_row * S::kStride, k);
            simt_mask<S, false>(score, params, batch, head, scale, first_row + warp_row, first_key);
#pragma unroll
            for (int i = 0; i < S::kThreadRows; ++i) {
                float highest = -INFINITY;
#pragma unroll
                for (int j = 0; j < S::kThreadColumns; ++j) highest = fmaxf(highest, score[i][j]);
                highest = fmaxf(largest[i], warp_max<8>(highest));
                const float base =
                    highest == -INFINITY ? 0.0f : highest;  // nothing attended yet: all p are 0
                const float shrink = exp2f(largest[i] - base);
                largest[i] = highest;
                float added = 0.0f;
#pragma unroll
                for (int j = 0; j < S::kThreadColumns; ++j) {
                    score[i][j] = exp2f(score[i][j] - base);
                    added += score[i][j];
                }
                sum[i] = __fmaf_rn(sum[i], shrink, added);
#pragma unroll
                for (int j = 0; j < S::kChunks * 4; ++j) out[i][j] *= shrink;
            }
            put_weights<S>(own_weights, score);
            __syncwarp();
            simt_accumulate<S>(out, own_weights, v);
            __syncwarp();
        }
#pragma unroll
        for (int i = 0; i < S::kThreadRows; ++i) {
            const float total = warp_sum<8>(sum[i]);
            const int row = first_row + warp_row + lane_id() / 8 + 4 * i;
            factor[i] = total == 0.0f ? 0.0f : 1.0f / total;
            if (params.lse != nullptr && lane_id() % 8 == 0 && row < params.queries) {
                params.lse[(static_cast<int64_t>(batch) * heads + head) * params.queries + row] =
                    total == 0.0f ? INFINITY : (largest[i] + log2f(total)) * kLn2;
            }
            if (!params.mean) continue;
            const float share = factor[i] / static_cast<float>(heads);
            factor[i] = 1.0f;
#pragma unroll
            for (int j = 0; j < S::kChunks * 4; ++j) {
                float* place = weights + S::kWeightFloats + (i * S::kChunks * 4 + j) * kThreads + thread_id();
                out[i][j] *= share;
                if (head > 0) out[i][j] += *place;
                *place = out[i][j];
            }
        }
    }
    __syncthreads();  // the queries of a block without keys are loaded by now
    const SimtHead out_head = simt_head(params.out, params.type, params.out_strides, batch,
                                        params.mean ? 0 : first_head, params.queries, params.width);
    store_totals<S>(q + warp_row * S::kStride, out_head, first_row + warp_row, out, factor);
}

template <int kWidth>
void launch(const AttentionParams& params, cudaStream_t stream) {
    using S = Shape<kWidth>;
    const int row_blocks = static_cast<int>((params.queries + S::kRows - 1) / S::kRows);
    const int mean_floats = params.mean ? S::kRows * kWidth : 0;
    const int bytes = (S::kOwnFloats + 2 * S::kTileFloats + S::kWeightFloats + mean_floats) * 4;
    const unsigned grid = grid_of(row_blocks * params.batch * (params.mean ? 1 : params.heads));
    cuda_check(cudaFuncSetAttribute(attention_simt_forward_kernel<kWidth>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
               "attention (float32) shared memory");
    attention_simt_forward_kernel<kWidth><<<grid, kThreads, bytes, stream>>>(params, row_blocks);
    cuda_check(cudaGetLastError(), "attention (float32)");
}

}  // namespace

void launch_attention_simt(const AttentionParams& params, const Place& place) {
    const DeviceGuard guard(place.device);
    const cudaStream_t stream = static_cast<cudaStream_t>(place.stream);
    if (params.width <= 64) {
        launch<64>(params, stream);
    } else {
        launch<128>(params, stream);
    }
}

}  // namespace meditok
