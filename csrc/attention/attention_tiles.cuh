// What the attention kernels share beside the products: tiles of rows between global and shared memory, masks, softmax.
#pragma once

#include "attention/attention_cuda.h"
#include "attention/attention_mma.cuh"

namespace meditok {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

// Threads that a kernel for an operand may have: too few to be launched where it was not compiled, such as a kernel for
// sm_80 in a build for sm_75 that runs on a newer device, so that is_compiled() tells and nothing empty runs.
template <class Operand>
constexpr int kMaxThreads = MEDITOK_ARCHITECTURE >= Operand::kArchitecture ? kThreads : 32;

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

__device__ inline float to_float(float value) {
    return value;
}
__device__ inline float to_float(half_bits value) {
    return half_to_float(value.bits);
}
__device__ inline float to_float(bfloat16_bits value) {
    return float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}

// An element of any type but float64.
__device__ inline float element(const void* data, Dtype type, int64_t index) {
    switch (type) {
        case Dtype::kFloat32: return static_cast<const float*>(data)[index];
        case Dtype::kFloat16: return to_float(static_cast<const half_bits*>(data)[index]);
        default: return to_float(static_cast<const bfloat16_bits*>(data)[index]);
    }
}

template <class Kernel>
bool is_compiled(Kernel kernel, int threads) {
    cudaFuncAttributes attributes;
    cuda_check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
    return attributes.maxThreadsPerBlock >= threads;
}

// One head of an array: where its row 0 starts, its strides in elements, and whether rows are 16-byte vectors.
template <class Element>
struct Head {
    Element* start;
    int64_t token, column;
    int rows, width;
    bool vectors;
};

template <class Element>
__device__ inline Head<Element> head_of(const void* data, const AttentionStrides& strides, int64_t batch,
                                        int64_t head, int64_t rows, int64_t width, bool vectors) {
    Element* start =
        static_cast<Element*>(const_cast<void*>(data)) + batch * strides.batch + head * strides.head;
    return {start, strides.token, strides.column, static_cast<int>(rows), static_cast<int>(width), vectors};
}

// Rows first ... first + kRows of the array into a tile of kWidth columns; zeros where the array ends. Vectors arrive
// with wait_copies().
template <int kRows, int kWidth, class Element>
__device__ __forceinline__ void load_tile(unsigned char* tile, const Head<Element>& head, int first) {
    constexpr int kSize = static_cast<int>(sizeof(Element)), kStride = kRowBytes<Element, kWidth>;
    if (head.vectors) {
        constexpr int kVectors = kWidth * kSize / 16;
        static_assert(kRows * kVectors % kThreads == 0, "every thread copies as much");
        constexpr int kParts = kRows * kVectors / kThreads;
        constexpr int kUnroll =
            MEDITOK_ARCHITECTURE >= 80 ? kParts : 1;  // copies pass through registers there
#pragma unroll kUnroll
        for (int part = 0; part < kParts; ++part) {
            const int i = part * kThreads + thread_id(), row = i / kVectors, vector = i % kVectors;
            const bool present = first + row < head.rows && vector * 16 < head.width * kSize;
            const Element* source = head.start + (first + row) * head.token + vector * (16 / kSize);
            copy_async(tile + row * kStride + vector * 16, present ? source : head.start, present);
        }
        return;
    }
#pragma unroll 1
    for (int i = thread_id(); i < kRows * kWidth; i += kThreads) {
        const int row = i / kWidth, column = i % kWidth;
        Element value{};
        if (first + row < head.rows && column < head.width) {
            value = head.start[(first + row) * head.token + column * head.column];
        }
        *reinterpret_cast<Element*>(tile + row * kStride + column * kSize) = value;
    }
}

// A warp's rows of a tile to the array; they are its rows first ....
template <int kRows, int kWidth, class Element>
__device__ __forceinline__ void store_rows(const unsigned char* rows, const Head<Element>& head, int first) {
    constexpr int kSize = static_cast<int>(sizeof(Element)), kStride = kRowBytes<Element, kWidth>;
    if (head.vectors) {
        constexpr int kVectors = kWidth * kSize / 16;
#pragma unroll 2
        for (int i = lane_id(); i < kRows * kVectors; i += 32) {
            const int row = i / kVectors, vector = i % kVectors;
            if (first + row >= head.rows || vector * 16 >= head.width * kSize) continue;
            Element* target = head.start + (first + row) * head.token + vector * (16 / kSize);
            *reinterpret_cast<uint4*>(target) =
                *reinterpret_cast<const uint4*>(rows + row * kStride + vector * 16);
        }
        return;
    }
#pragma unroll 1
    for (int i = lane_id(); i < kRows * kWidth; i += 32) {
        const int row = i / kWidth, column = i % kWidth;
        if (first + row >= head.rows || column >= head.width) continue;
        head.start[(first + row) * head.token + column * head.column] =
            *reinterpret_cast<const Element*>(rows + row * kStride + column * kSize);
    }
}

// ---- masks -------------------------------------------------------------------------------------------------

// What the mask adds to a score, in units of log 2: 0 or -inf for bool, the value for additive.
__device__ inline float mask_value(const AttentionParams& params, int64_t offset) {
    if (params.mask_kind == MaskKind::kBool) {
        return static_cast<const unsigned char*>(params.mask)[offset] != 0 ? 0.0f : -INFINITY;
    }
    return kLog2E * element(params.mask, params.type, offset);
}

// Floats from row to row of a tile of mask values: pairs of eight rows lie in different banks.
template <int kColumns>
constexpr int kMaskStride = kColumns + 8;

// Mask values of a tile of scores, whose rows are queries, or keys with kKeys.
template <int kRows, int kColumns, bool kKeys>
__device__ __forceinline__ void load_mask(float* tile, const AttentionParams& params, int64_t batch,
                                          int64_t head, int first_row, int first_column) {
    const AttentionStrides& strides = params.mask_strides;
    const int64_t start = batch * strides.batch + head * strides.head;
#pragma unroll 1
    for (int i = thread_id(); i < kRows * kColumns; i += kThreads) {
        const int row = i / kColumns, column = i % kColumns;
        const int64_t query = kKeys ? first_column + column : first_row + row;
        const int64_t key = kKeys ? first_row + row : first_column + column;
        const bool inside = query < params.queries && key < params.keys;
        tile[row * kMaskStride<kColumns> + column] =
            inside ? mask_value(params, start + query * strides.token + key * strides.column) : -INFINITY;
    }
}

// Which scores of a tile are looked at one by one: those beyond the keys, and those on the diagonal of a causal mask.
__device__ inline bool is_cut(bool causal, int first_query, int first_key, int key_count, int keys) {
    return first_key + key_count > keys || (causal && first_key + key_count - 1 > first_query);
}

// Scores of a warp's rows in units of log 2 with the mask's values added, -inf for keys that are not attended.
template <bool kKeys, int kTiles>
__device__ __forceinline__ void apply_mask(float (&sum)[kTiles][4], float scale, const float* mask,
                                           bool causal, int first_row, int first_column, int keys) {
    const int lane = lane_id();
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int local_row = lane / 4 + i / 2 * 8, local_column = n * 8 + lane % 4 * 2 + i % 2;
            const int row = first_row + local_row, column = first_column + local_column;
            const int query = kKeys ? column : row, key = kKeys ? row : column;
            float score = sum[n][i] * scale;
            if (mask != nullptr) {
                const float value = mask[local_row * kMaskStride<kTiles * 8> + local_column];
                score = value > -INFINITY || value != value ? score + value : -INFINITY;
            }
            sum[n][i] = key < keys && !(causal && key > query) ? score : -INFINITY;
        }
    }
}

