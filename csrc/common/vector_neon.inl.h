// Four floats, NEON of 64-bit Arm; included inside an anonymous namespace (see simd.h for the rules).

using Vec = float32x4_t;
constexpr int64_t kWidth = 4;

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
