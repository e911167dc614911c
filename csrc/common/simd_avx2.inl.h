// The float operations of common/simd.h on AVX2 and FMA, for the anonymous namespace of a *_avx2.cpp file. One or two
// instructions each, so there is nothing to prove.

using Vec = __m256;
constexpr int64_t kWidth = 8;

MEDITOK_INLINE Vec load(const float* p) {
    return _mm256_loadu_ps(p);
}
MEDITOK_INLINE void store(float* p, Vec v) {
    _mm256_storeu_ps(p, v);
}
MEDITOK_INLINE Vec fill(float a) {
    return _mm256_set1_ps(a);
}
MEDITOK_INLINE Vec add(Vec a, Vec b) {
    return _mm256_add_ps(a, b);
}
MEDITOK_INLINE Vec mul(Vec a, Vec b) {
    return _mm256_mul_ps(a, b);
}
MEDITOK_INLINE Vec max(Vec a, Vec b) {
    return _mm256_max_ps(a, b);
}
MEDITOK_INLINE Vec fma(Vec a, Vec b, Vec c) {
    return _mm256_fmadd_ps(a, b, c);
}
MEDITOK_INLINE uint32_t at_least(Vec a, Vec b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}
MEDITOK_INLINE float largest(Vec a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
