// AVX2: 6 rows by 16 columns take 12 of 16 registers.

#include <immintrin.h>

#include "common/simd.h"
#include "linear/linear.h"

namespace meditok {

namespace {

#include "common/vector_avx2.inl.h"
//
#include "common/vector_math.inl.h"

constexpr int64_t kTileRows = 6;

#include "linear/linear_rows.inl.h"
//
#include "linear/linear_simd.inl.h"

}  // namespace

LinearKernel linear_avx2() {
    return {kTileRows, sizeof(float), spare_bytes, prepare_tile, run_panels};
}

}  // namespace meditok
