// vq_assign on CPU: which kernel runs (the table below), and who does which block of rows.

#include "vq/vq_cpu.h"

#include <cstring>
#include <memory>

#include "common/check.h"
#include "common/isa.h"
#include "common/threads.h"
#include "vq/vq_large_dim.h"
#include "vq/vq_small_dim.h"

namespace meditok {

namespace {

// ---- the dispatch table -----------------------------------------------------------------------------------

FilterKernel choose_filter() {
    switch (current_isa()) {
#if defined(MEDITOK_HAVE_AVX2)
        case Isa::kAvx2: return filter_avx2();
#endif
#if defined(MEDITOK_HAVE_AVX512)
        case Isa::kAvx512: return filter_avx512();
#endif
#if defined(MEDITOK_HAVE_AVX512VNNI)
        case Isa::kAvx512Vnni: return filter_avx512vnni();
#endif
#if defined(MEDITOK_HAVE_NEON)
        case Isa::kNeon: return filter_neon();
#endif
        default:
            return FilterKernel{nullptr, nullptr, nullptr, 1,
                                1};  // scalar: the canonical loop over all codes
    }
}

}  // namespace

void assign_blocks(const AssignParams& params, const AssignHook& hook, int threads) {
    const Codebook& codebook = params.codebook;
    PackedHeader header;
    std::memcpy(&header, params.packed, sizeof header);
    require(header.magic == kPackedMagic && header.metric == static_cast<int64_t>(params.metric) &&
                header.groups == codebook.groups && header.codes == codebook.codes &&
                header.width == codebook.width,
            "the packed codebook was made from another codebook or metric; pack it again");
    if (params.rows == 0 || codebook.groups == 0) return;
    if (assign_large_dim(params, hook, threads)) return;
    const Plan plan = make_plan(params, choose_filter());
    const int64_t items = plan.blocks * codebook.groups;
    // Under about 50 microseconds of work, waking threads costs more than it gains.
    const double work =
        static_cast<double>(params.rows) * codebook.groups * codebook.codes * (codebook.width + 1);
    const int workers = work < 2e6 ? 1 : participants(items, threads);
    std::unique_ptr<unsigned char[]> scratch(new unsigned char[workers * plan.scratch_bytes + kAlignment]);
    const size_t misalignment = reinterpret_cast<uintptr_t>(scratch.get()) % kAlignment;
    unsigned char* base = scratch.get() + (kAlignment - misalignment) % kAlignment;
    parallel_for(items, workers, [&](int participant, int64_t item) {
        const int64_t group = item / plan.blocks, begin = item % plan.blocks * plan.block_rows;
        const int64_t end = begin + plan.block_rows < params.rows ? begin + plan.block_rows : params.rows;
        if (codebook.codes == 0) {
            for (int64_t row = begin; row < end; ++row) params.ids[row * codebook.groups + group] = -1;
        } else {
            BlockSearch(params, hook, plan, group, base + participant * plan.scratch_bytes).run(begin, end);
        }
        if (hook.after != nullptr) hook.after(hook.context, participant, group, begin, end);
    });
}

bool reads_int8() {
    return choose_filter().run_int8 != nullptr;
}

void vq_assign_cpu(const AssignParams& params, int threads) {
    assign_blocks(params, AssignHook{nullptr, 0, nullptr, nullptr}, threads);
}

}  // namespace meditok
