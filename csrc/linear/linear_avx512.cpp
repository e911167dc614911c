// AVX-512: 14 rows by 32 columns take 28 of 32 registers.

#include <immintrin.h>

#include "common/simd.h"
#include "linear/linear.h"

namespace meditok {

namespace {

#include "common/vector_avx512.inl.h"
//
#include "common/vector_math.inl.h"

constexpr int64_t kTileRows = 14;

#include "linear/linear_rows.inl.h"
//
#include "linear/linear_simd.inl.h"

}  // namespace

LinearKernel linear_avx512() {
    return {kTileRows, sizeof(float), spare_bytes, prepare_tile, run_panels};
}

}  // namespace meditok
