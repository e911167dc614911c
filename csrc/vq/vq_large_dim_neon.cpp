// NEON for wide rows: 3 rows x 32 codes are 24 accumulators, 3 broadcasts and 1 code of the 32 registers. Right
// because vq_filter.h's band holds every code that can be best.

#include <arm_neon.h>

#include "common/simd.h"
#include "vq/vq_large_dim.h"

namespace meditok {

namespace {

#include "common/vector_neon.inl.h"

constexpr int64_t kPanelRows = 3;
constexpr int64_t kDepth = 192;  // 24 KiB of codes and 2 KiB of rows in a first-level cache of 32 KiB

#include "vq/vq_large_dim.inl.h"

}  // namespace

LargeDimKernel large_dim_neon() {
    return LargeDimKernel{product<float, float>, scan, kPanelRows, nullptr, nullptr, nullptr};
}

}  // namespace meditok
