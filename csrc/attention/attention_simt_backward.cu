// attention in float32 on the ordinary units, the backward: the two kernels of attention_backward.cu with the products
// of attention_simt.cuh. A block owns 32 queries (or keys) and goes through the other side by 32 (width 128: 16); p and
// ds pass through shared memory. delta is the sum of p dp in a first pass over the keys, of the mean or not.
// Traffic: what a block owns once, the other side once per block (queries: twice), mostly from the second-level cache.
// Why so: 44 or 56 KiB of shared memory fit every device; this path serves exactness, not speed.

#include "attention/attention_simt.cuh"

namespace meditok {

namespace {

template <int kWidth>
using Shape = SimtShape<kWidth, 2>;

template <int kWidth, bool kKeys>
__global__ void __launch_bounds__(kThreads, 2)
    attention_simt_backward_kernel(const __grid_constant__ AttentionBackwardParams params, int row_blocks) {
    using S = Shape<kWidth>;
    extern __shared__ uint4 shared[];
    float* own = reinterpret_cast<float*>(shared);  // q and g, or k and v
    float* other = own + 2 * S::kOwnFloats;         // k and v, or q and g
    float* weights = other + 2 * S::kTileFloats;    // p and ds
    const AttentionParams& f = params.forward;
    const bool causal = f.mask_kind == MaskKind::kCausal;
    const int turn = static_cast<int>(blockIdx.x) % row_blocks;
    const int row_block = kKeys ? turn : row_blocks - 1 - turn;
    const int pair = static_cast<int>(blockIdx.x) / row_blocks;
    const int heads = static_cast<int>(f.heads), head = pair % heads, batch = pair / heads;
    const int queries = static_cast<int>(f.queries), keys = static_cast<int>(f.keys);
    const int first_row = row_block * S::kRows, warp_row = thread_id() / 32 * S::kWarpRows;
    const int columns =
        kKeys ? queries : (causal && first_row + S::kRows < keys ? first_row + S::kRows : keys);
    const int first_tile = kKeys && causal ? first_row / S::kColumns : 0;
    const float scale = static_cast<float>(f.scale) * kLog2E;
    const float share = f.mean ? 1.0f / static_cast<float>(heads) : 1.0f;  // of grad_out
    const float* lse = f.lse + static_cast<int64_t>(pair) * queries;
    float* deltas = reinterpret_cast<float*>(params.scratch) + static_cast<int64_t>(pair) * queries;

    const SimtHead q = simt_head(f.q, f.type, f.q_strides, batch, head, f.queries, f.width);
    const SimtHead k = simt_head(f.k, f.type, f.k_strides, batch, head, f.keys, f.width);
    const SimtHead v = simt_head(f.v, f.type, f.v_strides, batch, head, f.keys, f.width);
    const SimtHead g = simt_head(params.grad_out, f.type, params.grad_out_strides, batch, f.mean ? 0 : head,
                                 f.queries, f.width);
    load_floats<S, S::kRows>(own, kKeys ? k : q, first_row);
    load_floats<S, S::kRows>(own + S::kOwnFloats, kKeys ? v : g, first_row);

    auto row_of = [&](int i) { return first_row + warp_row + lane_id() / 8 + 4 * i; };
    float row_lse[S::kThreadRows], row_delta[S::kThreadRows];
    typename S::Totals first_sum, second_sum;  // grad_q, or grad_k and grad_v
#pragma unroll
    for (int i = 0; i < S::kThreadRows; ++i) {
        row_lse[i] = !kKeys && row_of(i) < queries ? lse[row_of(i)] * kLog2E : INFINITY;
        row_delta[i] = 0.0f;
#pragma unroll
        for (int j = 0; j < S::kChunks * 4; ++j) first_sum[i][j] = second_sum[i][j] = 0.0f;
    }
    float* p_weights = weights + warp_row * S::kWeightStride;
    float* ds_weights = p_weights + S::kWeightFloats;
#pragma unroll 1
    for (int pass = kKeys ? 1 : 0; pass < 2; ++pass) {
#pragma unroll 1
        for (int column = first_tile * S::kColumns; column < columns; column += S::kColumns) {
            __syncthreads();
            load_floats<S, S::kColumns>(other, kKeys ? q : k, column);
            load_floats<S, S::kColumns>(other + S::kTileFloats, kKeys ? g : v, column);
            __syncthreads();
            typename S::Scores score, change;
            simt_scores<S>(score, own + warp_row * S::kStride, other);
            simt_scores<S>(change, own + S::kOwnFloats + warp_row * S::kStride, other + S::kTileFloats);
            simt_mask<S, kKeys>(score, f, batch, head, scale, first_row + warp_row, column);
#pragma unroll
            for (int j = 0; j < S::kThreadColumns; ++j) {
                const int query = column + lane_id() % 8 + 8 * j;
                const bool present = kKeys && query < queries;
                const float column_lse = present ? lse[query] * kLog2E : INFINITY;
                const float column_delta = present ? deltas[query] : 0.0f;
#pragma unroll
                for (int i = 0; i < S::kThreadRows; ++i) {
                    const float p = exp2f(score[i][j] - (kKeys ? column_lse : row_lse[i]));
                    const float dp = change[i][j] * share;
                    if (pass == 0) row_delta[i] = __fmaf_rn(p, dp, row_delta[i]);
                    score[i][j] = p;
                    change[i][j] = p * (dp - (kKeys ? column_delta : row_delta[i]));
                }
            }
            if (pass == 0) continue;
            put_weights<S>(ds_weights, change);
            if (kKeys) put_weights<S>(p_weights, score);
            __syncwarp();
            simt_accumulate<S>(first_sum, ds_weights, other);
            if (kKeys) simt_accumulate<S>(second_sum, p_weights, other + S::kTileFloats);
            __syncwarp();
        }
#pragma unroll
        for (int i = 0; i < S::kThreadRows; ++i) {
            if (pass > 0) continue;
            row_delta[i] = warp_sum<8>(row_delta[i]);
            if (lane_id() % 8 == 0 && row_of(i) < queries) deltas[row_of(i)] = row_delta[i];
        }
    }
    float factor[S::kThreadRows], second_factor[S::kThreadRows];
#pragma unroll
    for (int i = 0; i < S::kThreadRows; ++i) {
        factor[i] = static_cast<float>(f.scale);
        second_factor[i] = share;
    }
    __syncthreads();  // the tiles of a block without columns are loaded by now
    float* rows = own + warp_row * S::kStride;
    const int first = first_row + warp_row;
    if constexpr (kKeys) {
        const SimtHead grad_k =
            simt_head(params.grad_k, f.type, params.grad_k_strides, batch, head, f.keys, f.width);
        const SimtHead grad_v =
            simt_head(params.grad_v, f.type, params.grad_v_strides, batch, head, f.keys, f.width);
        store_totals<S>(rows, grad_k, first, first_sum, factor);
        store_totals<S>(rows, grad_v, first, second_sum, second_factor);
    } else {
        const SimtHead grad_q =
            simt_head(params.grad_q, f.type, params.grad_q_strides, batch, head, f.queries, f.width);
        store_totals<S>(rows, grad_q, first, first_sum, factor);
    }
}

template <int kWidth, bool kKeys>
void launch_side(const AttentionBackwardParams& params, cudaStream_t stream) {
    using S = Shape<kWidth>;
    const AttentionParams& f = params.forward;
    const int row_blocks = static_cast<int>(((kKeys ? f.keys : f.queries) + S::kRows - 1) / S::kRows);
    const unsigned grid = grid_of(row_blocks * f.batch * f.heads);
    if (grid == 0) return;
    const int bytes = 2 * (S::kOwnFloats + S::kTileFloats + S::kWeightFloats) * 4;
    cuda_check(cudaFuncSetAttribute(attention_simt_backward_kernel<kWidth, kKeys>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
               "attention_backward (float32) shared memory");
    attention_simt_backward_kernel<kWidth, kKeys><<<grid, kThreads, bytes, stream>>>(params, row_blocks);
    cuda_check(cudaGetLastError(), "attention_backward (float32)");
}

}  // namespace

void launch_attention_backward_simt(const AttentionBackwardParams& params, const Place& place) {
    const DeviceGuard guard(place.device);
    const cudaStream_t stream = static_cast<cudaStream_t>(place.stream);
    if (params.forward.width <= 64) {
        launch_side<64, false>(params, stream);
        launch_side<64, true>(params, stream);
    } else {
        launch_side<128, false>(params, stream);
        launch_side<128, true>(params, stream);
    }
}

}  // namespace meditok
