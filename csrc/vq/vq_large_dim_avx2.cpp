// AVX2 + FMA for wide rows: 3 rows x 32 codes are 12 accumulators, 3 broadcasts and 1 code of the 16 registers, 7
// loads for 12 multiply-adds. Right because vq_filter.h's band holds every code that can be best.

#include <immintrin.h>

#include "common/simd.h"
#include "vq/vq_large_dim.h"

namespace meditok {

namespace {

#include "common/vector_avx2.inl.h"

constexpr int64_t kPanelRows = 3;
constexpr int64_t kDepth = 192;  // 24 KiB of codes and 2 KiB of rows in a first-level cache of 32 KiB

#include "vq/vq_large_dim.inl.h"

}  // namespace

LargeDimKernel large_dim_avx2() {
    return LargeDimKernel{product<float, float>, scan, kPanelRows, nullptr, nullptr, nullptr};
}

}  // namespace meditok
