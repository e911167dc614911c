// AVX-512 F and DQ: 16 floats a vector; a register tile of 12 rows x 2 vectors uses 24 accumulators, 2 loads and 1
// broadcast of the 32 registers. Machines without AVX-512 test it through SIMDe (tests/ops/simde).

#include <immintrin.h>

#include "attention/attention_cpu.h"
#include "common/simd.h"

namespace meditok {

namespace {

#include "attention/attention_x86.inl.h"
#include "common/simd_avx512.inl.h"

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
MEDITOK_INLINE Vec sub(Vec a, Vec b) {
    return _mm512_sub_ps(a, b);
}
MEDITOK_INLINE float total(Vec v) {
    return sum_of_eight(_mm256_add_ps(lower(v), upper(v)));
}
MEDITOK_INLINE Vec nearest(Vec v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
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

// Lanes of a with bit `Step` clear, the others from b, `Step` lanes lower; and the mirror image of it.
template <int Step>
MEDITOK_INLINE void exchange(Vec (&r)[kWidth]) {
    alignas(64) int low[kWidth], high[kWidth];
    for (int lane = 0; lane < kWidth; ++lane) {
        low[lane] = (lane & Step) == 0 ? lane : kWidth + lane - Step;
        high[lane] = (lane & Step) == 0 ? lane + Step : kWidth + lane;
    }
    const __m512i from_low = _mm512_loadu_si512(low), from_high = _mm512_loadu_si512(high);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
        if ((i & Step) != 0) continue;
        const Vec a = r[i], b = r[i + Step];
        r[i] = _mm512_permutex2var_ps(a, from_low, b);
        r[i + Step] = _mm512_permutex2var_ps(a, from_high, b);
    }
}
MEDITOK_INLINE void transpose(Vec (&r)[kWidth]) {
    exchange<1>(r);
    exchange<2>(r);
    exchange<4>(r);
    exchange<8>(r);
}

#include "attention/attention_simd.inl.h"
#include "attention/attention_simd_backward.inl.h"

}  // namespace

AttentionKernel attention_avx512() {
    return simd_kernel();
}

}  // namespace meditok
