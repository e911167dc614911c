// AVX2 and F16C: 8 floats a vector; a register tile of 6 rows x 2 vectors uses 12 accumulators, 2 loads and 1 broadcast of
// the 16 registers.

#include <immintrin.h>

#include "attention/attention_cpu.h"
#include "common/simd.h"

namespace meditok {

namespace {

#include "attention/attention_x86.inl.h"
#include "common/simd_avx2.inl.h"

constexpr int kRows = 6;

template <class T>
MEDITOK_INLINE Vec load_as(const T* p) {
    return load_eight(p);
}
template <class T>
MEDITOK_INLINE void store_as(T* p, Vec v) {
    store_eight(p, v);
}
MEDITOK_INLINE Vec sub(Vec a, Vec b) {
    return _mm256_sub_ps(a, b);
}
MEDITOK_INLINE float total(Vec v) {
    return sum_of_eight(v);
}
MEDITOK_INLINE Vec nearest(Vec v) {
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
constexpr float kLowestPower = -127;  // whose exponent field is 0
MEDITOK_INLINE Vec times_power(Vec v, Vec n) {
    const __m256i field = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(field, 23)));
}
MEDITOK_INLINE Vec first_lanes(Vec v, int64_t count, Vec rest) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i kept = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
    return _mm256_blendv_ps(rest, v, _mm256_castsi256_ps(kept));
}
MEDITOK_INLINE Vec where_equal(Vec a, Vec b, Vec then, Vec otherwise) {
    return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(a, b, _CMP_EQ_OQ));
}
MEDITOK_INLINE void transpose(Vec (&r)[kWidth]) {
    Vec pair[8], four[8];
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        four[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
        four[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
        four[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
        four[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm256_permute2f128_ps(four[i], four[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(four[i], four[i + 4], 0x31);
    }
}

#include "attention/attention_simd.inl.h"
#include "attention/attention_simd_backward.inl.h"

}  // namespace

AttentionKernel attention_avx2() {
    return simd_kernel();
}

}  // namespace meditok
