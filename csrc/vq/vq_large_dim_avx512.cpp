// AVX-512 for wide rows: 12 rows x 32 codes are 24 accumulators and 2 codes of the 32 registers, the rows broadcast
// from memory inside the multiply-add. Right because vq_filter.h's band holds every code that can be best. Compiles
// against SIMDe as well (MEDITOK_SIMDE), which is how machines without AVX-512 test it.

#if defined(MEDITOK_SIMDE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#else
#include <immintrin.h>
#endif

#include "common/simd.h"
#include "vq/vq_large_dim.h"

namespace meditok {

namespace {

using Vec = __m512;
constexpr int64_t kWidth = 16;
constexpr int64_t kPanelRows = 12;
constexpr int64_t kDepth = 160;  // 20 KiB of codes and 8 KiB of rows in a first-level cache of 32 KiB

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

#include "vq/vq_large_dim.inl.h"

}  // namespace

LargeDimKernel large_dim_avx512() {
    return LargeDimKernel{product, scan, kPanelRows};
}

}  // namespace meditok
