// vq_assign on CPU: which kernel runs (the table below), how rows are cut into blocks, and what happens to
// the codes a kernel leaves in the band of the best one.

#include "vq/vq_cpu.h"

#include <cstring>
#include <memory>

#include "common/check.h"
#include "common/isa.h"
#include "common/threads.h"
#include "vq/vq_large_dim.h"

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
        default: return FilterKernel{nullptr, 1, 1};  // scalar: the canonical loop over all codes
    }
}

// ---- blocks -----------------------------------------------------------------------------------------------

constexpr int64_t kMaxChunks = 32;      // per codebook: a chunk's rescan costs about 1/32 of the row
constexpr int64_t kLaneFloats = 10240;  // scratch for chunk maxima: 40 KiB
constexpr int64_t kXFloats = 4096;      // scratch for the rows of a block: 16 KiB

struct Plan {
    FilterKernel kernel;
    PackedLayout layout;
    int64_t chunk_tiles, chunks, block_rows, blocks;
    size_t scratch_bytes;  // a participant
};

Plan make_plan(const AssignParams& params) {
    Plan plan;
    plan.kernel = choose_filter();
    plan.layout = packed_layout(params.codebook.groups, params.codebook.codes, params.codebook.width);
    const int64_t tiles = plan.layout.tiles > 0 ? plan.layout.tiles : 1;
    plan.chunk_tiles = (tiles + kMaxChunks - 1) / kMaxChunks;
    plan.chunks = (tiles + plan.chunk_tiles - 1) / plan.chunk_tiles;
    int64_t rows = kLaneFloats / (plan.chunks * plan.kernel.width);
    if (rows * params.codebook.width > kXFloats) rows = kXFloats / params.codebook.width;
    if (rows > kMaxBlockRows) rows = kMaxBlockRows;
    rows = rows / plan.kernel.row_tile * plan.kernel.row_tile;
    plan.block_rows = rows < plan.kernel.row_tile ? plan.kernel.row_tile : rows;
    plan.blocks = (params.rows + plan.block_rows - 1) / plan.block_rows;
    const size_t x_bytes =
        align_up(static_cast<size_t>(plan.block_rows * params.codebook.width) * sizeof(float));
    const size_t lane_bytes =
        align_up(static_cast<size_t>(plan.block_rows * plan.chunks * plan.kernel.width) * sizeof(float));
    const size_t double_bytes = align_up(static_cast<size_t>(params.codebook.width) * sizeof(double));
    plan.scratch_bytes = x_bytes + lane_bytes + double_bytes + align_up(kMaxChunks * sizeof(float));
    return plan;
}

// Row `row` of group `group` widened to float64.
void widen(const AssignParams& params, int64_t group, int64_t row, double* out) {
    for_dtype(params.x_type, [&](auto element) {
        using T = decltype(element);
        const T* x = static_cast<const T*>(params.x) + row * params.row_stride + group * params.group_stride;
        for (int64_t i = 0; i < params.codebook.width; ++i) out[i] = to_double(x[i * params.column_stride]);
    });
}

// One row inside the filter: the only candidate is taken as it is, from the second on all are scored.
struct Row {
    int64_t row;
    int64_t candidates;
    Best best;
};

struct Block {
    const AssignParams& params;
    int64_t group;
    PackedView view;
    double* wide;  // scratch: the row last widened
    int64_t wide_row;
    Row rows[kMaxBlockRows];

    double score(const Row& entry, int64_t code) {
        if (wide_row != entry.row) widen(params, group, entry.row, wide);
        wide_row = entry.row;
        return score_code(params.codebook, group, code, view.norm[code], params.metric, wide);
    }

    static void candidate(void* context, int64_t slot, int64_t code) {
        Block& block = *static_cast<Block*>(context);
        Row& entry = block.rows[slot];
        if (++entry.candidates == 1) {
            entry.best.code = code;
            return;
        }
        if (entry.candidates == 2) entry.best.score = block.score(entry, entry.best.code);
        entry.best.consider(block.score(entry, code), code);
    }
};

enum class Fate { kFilter, kCanonical, kDone };

