// vq_assign on CPU for more than kSmallWidth columns: a blocked matrix product whose scores live for one block of
// rows and 128 codes only. From each block of scores every row keeps the codes that can still be the best; in the
// end they, if more than one, get their canonical score, in rising order, the first best winning. No array of
// rows x codes exists. The bound that decides is that of vq_filter.h.

#include "vq/vq_large_dim.h"

#include <cmath>
#include <cstring>
#include <memory>

#include "common/isa.h"
#include "common/threads.h"
#include "vq/vq_train_cpu.h"

namespace meditok {

namespace {

LargeDimKernel choose_kernel() {
    switch (current_isa()) {
#if defined(MEDITOK_HAVE_AVX2)
        case Isa::kAvx2: return large_dim_avx2();
#endif
#if defined(MEDITOK_HAVE_AVX512)
        case Isa::kAvx512:
        case Isa::kAvx512Vnni: return large_dim_avx512();
#endif
#if defined(MEDITOK_HAVE_NEON)
        case Isa::kNeon: return large_dim_neon();
#endif
        default: return LargeDimKernel{nullptr, nullptr, 1};
    }
}

// What becomes of a row: its id is known already, the canonical loop finds it, or the filter does.
struct Fate {
    enum Kind { kKnown, kCanonical, kFilter } kind;
    int64_t id;
    double scale;  // the filter sees x * scale, a power of two
    double norm;   // of that
};

// From a sum of squares in float64; where it over- or underflows, the canonical loop decides.
Fate row_fate(const double* x, double square, int64_t width, const PackedView& view, Metric metric) {
    const Fate nowhere{Fate::kKnown, -1, 1.0, 0.0}, canonical{Fate::kCanonical, -1, 1.0, 0.0};
    if (view.group->choosable == 0) return nowhere;
    if (!is_finite(square)) {
        for (int64_t i = 0; i < width; ++i) {
            if (!is_finite(x[i])) return nowhere;
        }
        return canonical;
    }
    if (view.group->unsafe > 0 || width > kLargestWidth) return canonical;
    const double norm = std::sqrt(square);
    if (metric == Metric::kL2) return norm < kLargestL2 ? Fate{Fate::kFilter, -1, 1.0, norm} : canonical;
    if (!(norm > kSmallestCosine && norm < kLargestCosine)) {
        for (int64_t i = 0; i < width; ++i) {
            if (x[i] != 0.0) return canonical;
        }
        return {Fate::kKnown, view.group->first_choosable, 1.0, 0.0};  // every score is 0
    }
    int exponent;
    std::frexp(norm, &exponent);
    const double scale = std::ldexp(1.0, -exponent);
    return {Fate::kFilter, -1, scale, norm * scale};
}

constexpr int64_t kXFloats = 65536;  // rows of a block: 256 KiB, half of a second-level cache
constexpr int64_t kFewestRows = 24;  // but enough to pay for reading the codes
constexpr int kMostHeld = 8;

// Codes of one row that may be best. When there is no room for another, those held are scored.
struct Held {
    int count;
    int32_t code[kMostHeld];
    float upper[kMostHeld];
    bool scored;  // `best` holds the best of the codes scored so far
    Best best;
};

struct Block {
    const AssignParams& params;
    int64_t group;
    PackedView view;
    double* wide;  // scratch: the row last widened
    int64_t wide_row;
    int64_t row[kMaxBlockRows];
    float x_norm[kMaxBlockRows], lower[kMaxBlockRows];
    Held held[kMaxBlockRows];

    void widen(int64_t wanted) {
        if (wide_row == wanted) return;
        wide_row = wanted;
        for_dtype(params.x_type, [&](auto element) {
            using T = decltype(element);
            const T* x =
                static_cast<const T*>(params.x) + wanted * params.row_stride + group * params.group_stride;
            for (int64_t i = 0; i < params.codebook.width; ++i)
                wide[i] = to_double(x[i * params.column_stride]);
        });
    }

