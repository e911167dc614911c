// Dispatch, blocks and threads. The table is here and nowhere else; it is asked once a call, not once a block.

#include "common/isa.h"
#include "common/threads.h"
#include "template_op/template_op.h"

namespace meditok {

namespace {

using Kernel = void (*)(const TemplateParams& params, int64_t begin, int64_t end);

Kernel choose_kernel(const TemplateParams& params) {
    switch (current_isa()) {
#if defined(MEDITOK_HAVE_AVX2)
        case Isa::kAvx2:
        case Isa::kAvx512:  // a level without a file of its own takes the next lower one
        case Isa::kAvx512Vnni:
            if (params.stride == 1) return template_op_avx2;
            return template_op_scalar;
#endif
        default: return template_op_scalar;
    }
}

constexpr int64_t kBlock = 1 << 14;  // elements to an item: about 5 microseconds, enough to be worth a claim

}  // namespace

void template_op_cpu(const TemplateParams& params, int threads) {
    if (params.size == 0) return;
    const Kernel kernel = choose_kernel(params);
    const int64_t items = (params.size + kBlock - 1) / kBlock;
    parallel_for(items, threads, [&](int, int64_t item) {
        const int64_t begin = item * kBlock;
        kernel(params, begin, begin + kBlock < params.size ? begin + kBlock : params.size);
    });
}

}  // namespace meditok
