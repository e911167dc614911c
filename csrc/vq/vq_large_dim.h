// The large-width regime of vq_assign on CPU (more than kSmallWidth columns): between vq_large_dim.cpp and one file
// per instruction set. Plain pointers only, see common/simd.h.
#pragma once

#include "vq/vq_cpu.h"

namespace meditok {

constexpr int64_t kSmallWidth = 32;  // vq_cpu.cpp's kernels keep a whole row in registers up to here
constexpr int64_t kBlockTiles = 4;   // codes scored before their scores are looked at: 128

// The filter values of a block of rows against up to kBlockTiles tiles of codes.
struct ProductBlock {
    const float* x;  // (panels * panel_rows, x_stride), the last rows may be padding
    int64_t x_stride, panels, width;
    const float* codes;  // (tiles, width, 32)
    const float* bias;   // (tiles, 32)
    int64_t tiles;
    float* scores;  // out (panels * panel_rows, kBlockTiles * 32)
};

// What is kept of them: codes that may be the best.
struct ScanBlock {
    const float* scores;  // as above
    int64_t rows, tiles, first_code;
    const float* x_norm;  // (rows) upper bounds
    const float* radius;  // (tiles, 32)
    const float* reach;   // (tiles)
    Bound bound;
    float* lower;  // (rows) in and out: the L of vq_filter.h over the codes seen so far, less its slack
    // Called for every code whose upper bound F + E reaches `lower`, in rising order of codes for each row.
    void (*candidate)(void* context, int64_t row, int64_t code, float upper);
    void* context;
};

struct LargeDimKernel {
    void (*product)(const ProductBlock& block);
    void (*scan)(const ScanBlock& block);
    int64_t panel_rows;
};

LargeDimKernel large_dim_avx2();
LargeDimKernel large_dim_avx512();
LargeDimKernel large_dim_neon();

// vq_assign for this regime; false, and nothing done, where it does not apply: small widths, no vector kernel.
bool assign_large_dim(const AssignParams& params, const AssignHook& hook, int threads);

}  // namespace meditok
