// attention on tensor cores (mma.sync), the backward: two kernels of one shape, no atomics, so the same bits every run.
// Scores are computed again from the forward's lse; nothing of size queries x keys is written.
//
//   queries  a block owns 64 queries and goes through the keys: delta (attention.h) first, which it writes; then
//            s = q kᵀ, dp = g vᵀ, ds = p (dp - delta), grad_q += ds k
//   keys     a block owns 64 keys and goes through the queries with the roles of rows and columns changed:
//            sᵀ = k qᵀ, dpᵀ = v gᵀ, grad_k += dsᵀ q, grad_v += pᵀ g
//
// So the rows a block owns are always A of the products and what it goes through is always B (attention_mma.cuh); p and
// ds go from sums to operands in registers. delta = g . out; of the mean over heads, whose out is not kept per head, it
// is the sum of p dp in a first pass over the keys. Causal: tiles that no score of the block reaches are left out.
// Traffic: what a block owns once, the other side once per block of 64, mostly from the second-level cache.
// Why so: seven products instead of the five of a single kernel, but that one needs atomics, or gradients of all blocks
// side by side, to add up grad_q. 16 rows a warp leave room for both sums of 64 (width 128: 32, tf32 there: 16) columns
// and for grad_k and grad_v; two stages of the other side where they fit, else one.

#include "attention/attention_tiles.cuh"

