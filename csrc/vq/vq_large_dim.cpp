// vq_assign on CPU for more than kSmallWidth columns: a blocked matrix product whose scores live for one block of
// rows and 128 codes only. From each block of scores every row keeps the codes that can still be the best; in the
// end they, if more than one, get their canonical score, in rising order, the first best winning. No array of
// rows x codes exists. The bounds that decide are those of vq_filter.h: of the int16 filter where there is one, and of
// the float32 filter for the rows that are not for it or of which it leaves too many codes.

#include "vq/vq_large_dim.h"

#include <cmath>
#include <cstring>
#include <memory>

#include "common/isa.h"
#include "common/threads.h"
#include "vq/vq_large_dim_rows.h"
#include "vq/vq_train_cpu.h"

namespace meditok {

namespace {

LargeDimKernel choose_kernel() {
    switch (current_isa()) {
#if defined(MEDITOK_HAVE_AVX2)
        case Isa::kAvx2: return large_dim_avx2();
#endif
#if defined(MEDITOK_HAVE_AVX512)
        case Isa::kAvx512: return large_dim_avx512();
#endif
#if defined(MEDITOK_HAVE_AVX512VNNI)
        case Isa::kAvx512Vnni: return large_dim_avx512vnni();
#endif
#if defined(MEDITOK_HAVE_NEON)
        case Isa::kNeon: return large_dim_neon();
#endif
        default: return LargeDimKernel{nullptr, nullptr, 1, nullptr, nullptr, nullptr};
    }
}

constexpr int64_t kXFloats = 65536;  // rows of a block: 256 KiB, half of a second-level cache
constexpr int64_t kFewestRows = 24;  // but enough to pay for reading the codes
const int32_t kNoBias[kBlockTiles * kTileCodes] = {};

class LargeDim {
  public:
    LargeDim(const AssignParams& params, const AssignHook& hook, const LargeDimKernel& kernel)
        : params_(params),
          hook_(hook),
          kernel_(kernel),
          rows_(train_kernels()),
          codebook_(params.codebook),
          layout_(packed_layout(codebook_.groups, codebook_.codes, codebook_.width)) {
        const auto fitting = [&](int64_t words) {
            int64_t rows = kXFloats / words;
            rows = rows < kFewestRows ? kFewestRows : rows > kMaxBlockRows ? kMaxBlockRows : rows;
            return rows / kernel.panel_rows * kernel.panel_rows;
        };
        // An odd number of cache lines, so that the rows of a panel do not fall into the same set of the cache.
        const auto lines = [](int64_t words) { return ((words + 15) / 16 | 1) * 16; };
        int16_ = kernel.int16_product != nullptr && codebook_.width <= kInt16Widest;
        pairs_ = int16_pairs(codebook_.width, params.metric);
        float_rows_ = fitting(codebook_.width);
        block_rows_ = int16_ ? fitting(pairs_) : float_rows_;
        x_stride_ = lines(codebook_.width);
        pair_stride_ = lines(pairs_);
        const int64_t float_words = float_rows_ * x_stride_,
                      int16_words = int16_ ? block_rows_ * pair_stride_ : 0;
        const int64_t words = float_words > int16_words ? float_words : int16_words;
        x_bytes_ = align_up(static_cast<size_t>(words) * sizeof(float));
        score_bytes_ = align_up(static_cast<size_t>(block_rows_ * kBlockTiles * kTileCodes) * sizeof(float));
        wide_bytes_ = align_up(static_cast<size_t>(codebook_.width) * sizeof(double));
        const size_t row_bytes = align_up(static_cast<size_t>(x_stride_) * sizeof(float));
        scratch_bytes_ = x_bytes_ + score_bytes_ + wide_bytes_ + row_bytes;
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
    // Writes a row for the float32 filter; leaves it widened where the filter is not to see it.
    Fate prepare(LargeDimBlock& block, int64_t row, float* out) const {
        const int64_t width = codebook_.width;
        const float* x = block.plain_row(row);
        if (x != nullptr) {
            const double square = rows_.single.square(x, width);
            if (square > kLeastSquare && square < kMostSquare) {
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

    // Writes a row for the int16 filter; false where it is not for it. `copy` is scratch for a row of floats.
    bool prepare_int16(LargeDimBlock& block, int64_t row, float* copy, int16_t* out) const {
        const int64_t width = codebook_.width;
        const double last = block.view.group->last_column, longest = kInt16LongestX * last;
        const float* x = block.plain_row(row);
        if (x == nullptr) {
            block.widen(row);
            for (int64_t i = 0; i < width; ++i) copy[i] = static_cast<float>(block.wide[i]);
            x = copy;
        }
        const double square = rows_.single.square(x, width);
        if (!(square > kLeastSquare && square < kMostSquare)) return false;  // NaN is neither
        const bool cosine = params_.metric == Metric::kCosine;
        if (!cosine && square > longest * longest) return false;
        const double scale = kInt16Length / std::sqrt(square + last * last);
        out[pairs_ * 2 - 1] = 0;  // the column after an odd number of them
        kernel_.round(x, static_cast<float>(scale), width, out);
        if (!cosine) out[width] = round_to_int16(last * scale);
        return true;
    }

    void assign(int64_t group, int64_t begin, int64_t end, unsigned char* scratch) const {
        const PackedView view = packed_view(params_.packed, layout_, group);
        double* wide = reinterpret_cast<double*>(scratch + x_bytes_ + score_bytes_);
        float* copy = reinterpret_cast<float*>(scratch + x_bytes_ + score_bytes_ + wide_bytes_);
        int16_t* x = reinterpret_cast<int16_t*>(scratch);
        LargeDimBlock block{params_, rows_.single, group, view, wide, -1, 0, {}, {}, {}, {}, {}};
        int64_t left[kMaxBlockRows], left_count = 0;  // for the float32 filter
        const bool int16 = int16_ && view.group->int16_codes > 0;
        for (int64_t row = begin; row < end; ++row) {
            params_.ids[row * codebook_.groups + group] = -1;
            if (hook_.mask != nullptr && hook_.mask[row * hook_.mask_stride] == 0) continue;
            if (int16 && prepare_int16(block, row, copy, x + block.slots * pair_stride_ * 2)) {
                block.add(row);
            } else {
                left[left_count++] = row;
            }
        }
        if (block.slots > 0) run_int16(block, x, scratch + x_bytes_);
        for (int64_t slot = 0; slot < block.slots; ++slot) {
            const int64_t row = block.row[slot];
            if (block.held[slot].crowded) {
                left[left_count++] = row;
            } else {
                const double limit = static_cast<double>(block.int16_lower[slot]);
                params_.ids[row * codebook_.groups + group] = block.winner(slot, limit);
            }
        }
        for (int64_t first = 0; first < left_count; first += float_rows_) {
            const int64_t count = left_count - first < float_rows_ ? left_count - first : float_rows_;
            run_float(block, left + first, count, scratch);
        }
    }

    // Zeros after the rows that do not fill the last panel; returns the number of panels.
    template <class Word>
    int64_t fill_panels(Word* x, int64_t slots, int64_t stride) const {
        const int64_t panels = (slots + kernel_.panel_rows - 1) / kernel_.panel_rows;
        std::memset(static_cast<void*>(x + slots * stride), 0,
                    static_cast<size_t>((panels * kernel_.panel_rows - slots) * stride) * sizeof(Word));
        return panels;
    }

    void run_int16(LargeDimBlock& block, int16_t* x, unsigned char* scratch) const {
        int32_t* scores = reinterpret_cast<int32_t*>(scratch);
        const int64_t panels = fill_panels(x, block.slots, pair_stride_ * 2);
        const int64_t codes = block.view.group->int16_codes, all = (codes + kTileCodes - 1) / kTileCodes;
        const int32_t band = int16_band(codebook_.width + (params_.metric == Metric::kL2 ? 1 : 0));
        for (int64_t tile = 0; tile < all; tile += kBlockTiles) {
            const int64_t tiles = tile + kBlockTiles < all ? kBlockTiles : all - tile;
            kernel_.int16_product(
                {reinterpret_cast<const Int16Pair*>(x), pair_stride_, panels, pairs_,
                 reinterpret_cast<const Int16Pair*>(block.view.int16) + tile * pairs_ * kTileCodes, kNoBias,
                 tiles, scores});
            kernel_.int16_scan({scores, block.slots, tiles, tile * kTileCodes, codes, band, block.int16_lower,
                                LargeDimBlock::int16_candidate, &block});
        }
    }

    void run_float(LargeDimBlock& block, const int64_t* rows, int64_t count, unsigned char* scratch) const {
        const int64_t width = codebook_.width;
        const PackedView& view = block.view;
        float* x = reinterpret_cast<float*>(scratch);
        float* scores = reinterpret_cast<float*>(scratch + x_bytes_);
        block.slots = 0;
        for (int64_t i = 0; i < count; ++i) {
            const Fate fate = prepare(block, rows[i], x + block.slots * x_stride_);
            int64_t& id = params_.ids[rows[i] * codebook_.groups + block.group];
            if (fate.kind == Fate::kKnown) id = fate.id;
            if (fate.kind == Fate::kCanonical)
                id = assign_row(codebook_, block.group, view, params_.metric, block.wide);
            if (fate.kind != Fate::kFilter) continue;
            block.x_norm[block.slots] = static_cast<float>(fate.norm) * kRoundUp;
            block.add(rows[i]);
        }
        if (block.slots == 0) return;
        const int64_t panels = fill_panels(x, block.slots, x_stride_);
        for (int64_t tile = 0; tile < layout_.tiles; tile += kBlockTiles) {
            const int64_t tiles = tile + kBlockTiles < layout_.tiles ? kBlockTiles : layout_.tiles - tile;
            kernel_.product({x, x_stride_, panels, width, view.tiles + tile * width * kTileCodes,
                             view.bias + tile * kTileCodes, tiles, scores});
            kernel_.scan({scores, block.slots, tiles, tile * kTileCodes, block.x_norm,
                          view.radius + tile * kTileCodes, view.reach + tile, make_bound(width), block.lower,
                          LargeDimBlock::candidate, &block});
        }
        for (int64_t slot = 0; slot < block.slots; ++slot) {
            params_.ids[block.row[slot] * codebook_.groups + block.group] =
                block.winner(slot, static_cast<double>(block.lower[slot]));
        }
    }

    // Squares of a row that float32 can hold; the rest is rare and takes its time.
    static constexpr double kLeastSquare = 1e-36, kMostSquare = 1e36;

    const AssignParams& params_;
    const AssignHook& hook_;
    const LargeDimKernel kernel_;
    const TrainKernels rows_;
    const Codebook& codebook_;
    const PackedLayout layout_;
    bool int16_;
    int64_t pairs_, float_rows_, block_rows_;  // rows in either filter at once, and in a block
    int64_t x_stride_, pair_stride_;
    size_t x_bytes_, score_bytes_, wide_bytes_, scratch_bytes_;
};

}  // namespace

bool reads_wide_int16() {
    return choose_kernel().int16_product != nullptr;
}

bool assign_large_dim(const AssignParams& params, const AssignHook& hook, int threads) {
    const LargeDimKernel kernel = choose_kernel();
    if (kernel.product == nullptr || params.codebook.width <= kSmallWidth || params.codebook.codes == 0)
        return false;
    LargeDim(params, hook, kernel).run(threads);
    return true;
}

}  // namespace meditok
