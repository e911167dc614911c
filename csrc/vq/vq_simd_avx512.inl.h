// The integer operations of common/simd.h on 512 bits, for the files that need them; the including file adds Pairs,
// which differs between AVX-512 BW and VNNI. One instruction each, so there is nothing to prove.

#include "common/vector_avx512.inl.h"

constexpr int kRows = 8;

using IVec = __m512i;
constexpr int kRegisters = 32;

MEDITOK_INLINE IVec load_int(const void* p) {
    return _mm512_loadu_si512(p);
}
MEDITOK_INLINE void store_int(int32_t* p, IVec v) {
    _mm512_storeu_si512(p, v);
}
MEDITOK_INLINE IVec fill_int(int32_t a) {
    return _mm512_set1_epi32(a);
}
MEDITOK_INLINE IVec max_int(IVec a, IVec b) {
    return _mm512_max_epi32(a, b);
}
MEDITOK_INLINE uint32_t above(IVec a, IVec b) {
    return _mm512_cmpgt_epi32_mask(a, b);
}
MEDITOK_INLINE int32_t largest_int(IVec a) {
    const __m256i half = _mm256_max_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}
