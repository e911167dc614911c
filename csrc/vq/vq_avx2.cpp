// AVX2 + FMA: 8 floats a vector; a register tile of 6 rows x 2 vectors uses 12 accumulators, 2 codes and 1
// broadcast of the 16 registers. vpmaddwd does 16 multiply-adds of 16 bits, and its additions do not compete with
// the multiplier, so the int16 filter takes half the time. Right because vq_filter.h's band holds every code that can
// be best.

#include <immintrin.h>

#include "common/simd.h"
#include "vq/vq_cpu.h"

namespace meditok {

namespace {

#include "common/vector_avx2.inl.h"

constexpr int kRows = 6;

using IVec = __m256i;
constexpr int kRegisters = 16;

MEDITOK_INLINE IVec load_int(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
MEDITOK_INLINE void store_int(int32_t* p, IVec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
}
MEDITOK_INLINE IVec fill_int(int32_t a) {
    return _mm256_set1_epi32(a);
}
MEDITOK_INLINE IVec max_int(IVec a, IVec b) {
    return _mm256_max_epi32(a, b);
}
MEDITOK_INLINE uint32_t above(IVec a, IVec b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b))));
}
MEDITOK_INLINE int32_t largest_int(IVec a) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}

struct Pairs {
    static MEDITOK_INLINE IVec first(IVec a, IVec b) { return _mm256_madd_epi16(a, b); }
    static MEDITOK_INLINE IVec add(IVec sum, IVec a, IVec b) { return _mm256_add_epi32(sum, first(a, b)); }
};

#include "vq/vq_simd.inl.h"
#include "vq/vq_simd_integer.inl.h"

}  // namespace

FilterKernel filter_avx2() {
    return FilterKernel{run_filter, run_integer<Pairs>, nullptr, kWidth, kRows};
}

}  // namespace meditok