namespace meditok {

namespace {

template <class Operand, int kWidth>
struct Shape {
    using Element = typename Operand::Element;
    static constexpr int kRows = kWarps * 16;
    static constexpr int kColumns = (kWidth <= 64 ? 64 : 32) / (kIsFloat<Operand> ? 2 : 1);
    static constexpr int kStride = kRowBytes<Element, kWidth>;
    static constexpr int kOwnBytes = kRows * kStride, kTileBytes = kColumns * kStride;
    static constexpr int kStatisticsBytes = kColumns * 8;  // of each stage: lse and delta of its queries
    static constexpr int kMaskBytes = kRows * kMaskStride<kColumns> * 4;
};

struct Plan {
    int row_blocks;
    int stages;
    int statistics_start, mask_start, bytes;
    float* delta;     // (batch, heads, queries)
    bool vectors[8];  // q, k, v, out, grad_out, grad_q, grad_k, grad_v
};

// Where the scores of a block lie, and its two arrays on each side: (q, g) and (k, v), or the other way round.
template <class Element>
struct Sides {
    Head<Element> own[2], other[2];
};

template <bool kKeys, class Element>
__device__ __forceinline__ Sides<Element> sides_of(const AttentionBackwardParams& params, const Plan& plan,
                                                   int64_t batch, int64_t head) {
    const AttentionParams& f = params.forward;
    const auto q = head_of<Element>(f.q, f.q_strides, batch, head, f.queries, f.width, plan.vectors[0]);
    const auto k = head_of<Element>(f.k, f.k_strides, batch, head, f.keys, f.width, plan.vectors[1]);
    const auto v = head_of<Element>(f.v, f.v_strides, batch, head, f.keys, f.width, plan.vectors[2]);
    const auto g = head_of<Element>(params.grad_out, params.grad_out_strides, batch, f.mean ? 0 : head,
                                    f.queries, f.width, plan.vectors[4]);
    if constexpr (kKeys) return {{k, v}, {q, g}};
    return {{q, g}, {k, v}};
}

// delta of a warp's 16 rows as g . out, two neighbouring rows of a lane's own; g is in shared memory.
template <class Operand, int kWidth>
__device__ __forceinline__ void delta_of_rows(float (&delta)[2], const unsigned char* g,
                                              const Head<typename Operand::Element>& out, int first_row) {
    using Element = typename Operand::Element;
    const int lane = lane_id();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int local = lane / 4 + i * 8;
        float sum = 0.0f;
        if (first_row + local < out.rows) {
            const Element* row = out.start + (first_row + local) * out.token;
            const Element* other = reinterpret_cast<const Element*>(g + local * kRowBytes<Element, kWidth>);
#pragma unroll 4
            for (int column = lane % 4; column < out.width; column += 4) {
                sum = __fmaf_rn(to_float(row[column * out.column]), to_float(other[column]), sum);
            }
        }
        delta[i] = warp_sum<4>(sum);
    }
}

template <class Operand, int kWidth, bool kKeys>
__device__ __forceinline__ void backward(const AttentionBackwardParams& params, const Plan& plan,
                                         unsigned char* shared) {
    using S = Shape<Operand, kWidth>;
    using Element = typename Operand::Element;
    constexpr int kColumnTiles = S::kColumns / 8;
    const AttentionParams& f = params.forward;
    const bool causal = f.mask_kind == MaskKind::kCausal;
    const bool masked = f.mask_kind == MaskKind::kBool || f.mask_kind == MaskKind::kAdditive;
    // The last blocks of queries and the first of keys have the longest way under a causal mask.
    const int turn = static_cast<int>(blockIdx.x) % plan.row_blocks;
    const int row_block = kKeys ? turn : plan.row_blocks - 1 - turn;
    const int pair = static_cast<int>(blockIdx.x) / plan.row_blocks;
    const int heads = static_cast<int>(f.heads), head = pair % heads, batch = pair / heads;
    const int keys = static_cast<int>(f.keys), queries = static_cast<int>(f.queries);
    const int first_row = row_block * S::kRows, warp_row = thread_id() / 32 * 16;
    const int columns =
        kKeys ? queries : (causal && first_row + S::kRows < keys ? first_row + S::kRows : keys);
    const int first_tile = kKeys && causal ? first_row / S::kColumns : 0;
    const int tiles = (columns + S::kColumns - 1) / S::kColumns;
    const float scale = static_cast<float>(f.scale) * kLog2E;
    const float share = f.mean ? 1.0f / static_cast<float>(heads) : 1.0f;  // of grad_out
    const float* lse = f.lse + static_cast<int64_t>(pair) * queries;
    float* deltas = plan.delta + static_cast<int64_t>(pair) * queries;

    const Sides<Element> sides = sides_of<kKeys, Element>(params, plan, batch, head);
    unsigned char* own = shared + warp_row * S::kStride;
    unsigned char* own_second = own + S::kOwnBytes;
    float* mask = reinterpret_cast<float*>(shared + plan.mask_start);
    auto stage_of = [&](int tile) {
        return shared + 2 * S::kOwnBytes + tile % plan.stages * 2 * S::kTileBytes;
    };
    auto statistics_of = [&](int tile) {
        return reinterpret_cast<float*>(shared + plan.statistics_start +
                                        tile % plan.stages * S::kStatisticsBytes);
    };
    auto fetch = [&](int tile) {
        load_tile<S::kColumns, kWidth>(stage_of(tile), sides.other[0], tile * S::kColumns);
        load_tile<S::kColumns, kWidth>(stage_of(tile) + S::kTileBytes, sides.other[1], tile * S::kColumns);
        const int column = tile * S::kColumns + thread_id();
        if (kKeys && thread_id() < S::kColumns) {  // rows beyond the queries have p = 0
            const bool present = column < queries;
            statistics_of(tile)[thread_id()] = present ? lse[column] * kLog2E : INFINITY;
            statistics_of(tile)[S::kColumns + thread_id()] = present ? deltas[column] : 0.0f;
        }
    };
    load_tile<S::kRows, kWidth>(shared, sides.own[0], first_row);
    load_tile<S::kRows, kWidth>(shared + S::kOwnBytes, sides.own[1], first_row);

    float row_lse[2], row_delta[2] = {0.0f, 0.0f};
    if constexpr (!kKeys) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = first_row + warp_row + i * 8 + lane_id() / 4;
            row_lse[i] = row < queries ? lse[row] * kLog2E : INFINITY;
        }
        if (!f.mean) {
            wait_copies();
            __syncthreads();
            const auto out =
                head_of<Element>(f.out, f.out_strides, batch, head, f.queries, f.width, plan.vectors[3]);
            delta_of_rows<Operand, kWidth>(row_delta, own_second, out, first_row + warp_row);
        }
    }

    float first_sum[1][kWidth / 8][4],
        second_sum[1][kKeys ? kWidth / 8 : 1][4];  // grad_q, or grad_k and grad_v
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            first_sum[0][n][i] = 0.0f;
            if constexpr (kKeys) second_sum[0][n][i] = 0.0f;
        }
    }
    // Of the mean, a first pass finds delta.
