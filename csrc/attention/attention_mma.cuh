// Products of one warp between tiles of rows in shared memory, for the attention kernels. The warp owns the rows of the
// one side (A) and goes through the rows of the other (B); sums are float32 and stay in registers.
//
//   scores      sum = own · otherᵀ          depth = the width of the rows
//   accumulate  total += weight · other     depth = the rows of `other`; the weights are sums of `scores`
//
// A step of the depth is 32 bytes, 16 halves or 8 floats, so fp16, bfloat16 and tf32 share the loads by ldmatrix. Where
// rows are the depth, halves come transposed; floats are read one by one, and since a warp's sums hold columns 2 l and
// 2 l + 1 where tf32 wants l and l + 4, the depth is permuted alike on both sides, which no sum notices.
#pragma once

#include "common/dtype.h"
#include "common/ptx.cuh"
#include "common/warp.cuh"

namespace meditok {

// What a type of element needs of the tensor cores. kTiles: tiles of eight columns of sums in a step of the depth.
struct HalfOperand {
    using Element = half_bits;
    static constexpr int kArchitecture = 75, kTiles = 2;
    __device__ static uint32_t pack(float low, float high) { return pack_half2(low, high); }
    __device__ static void multiply(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
        mma_k16(d, a, b0, b1, d);
    }
};

struct Bfloat16Operand {
    using Element = bfloat16_bits;
    static constexpr int kArchitecture = 80, kTiles = 2;
    __device__ static uint32_t pack(float low, float high) { return pack_bfloat2(low, high); }
    __device__ static void multiply(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
        mma_bfloat16_k16(d, a, b0, b1);
    }
};

struct Tf32Operand {
    using Element = float;
    static constexpr int kArchitecture = 80, kTiles = 1;
    __device__ static void multiply(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
        mma_tf32_k8(d, a, b0, b1);
    }
};

template <class Operand>
constexpr bool kIsFloat = sizeof(typename Operand::Element) == 4;

// Bytes from row to row of a tile: an odd number of 16, so that eight rows lie in different banks for ldmatrix, and four
// more than a multiple of 32 words, so that the single floats do.
template <class Element, int kWidth>
constexpr int kRowBytes = kWidth * static_cast<int>(sizeof(Element)) + 16;

template <class Operand>
__device__ inline void round_operand(uint32_t (&fragment)[4]) {
    if constexpr (kIsFloat<Operand>) {
#pragma unroll
        for (int i = 0; i < 4; ++i) fragment[i] = round_tf32(__int_as_float(static_cast<int>(fragment[i])));
    }
}

// 16 rows of A from `rows` on, one step of the depth.
template <class Operand, int kStride>
__device__ inline void load_a(uint32_t (&a)[4], const unsigned char* rows, int step) {
    const int lane = lane_id();
    load_matrices(a, rows + lane % 16 * kStride + step * 32 + lane / 16 * 16);
    round_operand<Operand>(a);
}

// 16 columns of B, which are the rows from `rows` on; b[0], b[1] are the first eight.
template <class Operand, int kStride>
__device__ inline void load_b(uint32_t (&b)[4], const unsigned char* rows, int step) {
    const int lane = lane_id();
    load_matrices(b, rows + (lane % 8 + lane / 16 * 8) * kStride + step * 32 + lane / 8 % 2 * 16);
    round_operand<Operand>(b);
}

// 16 columns of B from `column` on, whose depth are the rows from `rows` on.
template <class Operand, int kStride>
__device__ inline void load_b_transposed(uint32_t (&b)[4], const unsigned char* rows, int column) {
    const int lane = lane_id();
    if constexpr (kIsFloat<Operand>) {
        const float* first =
            reinterpret_cast<const float*>(rows + lane % 4 * 2 * kStride) + column + lane / 4;
        const float* second = first + kStride / 4;
        b[0] = round_tf32(first[0]);
        b[1] = round_tf32(second[0]);
        b[2] = round_tf32(first[8]);
        b[3] = round_tf32(second[8]);
    } else {
        load_matrices_transposed(b, rows + lane % 16 * kStride + (column + lane / 16 * 8) * 2);
    }
}

// Sums of `scores` as A of the next product.
template <class Operand, int kTiles>
__device__ inline void pack_a(uint32_t (&a)[4], const float (&sum)[kTiles][4], int step) {
    if constexpr (kIsFloat<Operand>) {
        constexpr int kFrom[4] = {0, 2, 1, 3};
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = round_tf32(sum[step][kFrom[i]]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float* pair = sum[2 * step + i / 2] + i % 2 * 2;
            a[i] = Operand::pack(pair[0], pair[1]);
        }
    }
}

// sum[m][n] = rows 16 m ... of `own` times rows 8 n ... of `other`, both tiles of kWidth elements a row.
template <class Operand, int kWidth, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void scores(float (&sum)[kRowTiles][kColumnTiles][4], const unsigned char* own,
                                       const unsigned char* other) {
    constexpr int kStride = kRowBytes<typename Operand::Element, kWidth>;
    constexpr int kSteps = (kStride - 16) / 32;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n)
            sum[m][n][0] = sum[m][n][1] = sum[m][n][2] = sum[m][n][3] = 0.0f;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        uint32_t a[kRowTiles][4];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) load_a<Operand, kStride>(a[m], own + m * 16 * kStride, step);
#pragma unroll
        for (int n = 0; n < kColumnTiles; n += 2) {
            uint32_t b[4];
            load_b<Operand, kStride>(b, other + n * 8 * kStride, step);
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) {
                Operand::multiply(sum[m][n], a[m], b[0], b[1]);
                Operand::multiply(sum[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// total[m][n] += weight of rows 16 m ... times columns 8 n ... of `other`.
template <class Operand, int kWidth, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void accumulate(float (&total)[kRowTiles][kWidth / 8][4],
                                           const float (&weight)[kRowTiles][kColumnTiles][4],
                                           const unsigned char* other) {
    constexpr int kStride = kRowBytes<typename Operand::Element, kWidth>;
#pragma unroll
    for (int step = 0; step < kColumnTiles / Operand::kTiles; ++step) {
        uint32_t a[kRowTiles][4];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) pack_a<Operand>(a[m], weight[m], step);
#pragma unroll
        for (int n = 0; n < kWidth / 8; n += 2) {
            uint32_t b[4];
            load_b_transposed<Operand, kStride>(b, other + step * Operand::kTiles * 8 * kStride, n * 8);
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) {
                Operand::multiply(total[m][n], a[m], b[0], b[1]);
                Operand::multiply(total[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// A warp's sums, times a factor for each of a lane's two rows, into its own rows of a tile, rounded to the element.
template <class Operand, int kWidth>
__device__ __forceinline__ void put_rows(unsigned char* rows, const float (&total)[kWidth / 8][4],
                                         float upper, float lower) {
    using Element = typename Operand::Element;
    const int lane = lane_id();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        unsigned char* row = rows + (lane / 4 + 8 * i) * kRowBytes<Element, kWidth>;
        const float factor = i == 0 ? upper : lower;
#pragma unroll
        for (int n = 0; n < kWidth / 8; ++n) {
            unsigned char* pair = row + (n * 8 + lane % 4 * 2) * sizeof(Element);
            const float low = total[n][2 * i] * factor, high = total[n][2 * i + 1] * factor;
            if constexpr (kIsFloat<Operand>) {
                *reinterpret_cast<float2*>(pair) = float2{low, high};
            } else {
                *reinterpret_cast<uint32_t*>(pair) = Operand::pack(low, high);
            }
        }
    }
}

}  // namespace meditok
