// Products in float32 on the ordinary units, for attention where tensor cores must not or cannot be used: strict float32,
// bfloat16 on sm_75, and what does not fit there. Tiles lie in shared memory as floats, whatever the type of the arrays.
//
// A block of four warps owns the rows of one side and goes through those of the other, as in attention_mma.cuh. Lane l of
// a warp has rows l / 8 + 4 i of the warp's, and columns l % 8 + 8 j of the scores or 4 (l % 8) + 32 j ... of the totals:
// the eight lanes of a row read the same four floats of it and neighbouring ones of the other side.
#pragma once

#include "attention/attention_tiles.cuh"

namespace meditok {

// kThreadRows: rows of a thread. Floats from row to row of the tiles: four more than a multiple of 32, so that rows of
// neighbouring lanes lie in different banks.
template <int kWidth_, int kThreadRows_>
struct SimtShape {
    static constexpr int kWidth = kWidth_, kThreadRows = kThreadRows_;
    static constexpr int kWarpRows = 4 * kThreadRows, kRows = kWarps * kWarpRows;
    static constexpr int kColumns = kWidth <= 64 ? 32 : 16, kThreadColumns = kColumns / 8;
    static constexpr int kChunks = kWidth / 32;  // of four columns of the totals
    static constexpr int kStride = kWidth + 4, kWeightStride = kColumns + 4;
    static constexpr int kOwnFloats = kRows * kStride, kTileFloats = kColumns * kStride;
    static constexpr int kWeightFloats = kRows * kWeightStride;
    using Scores = float[kThreadRows][kThreadColumns];
    using Totals = float[kThreadRows][kChunks * 4];
    static_assert(kStride % 32 == 4, "no bank conflicts");
};

// One array of the call as the kernels read it: any type, any strides.
struct SimtHead {
    const void* data;
    Dtype type;
    int64_t start, token, column;
    int rows, width;
};

__device__ inline SimtHead simt_head(const void* data, Dtype type, const AttentionStrides& strides,
                                     int64_t batch, int64_t head, int64_t rows, int64_t width) {
    return {data,
            type,
            batch * strides.batch + head * strides.head,
            strides.token,
            strides.column,
            static_cast<int>(rows),
            static_cast<int>(width)};
}

// Rows first ... of the array as floats; zeros where it ends.
template <class S, int kRows>
__device__ __forceinline__ void load_floats(float* tile, const SimtHead& head, int first) {
#pragma unroll 4
    for (int i = thread_id(); i < kRows * S::kWidth; i += kThreads) {
        const int row = i / S::kWidth, column = i % S::kWidth;
        const bool present = first + row < head.rows && column < head.width;
        const int64_t index = head.start + (first + row) * head.token + column * head.column;
        tile[row * S::kStride + column] = present ? element(head.data, head.type, index) : 0.0f;
    }
}

__device__ inline void store_float(void* data, Dtype type, int64_t index, float value) {
    switch (type) {
        case Dtype::kFloat32: static_cast<float*>(data)[index] = value; break;
        case Dtype::kFloat16: from_double(value, static_cast<half_bits*>(data)[index]); break;
        default: from_double(value, static_cast<bfloat16_bits*>(data)[index]);
    }
}

// A thread's totals, row i times factor[i], through the warp's rows of a tile to the array's rows first ....
template <class S>
__device__ __forceinline__ void store_totals(float* rows, const SimtHead& head, int first,
                                             const typename S::Totals& total,
                                             const float (&factor)[S::kThreadRows]) {
    const int lane = lane_id();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < S::kThreadRows; ++i) {
#pragma unroll
        for (int chunk = 0; chunk < S::kChunks; ++chunk) {
            const float* four = total[i] + chunk * 4;
            *reinterpret_cast<float4*>(rows + (lane / 8 + 4 * i) * S::kStride + chunk * 32 + lane % 8 * 4) =
                float4{four[0] * factor[i], four[1] * factor[i], four[2] * factor[i], four[3] * factor[i]};
        }
    }
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < S::kWarpRows * S::kWidth; i += 32) {
        const int row = i / S::kWidth, column = i % S::kWidth;
        if (first + row >= head.rows || column >= head.width) continue;
        store_float(const_cast<void*>(head.data), head.type,
                    head.start + (first + row) * head.token + column * head.column,
                    rows[row * S::kStride + column]);
    }
}

__device__ inline float4 four(const float* data) {
    return *reinterpret_cast<const float4*>(data);
}

