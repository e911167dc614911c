// AVX-512 for wide rows: 12 rows x 32 codes are 24 accumulators and 2 codes of the 32 registers, the rows broadcast
// from memory inside the multiply-add. Right because vq_filter.h's band holds every code that can be best. Machines
// without AVX-512 test it through SIMDe (tests/ops/simde).

#include <immintrin.h>

#include "common/simd.h"
#include "vq/vq_large_dim.h"

namespace meditok {

namespace {

#include "common/vector_avx512.inl.h"

constexpr int64_t kPanelRows = 12;
constexpr int64_t kDepth = 160;  // 20 KiB of codes and 8 KiB of rows in a first-level cache of 32 KiB

#include "vq/vq_large_dim.inl.h"

}  // namespace

LargeDimKernel large_dim_avx512() {
    return LargeDimKernel{product<float, float>, scan, kPanelRows, nullptr, nullptr, nullptr};
}

}  // namespace meditok
