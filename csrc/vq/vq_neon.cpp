// NEON of 64-bit Arm: 4 floats a vector; a register tile of 8 rows x 2 vectors uses 16 accumulators, 8 maxima, 2 codes
// and 1 broadcast of the 32 registers. Right because vq_filter.h's band holds every code that can be best. No int16
// kernel: pairs of columns would cost as much as the float multiply-adds they replace.

#include <arm_neon.h>

#include "common/simd.h"
#include "vq/vq_cpu.h"

namespace meditok {

namespace {

#include "common/vector_neon.inl.h"

constexpr int kRows = 8;

#include "vq/vq_simd.inl.h"

}  // namespace

FilterKernel filter_neon() {
    return FilterKernel{run_filter, nullptr, nullptr, kWidth, kRows};
}

}  // namespace meditok
