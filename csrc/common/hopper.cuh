// What only sm_90a has: the copy engine (TMA), the barriers it completes on, and products of a warpgroup (wgmma). On other
// architectures these functions do nothing, and no kernel calls them. On a CPU, tests/ops/cuda_emulation/common/hopper.cuh
// stands in for this file.
//
// A box is 64 rows of 128 bytes, 64 halves, in shared memory at a multiple of 1,024 bytes: row r at 128 r, its 16-byte
// parts swizzled (part p at p xor r % 8), as the copy engine writes it and wgmma reads it. Descriptors of a box:
//   bits 0-13 address / 16, 16-29 unused here, 32-45 bytes between groups of eight rows / 16 (64), 62-63 swizzle (1)
// With the depth along the rows' elements ("K-major") a step of 16 is 32 bytes further; with the depth across rows
// ("MN-major", a transposed B) it is 16 rows, 2,048 bytes.
#pragma once

#include <cuda.h>

#include "common/ptx.cuh"

namespace meditok {

constexpr int kBoxRows = 64, kBoxBytes = kBoxRows * 128, kBoxAlignment = 1024;

#if MEDITOK_ARCHITECTURE == 90 && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MEDITOK_HOPPER 1
#else
#define MEDITOK_HOPPER 0
#endif

__device__ inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- barriers and copies -----------------------------------------------------------------------------------

// One arrival a phase, that of expect_bytes(). After the last one: fence_barriers() and a barrier of the block.
__device__ inline void init_barrier(uint64_t* barrier) {
#if MEDITOK_HOPPER
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
#endif
}

__device__ inline void fence_barriers() {
#if MEDITOK_HOPPER
    asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// The phase ends when as many bytes have been copied.
__device__ inline void expect_bytes(uint64_t* barrier, int bytes) {
#if MEDITOK_HOPPER
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
#endif
}

// Until the phase of that parity has ended: 0 for the first.
__device__ inline void wait_barrier(uint64_t* barrier, int parity) {
#if MEDITOK_HOPPER
    asm volatile(
        "{\n\t"
        ".reg .pred p;\n\t"
        "again:\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n\t"
        "@!p bra again;\n\t"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
#endif
}

// A box of the tensor, zeros where it ends; coordinates in the order of the map's axes, in elements.
__device__ inline void copy_box(void* box, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2,
                                int c3) {
#if MEDITOK_HOPPER
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
        "%4, %5, %6}], "
        "[%2];" ::"r"(shared_address(box)),
        "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
#endif
}

// The 128 threads of warpgroup `group` meet; barrier 0 is the block's.
__device__ inline void meet_warpgroup(int group) {
#if MEDITOK_HOPPER
    asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
#endif
}

// ---- products ----------------------------------------------------------------------------------------------

__device__ inline uint64_t box_descriptor(const void* box, int byte) {
    const uint64_t address = shared_address(box) + static_cast<uint32_t>(byte);
    return (address & 0x3ffff) >> 4 | uint64_t{64} << 32 | uint64_t{1} << 62;
}

// The sums go through an empty instruction, so that what is computed of them stays on its side of it.
__device__ inline void pin_sums(float (&d)[8][4]) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
    }
}

// Before the first of several products into d: registers written so far are seen by them.
__device__ inline void begin_products(float (&d)[8][4]) {
#if MEDITOK_HOPPER
    __syncwarp();
    pin_sums(d);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// The same where operands come from registers, which the fence orders as well.
template <int kSteps>
__device__ inline void begin_products(float (&d)[8][4], uint32_t (&a)[kSteps][4]) {
#if MEDITOK_HOPPER
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        asm volatile("" : "+r"(a[step][0]), "+r"(a[step][1]), "+r"(a[step][2]), "+r"(a[step][3])::"memory");
    }
#endif
    begin_products(d);
}

// After the last: all of them are done, d may be read and what they read may be written.
__device__ inline void end_products(float (&d)[8][4]) {
#if MEDITOK_HOPPER
    asm volatile("wgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned 0;" ::: "memory");
    pin_sums(d);
#endif
}

#define MEDITOK_SUMS(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define MEDITOK_ALL_SUMS                                                                                  \
    MEDITOK_SUMS(0), MEDITOK_SUMS(1), MEDITOK_SUMS(2), MEDITOK_SUMS(3), MEDITOK_SUMS(4), MEDITOK_SUMS(5), \
        MEDITOK_SUMS(6), MEDITOK_SUMS(7)
#define MEDITOK_SUM_LIST                                                                                    \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
    "%22, "                                                                                                 \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31}"

// d (+)= a b, 64 x 64 sums of a warpgroup over a depth of 16; warp w of it has rows 16 w ..., laid out as in mma of 16 x 8.
// Both operands K-major boxes; `add` false: the sums start from zero.
template <bool kBfloat16>
__device__ inline void wgmma(float (&d)[8][4], uint64_t a, uint64_t b, bool add) {
#if MEDITOK_HOPPER
    if constexpr (kBfloat16) {
        asm volatile(
            "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %34, 0;\n\t"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " MEDITOK_SUM_LIST
            ", %32, %33, p, 1, 1, 0, 0;\n\t}"
            : MEDITOK_ALL_SUMS
            : "l"(a), "l"(b), "r"(static_cast<int>(add)));
    } else {
        asm volatile(
            "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %34, 0;\n\t"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " MEDITOK_SUM_LIST
            ", %32, %33, p, 1, 1, 0, 0;\n\t}"
            : MEDITOK_ALL_SUMS
            : "l"(a), "l"(b), "r"(static_cast<int>(add)));
    }
#endif
}

// d += a b with a in registers, laid out as in mma of 16 x 16, and b an MN-major box.
template <bool kBfloat16>
__device__ inline void wgmma_transposed(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
#if MEDITOK_HOPPER
    if constexpr (kBfloat16) {
        asm volatile(
            "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %37, 0;\n\t"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " MEDITOK_SUM_LIST
            ", {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n\t}"
            : MEDITOK_ALL_SUMS
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
    } else {
        asm volatile(
            "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %37, 0;\n\t"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " MEDITOK_SUM_LIST
            ", {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n\t}"
            : MEDITOK_ALL_SUMS
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
    }
#endif
}

#undef MEDITOK_SUMS
#undef MEDITOK_ALL_SUMS
#undef MEDITOK_SUM_LIST

}  // namespace meditok
