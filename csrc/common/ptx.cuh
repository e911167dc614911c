// Everything that is written in PTX: tensor-core products of one warp, and what feeds them. All of it exists from sm_75
// on; where a newer architecture does the same in one instruction, the choice is made here and nowhere else. On a CPU,
// tests/ops/cuda_emulation/common/ptx.cuh stands in for this file.
//
// Fragments of lane l, with group = l / 4 and pair = 2 (l % 4); a register holds two neighbouring fp16 values:
//   A (16 x 8)   a0: row group, columns pair and pair + 1;   a1: row group + 8, the same columns
//   B (8 x 8)    b0: rows pair and pair + 1, column group
//   D (16 x 8)   d0, d1: row group, columns pair and pair + 1;   d2, d3: row group + 8
//   16 x 16 and 16 x 8 operands: the second half of the depth follows as a2, a3 and b1.
//   tf32: a register holds one float of column lane % 4 (a0, a1; b0: row lane % 4), then of 4 + lane % 4 (a2, a3; b1)
#pragma once

#include <cstdint>

// The architecture that device code is compiled for, 80 for sm_80; 0 in host code.
#if defined(__CUDA_ARCH__)
#define MEDITOK_ARCHITECTURE (__CUDA_ARCH__ / 10)
#else
#define MEDITOK_ARCHITECTURE 0
#endif

namespace meditok {

// threadIdx.x, read anew: what depends on them is computed again where it
// is needed and does not occupy registers from one loop to the next.
__device__ inline int thread_id() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

// Two floats rounded to nearest even as fp16; `low` in the lower half.
__device__ inline uint32_t pack_half2(float low, float high) {
    uint32_t packed;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
    uint16_t bits[2];
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits[0]) : "f"(low));
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits[1]) : "f"(high));
    packed = static_cast<uint32_t>(bits[1]) << 16 | bits[0];
#endif
    return packed;
}

__device__ inline float half_to_float(uint32_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(bits)));
    return value;
}

// The same for bfloat16; from sm_80 on.
__device__ inline uint32_t pack_bfloat2(float low, float high) {
    uint32_t packed = 0;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#endif
    return packed;
}

// Rounded to nearest (ties away from zero) to the 11 significant bits a tf32 product reads; from sm_80 on.
__device__ inline uint32_t round_tf32(float value) {
    uint32_t bits = 0;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
#endif
    return bits;
}

// Within 2^-22 of the power; results under 2^-126 are 0, and 2^-infinity is 0.
__device__ inline float rough_exp2(float value) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
    return power;
}

// Within 2^-22 of the root, and in line: the exact one calls a subroutine.
__device__ inline float rough_sqrt(float value) {
    float root;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(value));
    return root;
}

// Four 8 x 8 matrices of fp16 from shared memory: lane l names row l % 8 of matrix l / 8, 16 aligned bytes. Register i
// holds columns pair and pair + 1 of row `group` of matrix i: a B fragment where rows are stored as B's columns.
__device__ inline void load_matrices(uint32_t (&matrix)[4], const void* row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                 : "r"(address)
                 : "memory");
}

// The same, each matrix transposed: register i holds rows pair and pair + 1 of column `group` of matrix i, a B fragment
// where rows are stored as B's rows.
__device__ inline void load_matrices_transposed(uint32_t (&matrix)[4], const void* row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                 : "r"(address)
                 : "memory");
}

// 16 aligned bytes from global to shared memory, or zeros where they are not `present` (the source is not read then).
// From sm_80 on they are there after wait_copies(), elsewhere at once.
__device__ inline void copy_async(void* shared, const void* global, bool present) {
#if __CUDA_ARCH__ >= 800
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const int bytes = present ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes)
                 : "memory");
#else
    *static_cast<uint4*>(shared) = present ? *static_cast<const uint4*>(global) : uint4{0, 0, 0, 0};
#endif
}

// All copies that this thread has begun. Other threads see them after a barrier.
__device__ inline void wait_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// d = a b + c, fp16 operands, fp32 accumulators. Where c is the start of several products it stays in its registers.
__device__ inline void mma_k8(float (&d)[4], const uint32_t* a, uint32_t b, const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, "
        "%10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

__device__ inline void mma_k16(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1,
                               const float (&c)[4]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),
          "f"(c[3]));
#else
    mma_k8(d, a, b0, c);
    mma_k8(d, a + 2, b1, d);
#endif
}

// d += a b with bfloat16 operands, of a depth of 16; from sm_80 on.
__device__ inline void mma_bfloat16_k16(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// d += a b with tf32 operands, of a depth of 8; from sm_80 on.
__device__ inline void mma_tf32_k8(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// max(best, a, b) where best >= 0: negative a and b may lose to it, so the bits can be compared as integers. One
// instruction on sm_90 (integers) and sm_100 (floats), two elsewhere.
__device__ inline float max_nonnegative(float best, float a, float b) {
#if __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200
    float largest;
    asm("max.f32 %0, %1, %2, %3;" : "=f"(largest) : "f"(best), "f"(a), "f"(b));
    return largest;
#else
    return __int_as_float(max(max(__float_as_int(a), __float_as_int(b)), __float_as_int(best)));
#endif
}

}  // namespace meditok
