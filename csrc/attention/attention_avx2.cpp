// AVX2 and F16C: 8 floats a vector; a register tile of 6 rows x 2 vectors uses 12 accumulators, 2 loads and 1 broadcast of
// the 16 registers.

#include <immintrin.h>

#include "attention/attention_cpu.h"
#include "common/simd.h"

namespace meditok {

namespace {

#include "attention/attention_x86.inl.h"
#include "common/vector_avx2.inl.h"

constexpr int kRows = 6;

template <class T>
MEDITOK_INLINE Vec load_as(const T* p) {
    return load_eight(p);
}
template <class T>
MEDITOK_INLINE void store_as(T* p, Vec v) {
    store_eight(p, v);
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

#include "attention/attention_blocks.inl.h"
//
#include "attention/attention_simd.inl.h"
#include "attention/attention_simd_backward.inl.h"

}  // namespace

AttentionKernel attention_avx2() {
    return simd_kernel();
}

}  // namespace meditok
