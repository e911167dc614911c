// The large-width regime of vq_assign on CPU (more than kSmallWidth columns): between vq_large_dim.cpp and one file
// per instruction set. Plain pointers only, see common/simd.h.
#pragma once

#include "vq/vq_cpu.h"

namespace meditok {

constexpr int64_t kSmallWidth = 32;  // vq_cpu.cpp's kernels keep a whole row in registers up to here
constexpr int64_t kBlockTiles = 4;   // codes scored before their scores are looked at: 128

// Two neighbouring columns rounded to 16 bits.
struct Int16Pair {
    int16_t first, second;
};

// The filter values of a block of rows against up to kBlockTiles tiles of codes, in float or, of Int16Pair, in int32_t.
template <class Element, class Score>
struct ProductBlock {
    const Element* x;  // (panels * panel_rows, x_stride), the last rows may be padding
    int64_t x_stride, panels, width;
    const Element* codes;  // (tiles, width, 32)
    const Score* bias;     // (tiles, 32)
    int64_t tiles;
    Score* scores;  // out (panels * panel_rows, kBlockTiles * 32)
};

using FloatProduct = ProductBlock<float, float>;
using Int16Product = ProductBlock<Int16Pair, int32_t>;

// Called for every code that may be the best so far, in rising order of codes for each row; `upper` bounds its score.
using Candidate = void (*)(void* context, int64_t row, int64_t code, double upper);

// What is kept of them: codes that may be the best.
struct ScanBlock {
    const float* scores;  // as above
    int64_t rows, tiles, first_code;
    const float* x_norm;  // (rows) upper bounds
    const float* radius;  // (tiles, 32)
    const float* reach;   // (tiles)
    Bound bound;
    float* lower;  // (rows) in and out: the L of vq_filter.h over the codes seen so far, less its slack
    Candidate candidate;  // whose upper bound F + E reaches `lower`
    void* context;
};

struct Int16ScanBlock {
    const int32_t* scores;  // as above
    int64_t rows, tiles, first_slot;
    int64_t slots;        // in use; what fills the last tile up is no candidate
    int32_t band;         // 2 E
    int32_t* lower;       // (rows) in and out: the largest F so far, less the band
    Candidate candidate;  // of slots, whose F reaches `lower`
    void* context;
};

struct LargeDimKernel {
    void (*product)(const FloatProduct& block);
    void (*scan)(const ScanBlock& block);
    int64_t panel_rows;
    // The int16 filter; may be missing. `round` writes the nearest integers of x scale, |x scale| < 2^15.
    void (*round)(const float* x, float scale, int64_t width, int16_t* out);
    void (*int16_product)(const Int16Product& block);
    void (*int16_scan)(const Int16ScanBlock& block);
};

LargeDimKernel large_dim_avx2();
LargeDimKernel large_dim_avx512();
LargeDimKernel large_dim_avx512vnni();
LargeDimKernel large_dim_neon();

// Whether the instruction set in use has an int16 filter for this regime: only then is it worth packing codes for it.
bool reads_wide_int16();

// vq_assign for this regime; false, and nothing done, where it does not apply: small widths, no vector kernel.
bool assign_large_dim(const AssignParams& params, const AssignHook& hook, int threads);

}  // namespace meditok