// Decides what happens to a row and, for the filter, writes it as float32 with an upper bound of its norm.
Fate prepare(const AssignParams& params, const PackedView& view, const double* wide, float* x, float* x_norm,
             int64_t* id) {
    const int64_t width = params.codebook.width;
    double largest = 0.0, sum = 0.0;
    for (int64_t i = 0; i < width; ++i) {
        const double magnitude = wide[i] < 0 ? -wide[i] : wide[i];
        if (!is_finite(magnitude)) {
            *id = -1;
            return Fate::kDone;
        }
        largest = magnitude > largest ? magnitude : largest;
    }
    if (view.group->choosable == 0) {
        *id = -1;
        return Fate::kDone;
    }
    double scale = 1.0;
    if (params.metric == Metric::kCosine) {
        if (largest == 0.0) {  // every score is 0
            *id = view.group->first_choosable;
            return Fate::kDone;
        }
        if (!(largest < kLargestCosine && largest > kSmallestCosine)) return Fate::kCanonical;
        int exponent;
        frexp(largest, &exponent);
        scale = ldexp(1.0, -exponent);
    }
    if (view.group->unsafe > 0 || width > kLargestWidth) return Fate::kCanonical;
    for (int64_t i = 0; i < width; ++i) {
        const double value = wide[i] * scale;
        sum += value * value;
        x[i] = static_cast<float>(value);
    }
    const double norm = sqrt(sum);
    if (!(norm < kLargestL2)) return Fate::kCanonical;
    *x_norm = static_cast<float>(norm) * kRoundUp;
    return Fate::kFilter;
}

void assign_block(const AssignParams& params, const AssignHook& hook, const Plan& plan, int64_t group,
                  int64_t begin, int64_t end, unsigned char* scratch) {
    const int64_t width = params.codebook.width, groups = params.codebook.groups;
    const PackedView view = packed_view(params.packed, plan.layout, group);
    double* wide = reinterpret_cast<double*>(scratch);
    float* reach = reinterpret_cast<float*>(scratch + align_up(static_cast<size_t>(width) * sizeof(double)));
    float* x = reach + align_up(kMaxChunks * sizeof(float)) / sizeof(float);
    float* lanes = x + align_up(static_cast<size_t>(plan.block_rows * width) * sizeof(float)) / sizeof(float);
    float x_norm[kMaxBlockRows];
    Block block{params, group, view, wide, -1, {}};
    int64_t slots = 0;

    for (int64_t row = begin; row < end; ++row) {
        int64_t& id = params.ids[row * groups + group];
        if (hook.mask != nullptr && hook.mask[row * hook.mask_stride] == 0) {
            id = -1;
            continue;
        }
        widen(params, group, row, wide);
        Fate fate = Fate::kCanonical;
        if (plan.kernel.run != nullptr) {
            fate = prepare(params, view, wide, x + slots * width, x_norm + slots, &id);
        } else {
            bool finite = true;
            for (int64_t i = 0; i < width; ++i) finite = finite && is_finite(wide[i]);
            if (!finite) {
                id = -1;
                continue;
            }
        }
        if (fate == Fate::kCanonical) id = assign_row(params.codebook, group, view, params.metric, wide);
        if (fate == Fate::kFilter) block.rows[slots++] = Row{row, 0, Best{}};
    }
    if (slots == 0) return;

    const FilterBlock filter{x,
                             x_norm,
                             slots,
                             width,
                             view,
                             plan.layout.tiles,
                             plan.chunk_tiles,
                             plan.chunks,
                             make_bound(width),
                             params.metric,
                             lanes,
                             reach,
                             Block::candidate,
                             &block};
    plan.kernel.run(filter);
    for (int64_t slot = 0; slot < slots; ++slot) {
        params.ids[block.rows[slot].row * groups + group] = block.rows[slot].best.code;
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
    Plan plan = make_plan(params);
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
            assign_block(params, hook, plan, group, begin, end, base + participant * plan.scratch_bytes);
        }
        if (hook.after != nullptr) hook.after(hook.context, participant, group, begin, end);
    });
}

void vq_assign_cpu(const AssignParams& params, int threads) {
    assign_blocks(params, AssignHook{nullptr, 0, nullptr, nullptr}, threads);
}

}  // namespace meditok
