// AVX-512 VNNI: as vq_avx512.cpp, but one instruction multiplies and adds pairs of int16 (vpdpwssd) or four int8
// (vpdpbusd, which wants one side unsigned). Right because both are exact as long as the sum fits 32 bits, which
// vq_filter.h shows.

#include <immintrin.h>

#include "common/simd.h"
#include "vq/vq_cpu.h"

namespace meditok {

namespace {

#include "vq/vq_simd_avx512.inl.h"

struct Pairs {
    static MEDITOK_INLINE IVec first(IVec a, IVec b) { return _mm512_madd_epi16(a, b); }
    static MEDITOK_INLINE IVec add(IVec sum, IVec a, IVec b) { return _mm512_dpwssd_epi32(sum, a, b); }
};

struct Quads {  // of a row and unsigned codes
    static MEDITOK_INLINE IVec first(IVec x, IVec codes) { return add(_mm512_setzero_si512(), x, codes); }
    static MEDITOK_INLINE IVec add(IVec sum, IVec x, IVec codes) {
        return _mm512_dpbusd_epi32(sum, codes, x);
    }
};

#include "vq/vq_simd.inl.h"
#include "vq/vq_simd_integer.inl.h"
#include "vq/vq_simd_integer_int8.inl.h"

}  // namespace

FilterKernel filter_avx512vnni() {
    return FilterKernel{run_filter, run_integer<Pairs>, run_int8, kWidth, kRows};
}

}  // namespace meditok
