// Sixteen floats, AVX-512; included inside an anonymous namespace (see simd.h for the rules).

using Vec = __m512;
constexpr int64_t kWidth = 16;

MEDITOK_INLINE __mmask16 first(int64_t count) {
    return static_cast<__mmask16>((1u << count) - 1u);
}
MEDITOK_INLINE Vec load(const float* p) {
    return _mm512_loadu_ps(p);
}
MEDITOK_INLINE void store(float* p, Vec v) {
    _mm512_storeu_ps(p, v);
}
MEDITOK_INLINE Vec load_first(const float* p, int64_t count) {  // count < kWidth, zeros after
    return _mm512_maskz_loadu_ps(first(count), p);
}
MEDITOK_INLINE void store_first(float* p, Vec v, int64_t count) {
    _mm512_mask_storeu_ps(p, first(count), v);
}
MEDITOK_INLINE Vec fill(float a) {
    return _mm512_set1_ps(a);
}
MEDITOK_INLINE Vec add(Vec a, Vec b) {
    return _mm512_add_ps(a, b);
}
MEDITOK_INLINE Vec sub(Vec a, Vec b) {
    return _mm512_sub_ps(a, b);
}
MEDITOK_INLINE Vec mul(Vec a, Vec b) {
    return _mm512_mul_ps(a, b);
}
MEDITOK_INLINE Vec div(Vec a, Vec b) {
    return _mm512_div_ps(a, b);
}
MEDITOK_INLINE Vec fma(Vec a, Vec b, Vec c) {
    return _mm512_fmadd_ps(a, b, c);
}
MEDITOK_INLINE Vec min(Vec a, Vec b) {
    return _mm512_min_ps(a, b);
}
MEDITOK_INLINE Vec max(Vec a, Vec b) {
    return _mm512_max_ps(a, b);
}
MEDITOK_INLINE Vec abs(Vec a) {
    return _mm512_abs_ps(a);
}
MEDITOK_INLINE Vec round(Vec a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
MEDITOK_INLINE Vec scale(Vec a, Vec power) {  // a 2^power, power whole
    return _mm512_scalef_ps(a, power);
}
MEDITOK_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
    const Vec bit = _mm512_set1_ps(-0.0f);
    return _mm512_or_ps(_mm512_andnot_ps(bit, magnitude), _mm512_and_ps(bit, sign));
}
MEDITOK_INLINE Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
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
MEDITOK_INLINE float sum_of(Vec a) {
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a), high);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// Rows become columns.
MEDITOK_INLINE void transpose(Vec* r) {
    Vec t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int half = 0; half < 2; ++half) {
            const __m512d a = _mm512_castps_pd(t[i + half]), b = _mm512_castps_pd(t[i + 2 + half]);
            r[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            r[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    for (int j = 0; j < 4; ++j) {  // 128-bit lane L of r[4i + j] holds column 4L + j of rows 4i to 4i + 3
        const Vec even_low = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88);
        const Vec odd_low = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
        const Vec even_high = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
        const Vec odd_high = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
        t[j] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
        t[4 + j] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
        t[8 + j] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
        t[12 + j] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
}