#pragma unroll 1
    for (int pass = !kKeys && f.mean ? 0 : 1; pass < 2; ++pass) {
        if (first_tile < tiles) fetch(first_tile);
#pragma unroll 1
        for (int tile = first_tile; tile < tiles; ++tile) {
            wait_copies();
            __syncthreads();  // this tile is there, and all warps have left the one before
            if (plan.stages == 2 && tile + 1 < tiles) fetch(tile + 1);
            const int first_column = tile * S::kColumns;
            if (masked) {
                load_mask<S::kRows, S::kColumns, kKeys>(mask, f, batch, head, first_row, first_column);
                __syncthreads();
            }
            const unsigned char* stage = stage_of(tile);
            float score[1][kColumnTiles][4], change[1][kColumnTiles][4];
            scores<Operand, kWidth>(score, own, stage);
            scores<Operand, kWidth>(change, own_second, stage + S::kTileBytes);
            const int row = first_row + warp_row;
            const bool cut = masked || (kKeys ? is_cut(causal, first_column, row, 16, keys)
                                              : is_cut(causal, row, first_column, S::kColumns, keys));
            if (cut) {
                apply_mask<kKeys>(score[0], scale,
                                  masked ? mask + warp_row * kMaskStride<S::kColumns> : nullptr, causal, row,
                                  first_column, keys);
            }
            const float factor = cut ? 1.0f : scale;
            const float* statistics = statistics_of(tile);
#pragma unroll
            for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int column = n * 8 + lane_id() % 4 * 2 + i % 2;
                    const float base = kKeys ? statistics[column] : row_lse[i / 2];
                    const float delta = kKeys ? statistics[S::kColumns + column] : row_delta[i / 2];
                    const float p = rough_exp2(__fmaf_rn(score[0][n][i], factor, -base));
                    score[0][n][i] = p;
                    if (!kKeys && pass == 0)
                        row_delta[i / 2] = __fmaf_rn(p, change[0][n][i] * share, row_delta[i / 2]);
                    change[0][n][i] = p * __fmaf_rn(change[0][n][i], share, -delta);
                }
            }
            if (pass == 1) {
                accumulate<Operand, kWidth>(first_sum, change, stage);
                if constexpr (kKeys) accumulate<Operand, kWidth>(second_sum, score, stage + S::kTileBytes);
            }
            if (plan.stages == 1 && tile + 1 < tiles) {
                __syncthreads();
                fetch(tile + 1);
            }
        }
        wait_copies();
        __syncthreads();
        if (pass == 0) {
            row_delta[0] = warp_sum<4>(row_delta[0]);
            row_delta[1] = warp_sum<4>(row_delta[1]);
        }
    }
    if constexpr (!kKeys) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = first_row + warp_row + i * 8 + lane_id() / 4;
            if (lane_id() % 4 == 0 && row < queries) deltas[row] = row_delta[i];
        }
    }
    const float final_scale = static_cast<float>(f.scale);
    put_rows<Operand, kWidth>(own, first_sum[0], final_scale, final_scale);
    if constexpr (kKeys) put_rows<Operand, kWidth>(own_second, second_sum[0], share, share);
    __syncwarp();
    if constexpr (kKeys) {
        const auto grad_k = head_of<Element>(params.grad_k, params.grad_k_strides, batch, head, f.keys,
                                             f.width, plan.vectors[6]);
        const auto grad_v = head_of<Element>(params.grad_v, params.grad_v_strides, batch, head, f.keys,
                                             f.width, plan.vectors[7]);
        store_rows<16, kWidth>(own, grad_k, first_row + warp_row);
        store_rows<16, kWidth>(own_second, grad_v, first_row + warp_row);
    } else {
        const auto grad_q = head_of<Element>(params.grad_q, params.grad_q_strides, batch, head, f.queries,
                                             f.width, plan.vectors[5]);
        store_rows<16, kWidth>(own, grad_q, first_row + warp_row);
    }
}

