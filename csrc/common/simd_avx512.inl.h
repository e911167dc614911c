// The float operations of common/simd.h on AVX-512 F and DQ, for the anonymous namespace of a *_avx512.cpp file. One or two
// instructions each, so there is nothing to prove.

using Vec = __m512;
constexpr int64_t kWidth = 16;

MEDITOK_INLINE Vec load(const float* p) {
    return _mm512_loadu_ps(p);
}
MEDITOK_INLINE void store(float* p, Vec v) {
    _mm512_storeu_ps(p, v);
}
MEDITOK_INLINE Vec fill(float a) {
    return _mm512_set1_ps(a);
}
MEDITOK_INLINE Vec add(Vec a, Vec b) {
    return _mm512_add_ps(a, b);
}
MEDITOK_INLINE Vec mul(Vec a, Vec b) {
    return _mm512_mul_ps(a, b);
}
MEDITOK_INLINE Vec max(Vec a, Vec b) {
    return _mm512_max_ps(a, b);
}
MEDITOK_INLINE Vec fma(Vec a, Vec b, Vec c) {
    return _mm512_fmadd_ps(a, b, c);
}
MEDITOK_INLINE uint32_t at_least(Vec a, Vec b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
}
MEDITOK_INLINE float largest(Vec a) {
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1));
    const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(a), high);
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