// score[i][j] = row i of the thread's in `own` (the warp's first) times column j's row in `other`.
template <class S>
__device__ __forceinline__ void simt_scores(typename S::Scores& score, const float* own, const float* other) {
    const float* row = own + lane_id() / 8 * S::kStride;
    const float* column = other + lane_id() % 8 * S::kStride;
#pragma unroll
    for (int i = 0; i < S::kThreadRows; ++i) {
#pragma unroll
        for (int j = 0; j < S::kThreadColumns; ++j) score[i][j] = 0.0f;
    }
#pragma unroll 4
    for (int depth = 0; depth < S::kWidth; depth += 4) {
        float4 a[S::kThreadRows], b[S::kThreadColumns];
#pragma unroll
        for (int i = 0; i < S::kThreadRows; ++i) a[i] = four(row + i * 4 * S::kStride + depth);
#pragma unroll
        for (int j = 0; j < S::kThreadColumns; ++j) b[j] = four(column + j * 8 * S::kStride + depth);
#pragma unroll
        for (int i = 0; i < S::kThreadRows; ++i) {
#pragma unroll
            for (int j = 0; j < S::kThreadColumns; ++j) {
                score[i][j] = __fmaf_rn(a[i].x, b[j].x, score[i][j]);
                score[i][j] = __fmaf_rn(a[i].y, b[j].y, score[i][j]);
                score[i][j] = __fmaf_rn(a[i].z, b[j].z, score[i][j]);
                score[i][j] = __fmaf_rn(a[i].w, b[j].w, score[i][j]);
            }
        }
    }
}

// A thread's scores into the warp's rows of a tile of weights.
template <class S>
__device__ __forceinline__ void put_weights(float* weights, const typename S::Scores& score) {
    const int lane = lane_id();
#pragma unroll
    for (int i = 0; i < S::kThreadRows; ++i) {
#pragma unroll
        for (int j = 0; j < S::kThreadColumns; ++j) {
            weights[(lane / 8 + 4 * i) * S::kWeightStride + lane % 8 + 8 * j] = score[i][j];
        }
    }
}

// total[i] += row i of the weights times the rows of `other`.
template <class S>
__device__ __forceinline__ void simt_accumulate(typename S::Totals& total, const float* weights,
                                                const float* other) {
    const float* weight = weights + lane_id() / 8 * S::kWeightStride;
    const float* column = other + lane_id() % 8 * 4;
#pragma unroll 1
    for (int depth = 0; depth < S::kColumns; depth += 4) {
        float4 w[S::kThreadRows];
#pragma unroll
        for (int i = 0; i < S::kThreadRows; ++i) w[i] = four(weight + i * 4 * S::kWeightStride + depth);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
            for (int chunk = 0; chunk < S::kChunks; ++chunk) {
                const float4 b = four(column + (depth + k) * S::kStride + chunk * 32);
#pragma unroll
                for (int i = 0; i < S::kThreadRows; ++i) {
                    const float a = k == 0 ? w[i].x : k == 1 ? w[i].y : k == 2 ? w[i].z : w[i].w;
                    float* sum = total[i] + chunk * 4;
                    sum[0] = __fmaf_rn(a, b.x, sum[0]);
                    sum[1] = __fmaf_rn(a, b.y, sum[1]);
                    sum[2] = __fmaf_rn(a, b.z, sum[2]);
                    sum[3] = __fmaf_rn(a, b.w, sum[3]);
                }
            }
        }
    }
}

// Scores in units of log 2 with the mask's values, -inf for keys that are not attended.
template <class S, bool kKeys>
__device__ __forceinline__ void simt_mask(typename S::Scores& score, const AttentionParams& params,
                                          int64_t batch, int64_t head, float scale, int first_row,
                                          int first_column) {
    const bool causal = params.mask_kind == MaskKind::kCausal;
    const bool masked = params.mask_kind == MaskKind::kBool || params.mask_kind == MaskKind::kAdditive;
    const int64_t start = batch * params.mask_strides.batch + head * params.mask_strides.head;
    const int lane = lane_id();
#pragma unroll
    for (int i = 0; i < S::kThreadRows; ++i) {
#pragma unroll
        for (int j = 0; j < S::kThreadColumns; ++j) {
            const int row = first_row + lane / 8 + 4 * i, column = first_column + lane % 8 + 8 * j;
            const int64_t query = kKeys ? column : row, key = kKeys ? row : column;
            bool open = query < params.queries && key < params.keys && !(causal && key > query);
            float value = score[i][j] * scale;
            if (open && masked) {
                const float added = mask_value(
                    params, start + query * params.mask_strides.token + key * params.mask_strides.column);
                open = !(added == -INFINITY);
                value += added;
            }
            score[i][j] = open ? value : -INFINITY;
        }
    }
}

}  // namespace meditok
