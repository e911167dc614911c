// NEON of 64-bit Arm: 4 floats a vector; a register tile of 8 rows x 2 vectors uses 16 accumulators, 8 maxima, 2 codes
// and 1 broadcast of the 32 registers. Right because vq_filter.h's band holds every code that can be best. No int16
// kernel: pairs of columns would cost as much as the float multiply-adds they replace.

#include <arm_neon.h>

#include "common/simd.h"
#include "vq/vq_cpu.h"

namespace meditok {

namespace {

using Vec = float32x4_t;
constexpr int64_t kWidth = 4;
constexpr int kRows = 8;

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
    const uint32_t bits[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcgeq_f32(a, b), vld1q_u32(bits)));
}
MEDITOK_INLINE float largest(Vec a) {
    return vmaxvq_f32(a);
}

#include "vq/vq_simd.inl.h"

}  // namespace

FilterKernel filter_neon() {
    return FilterKernel{run_filter, nullptr, kWidth, kRows};
}

}  // namespace meditok