    // Drops codes that cannot be best any more.
    void prune(Held& entry, float limit) {
        int kept = 0;
        for (int i = 0; i < entry.count; ++i) {
            if (!(entry.upper[i] >= limit)) continue;
            entry.code[kept] = entry.code[i];
            entry.upper[kept++] = entry.upper[i];
        }
        entry.count = kept;
    }

    void score(Held& entry, int64_t slot) {
        widen(row[slot]);
        for (int i = 0; i < entry.count; ++i) {
            const int64_t code = entry.code[i];
            entry.best.consider(
                score_code(params.codebook, group, code, view.norm[code], params.metric, wide), code);
        }
        entry.scored = true;
        entry.count = 0;
    }

    static void candidate(void* context, int64_t slot, int64_t code, float upper) {
        Block& block = *static_cast<Block*>(context);
        Held& entry = block.held[slot];
        if (entry.count == kMostHeld) block.prune(entry, block.lower[slot]);
        if (entry.count == kMostHeld) block.score(entry, slot);
        entry.code[entry.count] = static_cast<int32_t>(code);
        entry.upper[entry.count++] = upper;
    }

    int64_t winner(int64_t slot) {
        Held& entry = held[slot];
        prune(entry, lower[slot]);
        if (entry.count == 1 && !entry.scored) return entry.code[0];
        score(entry, slot);
        return entry.best.code;
    }
};

class LargeDim {
  public:
    LargeDim(const AssignParams& params, const AssignHook& hook, const LargeDimKernel& kernel)
        : params_(params),
          hook_(hook),
          kernel_(kernel),
          rows_(train_kernels()),
          codebook_(params.codebook),
          layout_(packed_layout(codebook_.groups, codebook_.codes, codebook_.width)) {
        int64_t rows = kXFloats / codebook_.width;
        rows = rows < kFewestRows ? kFewestRows : rows > kMaxBlockRows ? kMaxBlockRows : rows;
        block_rows_ = rows / kernel.panel_rows * kernel.panel_rows;
        // An odd number of cache lines, so that the rows of a panel do not fall into the same set of the cache.
        x_stride_ = ((codebook_.width + 15) / 16 | 1) * 16;
        x_bytes_ = align_up(static_cast<size_t>(block_rows_ * x_stride_) * sizeof(float));
        score_bytes_ = align_up(static_cast<size_t>(block_rows_ * kBlockTiles * kTileCodes) * sizeof(float));
        scratch_bytes_ =
            x_bytes_ + score_bytes_ + align_up(static_cast<size_t>(codebook_.width) * sizeof(double));
    }

    void run(int threads) {
        const int64_t blocks = (params_.rows + block_rows_ - 1) / block_rows_,
                      items = blocks * codebook_.groups;
        // Under about 50 microseconds of work, waking threads costs more than it gains.
        const double work =
            static_cast<double>(params_.rows) * codebook_.groups * codebook_.codes * codebook_.width;
        const int workers = work < 2e6 ? 1 : participants(items, threads);
        const std::unique_ptr<unsigned char[]> scratch(
            new unsigned char[workers * scratch_bytes_ + kAlignment]);
        unsigned char* base =
            scratch.get() +
            (kAlignment - reinterpret_cast<uintptr_t>(scratch.get()) % kAlignment) % kAlignment;
        parallel_for(items, workers, [&](int participant, int64_t item) {
            const int64_t group = item / blocks, begin = item % blocks * block_rows_;
            const int64_t end = begin + block_rows_ < params_.rows ? begin + block_rows_ : params_.rows;
            assign(group, begin, end, base + participant * scratch_bytes_);
            if (hook_.after != nullptr) hook_.after(hook_.context, participant, group, begin, end);
        });
    }

