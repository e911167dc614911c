// NEON for wide rows: 3 rows x 32 codes are 24 accumulators, 3 broadcasts and 1 code of the 32 registers. Right
// because vq_filter.h's band holds every code that can be best.

#include <arm_neon.h>

#include "common/simd.h"
#include "vq/vq_large_dim.h"

namespace meditok {

namespace {

using Vec = float32x4_t;
constexpr int64_t kWidth = 4;
constexpr int64_t kPanelRows = 3;
constexpr int64_t kDepth = 192;  // 24 KiB of codes and 2 KiB of rows in a first-level cache of 32 KiB

MEDITOK_INLINE Vec load(const float* p) {
    return vld1q_f32(p);
}
MEDITOK_INLINE void store(float* p, Vec v) {
    vst1q_f32(p, v);
}
MEDITOK_INLINE Vec fill(float a) {
    return vdupq_n_f32(a);
}
MEDITOK_INLINE Vec add(Vec a, Vec b) {
    return vaddq_f32(a, b);
}
MEDITOK_INLINE Vec mul(Vec a, Vec b) {
    return vmulq_f32(a, b);
}
MEDITOK_INLINE Vec max(Vec a, Vec b) {
    return vmaxq_f32(a, b);
}
MEDITOK_INLINE Vec fma(Vec a, Vec b, Vec c) {
    return vfmaq_f32(c, a, b);
}
MEDITOK_INLINE uint32_t at_least(Vec a, Vec b) {
    const uint32x4_t bits = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcgeq_f32(a, b), bits));
}
MEDITOK_INLINE float largest(Vec a) {
    return vmaxvq_f32(a);
}

#include "vq/vq_large_dim.inl.h"

}  // namespace

LargeDimKernel large_dim_neon() {
    return LargeDimKernel{product, scan, kPanelRows};
}

}  // namespace meditok