// ---- softmax -----------------------------------------------------------------------------------------------

// The next tile's part in each row's softmax: scores become p, `scale` taking them to units of log 2.
template <int kTiles>
__device__ __forceinline__ void softmax_step(float (&score)[kTiles][4], float scale, float (&largest)[2],
                                             float (&sum)[2], float (&shrink)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float highest = -INFINITY;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            highest = fmaxf(highest, fmaxf(score[n][2 * i], score[n][2 * i + 1]));
        }
        highest = fmaxf(largest[i], warp_max<4>(highest) * scale);
        const float base = highest == -INFINITY ? 0.0f : highest;  // nothing attended yet: all p are 0
        shrink[i] = rough_exp2(largest[i] - base);
        largest[i] = highest;
        float added = 0.0f;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
            for (int j = 2 * i; j < 2 * i + 2; ++j) {
                score[n][j] = rough_exp2(__fmaf_rn(score[n][j], scale, -base));
                added += score[n][j];
            }
        }
        sum[i] = __fmaf_rn(sum[i], shrink[i], added);
    }
}

// After the last tile: what the rows of out are multiplied by, and their lse where it is wanted.
__device__ __forceinline__ void finish_softmax(float (&factor)[2], const AttentionParams& params,
                                               int64_t batch, int64_t head, int first_row,
                                               const float (&largest)[2], const float (&sum)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float total = warp_sum<4>(sum[i]);
        const int row = first_row + i * 8 + lane_id() / 4;
        factor[i] = total == 0.0f ? 0.0f : 1.0f / total;
        if (params.lse != nullptr && lane_id() % 4 == 0 && row < params.queries) {
            params.lse[(batch * params.heads + head) * params.queries + row] =
                total == 0.0f ? INFINITY : (largest[i] + log2f(total)) * kLn2;
        }
    }
}

}  // namespace meditok