  private:
    // Writes a row for the filter; leaves it widened where the filter is not to see it.
    Fate prepare(Block& block, int64_t row, float* out) const {
        const int64_t width = codebook_.width;
        if (params_.x_type == Dtype::kFloat32 && params_.column_stride == 1) {
            const float* x = static_cast<const float*>(params_.x) + row * params_.row_stride +
                             block.group * params_.group_stride;
            const double square = rows_.single.square(x, width);
            if (square > 1e-36 && square < 1e36) {  // the rest is rare and takes its time
                const Fate fate = row_fate(block.wide, square, width, block.view, params_.metric);
                if (fate.kind == Fate::kFilter) {
                    const float scale = static_cast<float>(fate.scale);
                    for (int64_t i = 0; i < width; ++i) out[i] = x[i] * scale;
                    return fate;
                }
            }
        }
        block.widen(row);
        const Fate fate =
            row_fate(block.wide, rows_.wide.square(block.wide, width), width, block.view, params_.metric);
        for (int64_t i = 0; i < width; ++i) out[i] = static_cast<float>(block.wide[i] * fate.scale);
        return fate;
    }

    void assign(int64_t group, int64_t begin, int64_t end, unsigned char* scratch) const {
        const int64_t width = codebook_.width, groups = codebook_.groups, panel = kernel_.panel_rows;
        float* x = reinterpret_cast<float*>(scratch);
        float* scores = reinterpret_cast<float*>(scratch + x_bytes_);
        double* wide = reinterpret_cast<double*>(scratch + x_bytes_ + score_bytes_);
        const PackedView view = packed_view(params_.packed, layout_, group);
        Block block{params_, group, view, wide, -1, {}, {}, {}, {}};
        int64_t slots = 0;
        for (int64_t row = begin; row < end; ++row) {
            int64_t& id = params_.ids[row * groups + group];
            id = -1;
            if (hook_.mask != nullptr && hook_.mask[row * hook_.mask_stride] == 0) continue;
            float* out = x + slots * x_stride_;
            const Fate fate = prepare(block, row, out);
            if (fate.kind == Fate::kKnown) id = fate.id;
            if (fate.kind == Fate::kCanonical) id = assign_row(codebook_, group, view, params_.metric, wide);
            if (fate.kind != Fate::kFilter) continue;
            block.x_norm[slots] = static_cast<float>(fate.norm) * kRoundUp;
            block.lower[slots] = -__builtin_inff();
            block.held[slots] = Held{0, {}, {}, false, Best{}};
            block.row[slots++] = row;
        }
        if (slots == 0) return;
        const int64_t panels = (slots + panel - 1) / panel;
        std::memset(x + slots * x_stride_, 0,
                    static_cast<size_t>((panels * panel - slots) * x_stride_) * sizeof(float));
        for (int64_t tile = 0; tile < layout_.tiles; tile += kBlockTiles) {
            const int64_t tiles = tile + kBlockTiles < layout_.tiles ? kBlockTiles : layout_.tiles - tile;
            kernel_.product({x, x_stride_, panels, width, view.tiles + tile * width * kTileCodes,
                             view.bias + tile * kTileCodes, tiles, scores});
            kernel_.scan({scores, slots, tiles, tile * kTileCodes, block.x_norm,
                          view.radius + tile * kTileCodes, view.reach + tile, make_bound(width), block.lower,
                          Block::candidate, &block});
        }
        for (int64_t slot = 0; slot < slots; ++slot)
            params_.ids[block.row[slot] * groups + group] = block.winner(slot);
    }

    const AssignParams& params_;
    const AssignHook& hook_;
    const LargeDimKernel kernel_;
    const TrainKernels rows_;
    const Codebook& codebook_;
    const PackedLayout layout_;
    int64_t block_rows_, x_stride_;
    size_t x_bytes_, score_bytes_, scratch_bytes_;
};

}  // namespace

bool assign_large_dim(const AssignParams& params, const AssignHook& hook, int threads) {
    const LargeDimKernel kernel = choose_kernel();
    if (kernel.product == nullptr || params.codebook.width <= kSmallWidth || params.codebook.codes == 0)
        return false;
    LargeDim(params, hook, kernel).run(threads);
    return true;
}

}  // namespace meditok
