// AVX-512 F and DQ: 16 floats a vector; a register tile of 12 rows x 2 vectors uses 24 accumulators, 2 loads and 1
// broadcast of the 32 registers. Machines without AVX-512 test it through SIMDe (tests/ops/simde).

#include <immintrin.h>

#include "attention/attention_cpu.h"
#include "common/simd.h"

namespace meditok {

namespace {

#include "attention/attention_x86.inl.h"
#include "common/vector_avx512.inl.h"

constexpr int kRows = 12;

MEDITOK_INLINE __m256 lower(Vec v) {
    return _mm512_castps512_ps256(v);
}
MEDITOK_INLINE __m256 upper(Vec v) {
    return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
}

MEDITOK_INLINE Vec load_as(const float* p) {
    return load(p);
}
template <class T>
MEDITOK_INLINE Vec load_as(const T* p) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(load_eight(p)), load_eight(p + 8), 1);
}
MEDITOK_INLINE void store_as(float* p, Vec v) {
    store(p, v);
}
template <class T>
MEDITOK_INLINE void store_as(T* p, Vec v) {
    store_eight(p, lower(v));
    store_eight(p + 8, upper(v));
}
constexpr float kLowestPower = -160;  // below the smallest subnormal
MEDITOK_INLINE Vec times_power(Vec v, Vec n) {
    return _mm512_scalef_ps(v, n);
}
MEDITOK_INLINE Vec first_lanes(Vec v, int64_t count, Vec rest) {
    return _mm512_mask_blend_ps(static_cast<__mmask16>((1u << count) - 1u), rest, v);
}
MEDITOK_INLINE Vec where_equal(Vec a, Vec b, Vec then, Vec otherwise) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), otherwise, then);
}

#include "attention/attention_blocks.inl.h"
//
#include "attention/attention_simd.inl.h"
#include "attention/attention_simd_backward.inl.h"

}  // namespace

AttentionKernel attention_avx512() {
    return simd_kernel();
}

}  // namespace meditok
