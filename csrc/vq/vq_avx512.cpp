// AVX-512 F, BW, DQ, VL: 16 floats or 32 int16 a vector; a register tile of 8 rows x 2 vectors uses 16 accumulators,
// 8 maxima and 2 codes of the 32 registers, and broadcasts from memory inside the multiply-add. Right because
// vq_filter.h's band holds every code that can be best. Machines without AVX-512 test it through SIMDe
// (tests/ops/simde).

#include <immintrin.h>

#include "common/simd.h"
#include "vq/vq_cpu.h"

namespace meditok {

namespace {

#include "vq/vq_simd_avx512.inl.h"

struct Pairs {
    static MEDITOK_INLINE IVec first(IVec a, IVec b) { return _mm512_madd_epi16(a, b); }
    static MEDITOK_INLINE IVec add(IVec sum, IVec a, IVec b) { return _mm512_add_epi32(sum, first(a, b)); }
};

#include "vq/vq_simd.inl.h"
#include "vq/vq_simd_integer.inl.h"

}  // namespace

FilterKernel filter_avx512() {
    return FilterKernel{run_filter, run_integer<Pairs>, nullptr, kWidth, kRows};
}

}  // namespace meditok
