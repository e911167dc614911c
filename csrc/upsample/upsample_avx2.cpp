// AVX2: 8 channels at once.

#include <immintrin.h>

#include "common/simd.h"
#include "upsample/upsample.h"

namespace meditok {

namespace {

#include "common/vector_avx2.inl.h"
//
#include "common/vector_math.inl.h"
#include "upsample/upsample_simd.inl.h"

}  // namespace

UpsampleKernel upsample_avx2() {
    return {subtract, pixel};
}

}  // namespace meditok
