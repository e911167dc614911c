// AVX-512: 16 channels at once.

#include <immintrin.h>

#include "common/simd.h"
#include "depthwise/depthwise.h"

namespace meditok {

namespace {

#include "common/vector_avx512.inl.h"
//
#include "common/vector_math.inl.h"
#include "depthwise/depthwise_simd.inl.h"

}  // namespace

void depthwise_avx512(const DepthwiseParams& params, int64_t row) {
    convolve_row(params, row);
}

}  // namespace meditok
