// Dispatch and threads: an item is a row of outputs.

#include "common/isa.h"
#include "common/memory.h"
#include "common/threads.h"
#include "depthwise/depthwise.h"

namespace meditok {

namespace {

using Kernel = void (*)(const DepthwiseParams& params, int64_t row);

Kernel choose_kernel() {
    switch (current_isa()) {
#if defined(MEDITOK_HAVE_AVX2)
        case Isa::kAvx2: return depthwise_avx2;
#endif
#if defined(MEDITOK_HAVE_AVX512)
        case Isa::kAvx512:
        case Isa::kAvx512Vnni: return depthwise_avx512;
#endif
        default: return depthwise_scalar;
    }
}

}  // namespace

void depthwise_cpu(const DepthwiseParams& params, int threads) {
    const Kernel kernel = choose_kernel();
    const int64_t pixels = reduced(params.height, params.stride) * reduced(params.width, params.stride);
    prefer_huge_pages(params.out, params.batch * pixels * params.channels * 4);
    parallel_for(params.batch * reduced(params.height, params.stride), threads,
                 [&](int, int64_t row) { kernel(params, row); });
}

}  // namespace meditok
