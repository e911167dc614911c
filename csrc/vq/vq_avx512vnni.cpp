// AVX-512 VNNI: as vq_avx512.cpp, but vpdpwssd multiplies and adds pairs of int16 in one instruction. Right because
// that instruction is exact as long as the sum fits 32 bits, which vq_filter.h shows.

#include <immintrin.h>

#include "common/simd.h"
#include "vq/vq_cpu.h"

namespace meditok {

namespace {

#include "vq/vq_simd_avx512.inl.h"

MEDITOK_INLINE IVec add_dot_pairs(IVec sum, IVec a, IVec b) {
    return _mm512_dpwssd_epi32(sum, a, b);
}

#include "vq/vq_simd.inl.h"
#include "vq/vq_simd_int16.inl.h"

}  // namespace

FilterKernel filter_avx512vnni() {
    return FilterKernel{run_filter, run_int16, kWidth, kRows};
}

}  // namespace meditok
