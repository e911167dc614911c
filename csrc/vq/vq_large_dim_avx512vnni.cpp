// AVX-512 VNNI for wide rows: the register tile of vq_large_dim_avx512.cpp, but vpdpwssd takes pairs of int16 in place
// of floats, twice the products an instruction. Right because vq_filter.h's band of the int16 filter holds every code
// that can be best, and because the sums stay below 2^31. Machines without it test it through SIMDe (tests/ops/simde).

#include <immintrin.h>

#include "common/simd.h"
#include "vq/vq_large_dim.h"

namespace meditok {

namespace {

#include "vq/vq_simd_avx512.inl.h"

constexpr int64_t kPanelRows = 12;
constexpr int64_t kDepth = 160;  // 20 KiB of codes and 8 KiB of rows in a first-level cache of 32 KiB

MEDITOK_INLINE IVec load(const Int16Pair* p) {
    return load_int(p);
}
MEDITOK_INLINE IVec load(const int32_t* p) {
    return load_int(p);
}
MEDITOK_INLINE void store(int32_t* p, IVec v) {
    store_int(p, v);
}
MEDITOK_INLINE IVec fill(Int16Pair pair) {
    int32_t both;
    __builtin_memcpy(&both, &pair, sizeof both);
    return fill_int(both);
}
MEDITOK_INLINE IVec fma(IVec a, IVec b, IVec sum) {
    return _mm512_dpwssd_epi32(sum, a, b);
}

#include "vq/vq_large_dim.inl.h"

void round_row(const float* x, float scale, int64_t width, int16_t* out) {
    for (int64_t i = 0; i < width; ++i) {
        const float shifted = x[i] * scale + 12582912.0f;  // 1.5 2^23: the low bits are the rounded value
        int32_t bits;
        __builtin_memcpy(&bits, &shifted, sizeof bits);
        out[i] = static_cast<int16_t>(bits);
    }
}

void int16_scan(const Int16ScanBlock& block) {
    for (int64_t row = 0; row < block.rows; ++row) {
        const int32_t* scores = block.scores + row * kScoreStride;
        IVec best[kBlockTiles], most = fill_int(INT32_MIN);
        for (int64_t tile = 0; tile < block.tiles; ++tile) {
            best[tile] = max_int(load(scores + tile * kTileCodes), load(scores + tile * kTileCodes + kWidth));
            most = max_int(most, best[tile]);
        }
        const int32_t limit = largest_int(most) - block.band;
        if (limit > block.lower[row]) block.lower[row] = limit;
        const IVec below = fill_int(block.lower[row] - 1);
        for (int64_t tile = 0; tile < block.tiles; ++tile) {
            if (above(best[tile], below) == 0) continue;
            for (int64_t part = tile * kTileCodes; part < (tile + 1) * kTileCodes; part += kWidth) {
                for (uint32_t mask = above(load(scores + part), below); mask != 0; mask &= mask - 1) {
                    const int64_t at = part + __builtin_ctz(mask), slot = block.first_slot + at;
                    if (slot < block.slots) block.candidate(block.context, row, slot, scores[at]);
                }
            }
        }
    }
}

}  // namespace

LargeDimKernel large_dim_avx512vnni() {
    return LargeDimKernel{product<float, float>,       scan,      kPanelRows, round_row,
                          product<Int16Pair, int32_t>, int16_scan};
}

}  // namespace meditok
