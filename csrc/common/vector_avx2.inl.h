// Eight floats, AVX2 and FMA; included inside an anonymous namespace (see simd.h for the rules).

using Vec = __m256;
constexpr int64_t kWidth = 8;

MEDITOK_INLINE __m256i first(int64_t count) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes);
}
MEDITOK_INLINE Vec load(const float* p) {
    return _mm256_loadu_ps(p);
}
MEDITOK_INLINE void store(float* p, Vec v) {
    _mm256_storeu_ps(p, v);
}
MEDITOK_INLINE Vec load_first(const float* p, int64_t count) {  // count < kWidth, zeros after
    return _mm256_maskload_ps(p, first(count));
}
MEDITOK_INLINE void store_first(float* p, Vec v, int64_t count) {
    _mm256_maskstore_ps(p, first(count), v);
}
MEDITOK_INLINE Vec fill(float a) {
    return _mm256_set1_ps(a);
}
MEDITOK_INLINE Vec add(Vec a, Vec b) {
    return _mm256_add_ps(a, b);
}
MEDITOK_INLINE Vec sub(Vec a, Vec b) {
    return _mm256_sub_ps(a, b);
}
MEDITOK_INLINE Vec mul(Vec a, Vec b) {
    return _mm256_mul_ps(a, b);
}
MEDITOK_INLINE Vec div(Vec a, Vec b) {
    return _mm256_div_ps(a, b);
}
MEDITOK_INLINE Vec fma(Vec a, Vec b, Vec c) {
    return _mm256_fmadd_ps(a, b, c);
}
MEDITOK_INLINE Vec min(Vec a, Vec b) {
    return _mm256_min_ps(a, b);
}
MEDITOK_INLINE Vec max(Vec a, Vec b) {
    return _mm256_max_ps(a, b);
}
MEDITOK_INLINE Vec abs(Vec a) {
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a);
}
MEDITOK_INLINE Vec round(Vec a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
MEDITOK_INLINE Vec scale(Vec a, Vec power) {  // a 2^power, power whole and in [-126, 126]
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
MEDITOK_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
    const Vec bit = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(bit, magnitude), _mm256_and_ps(bit, sign));
}
MEDITOK_INLINE Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
MEDITOK_INLINE uint32_t at_least(Vec a, Vec b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}
MEDITOK_INLINE float largest(Vec a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
MEDITOK_INLINE float sum_of(Vec a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// Rows become columns.
MEDITOK_INLINE void transpose(Vec* r) {
    Vec t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int half = 0; half < 2; ++half) {
            const __m256d a = _mm256_castps_pd(t[i + half]), b = _mm256_castps_pd(t[i + 2 + half]);
            r[i + 2 * half] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
            r[i + 2 * half + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
        }
    }
    for (int j = 0; j < 4; ++j) {  // 128-bit lane L of r[4i + j] holds column 4L + j of rows 4i to 4i + 3
        t[j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x20);
        t[4 + j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x31);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
}
