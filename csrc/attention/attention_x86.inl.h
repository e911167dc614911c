// Eight floats of float32, float16 and bfloat16 memory, and the order in which eight floats are joined; for the AVX2
// and AVX-512 files, inside their anonymous namespaces. Every machine with AVX2 has F16C.

MEDITOK_INLINE __m256 load_eight(const float* p) {
    return _mm256_loadu_ps(p);
}
MEDITOK_INLINE __m256 load_eight(const half_bits* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
MEDITOK_INLINE __m256 load_eight(const bfloat16_bits* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

// Rounded to nearest even.
MEDITOK_INLINE void store_eight(float* p, __m256 v) {
    _mm256_storeu_ps(p, v);
}
MEDITOK_INLINE void store_eight(half_bits* p, __m256 v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
MEDITOK_INLINE void store_eight(bfloat16_bits* p, __m256 v) {
    const __m256i bits = _mm256_castps_si256(v), one = _mm256_set1_epi32(1);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    const __m128i low = _mm256_castsi256_si128(rounded), high = _mm256_extracti128_si256(rounded, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
}