template <class Operand, int kWidth, bool kKeys>
__global__ void __launch_bounds__(kMaxThreads<Operand>, 2)
    attention_backward_kernel(const __grid_constant__ AttentionBackwardParams params,
                              const __grid_constant__ Plan plan) {
    extern __shared__ uint4 shared[];
    if constexpr (MEDITOK_ARCHITECTURE >= Operand::kArchitecture) {
        backward<Operand, kWidth, kKeys>(params, plan, reinterpret_cast<unsigned char*>(shared));
    }
}

// ---- launch ------------------------------------------------------------------------------------------------

template <class Operand, int kWidth, bool kKeys>
void launch_side(const AttentionBackwardParams& params, Plan plan, cudaStream_t stream) {
    const AttentionParams& f = params.forward;
    constexpr int kRows = Shape<Operand, kWidth>::kRows;
    plan.row_blocks = static_cast<int>(((kKeys ? f.keys : f.queries) + kRows - 1) / kRows);
    const unsigned grid = grid_of(plan.row_blocks * f.batch * f.heads);
    if (grid == 0) return;
    cuda_check(cudaFuncSetAttribute(attention_backward_kernel<Operand, kWidth, kKeys>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, plan.bytes),
               "attention_backward shared memory");
    attention_backward_kernel<Operand, kWidth, kKeys><<<grid, kThreads, plan.bytes, stream>>>(params, plan);
    cuda_check(cudaGetLastError(), "attention_backward");
}

template <class Operand, int kWidth>
bool launch(const AttentionBackwardParams& params, const Place& place) {
    using S = Shape<Operand, kWidth>;
    const AttentionParams& f = params.forward;
    const bool masked = f.mask_kind == MaskKind::kBool || f.mask_kind == MaskKind::kAdditive;
    Plan plan{};
    for (plan.stages = 2; plan.stages > 0; --plan.stages) {
        plan.statistics_start = 2 * S::kOwnBytes + plan.stages * 2 * S::kTileBytes;
        plan.mask_start = plan.statistics_start + plan.stages * S::kStatisticsBytes;
        plan.bytes = plan.mask_start + (masked ? S::kMaskBytes : 0);
        if (plan.bytes <= place.shared_bytes) break;
    }
    if (plan.stages == 0 || !is_compiled(attention_backward_kernel<Operand, kWidth, true>, kThreads))
        return false;
    plan.delta = reinterpret_cast<float*>(params.scratch);
    const auto vectors = [&](const void* data, const AttentionStrides& strides) {
        return has_vectors(data, strides, f.width, f.type);
    };
    plan.vectors[0] = vectors(f.q, f.q_strides);
    plan.vectors[1] = vectors(f.k, f.k_strides);
    plan.vectors[2] = vectors(f.v, f.v_strides);
    plan.vectors[4] = vectors(params.grad_out, params.grad_out_strides);
    plan.vectors[5] = vectors(params.grad_q, params.grad_q_strides);
    plan.vectors[6] = vectors(params.grad_k, params.grad_k_strides);
    plan.vectors[7] = vectors(params.grad_v, params.grad_v_strides);
    const cudaStream_t stream = static_cast<cudaStream_t>(place.stream);
    launch_side<Operand, kWidth, false>(params, plan, stream);
    launch_side<Operand, kWidth, true>(params, plan, stream);
    return true;
}

template <class Operand>
bool launch_width(const AttentionBackwardParams& params, const Place& place) {
    return params.forward.width <= 64 ? launch<Operand, 64>(params, place)
                                      : launch<Operand, 128>(params, place);
}

}  // namespace

bool launch_attention_backward_mma(const AttentionBackwardParams& params, const Place& place) {
    const DeviceGuard guard(place.device);
    switch (params.forward.type) {
        case Dtype::kFloat16: return launch_width<HalfOperand>(params, place);
        case Dtype::kBfloat16: return launch_width<Bfloat16Operand>(params, place);
        default: return launch_width<Tf32Operand>(params, place);
    }
}

}  // namespace meditok
