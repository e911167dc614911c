// vq_assign on CPU: which kernel runs (the table below), how rows are cut into blocks, and what happens to
// the codes a kernel leaves in the band of the best one.

#include "vq/vq_cpu.h"

#include <cmath>
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
#if defined(MEDITOK_HAVE_AVX512VNNI)
        case Isa::kAvx512Vnni: return filter_avx512vnni();
#endif
#if defined(MEDITOK_HAVE_NEON)
        case Isa::kNeon: return filter_neon();
#endif
        default: return FilterKernel{nullptr, nullptr, 1, 1};  // scalar: the canonical loop over all codes
    }
}

// ---- blocks -----------------------------------------------------------------------------------------------

constexpr int64_t kLaneWords = 10240;  // scratch for chunk maxima: 40 KiB
constexpr int64_t kXFloats = 4096;     // scratch for the rows of a block: 16 KiB

struct Chunks {
    int64_t tiles, count;
};

Chunks int16_chunks(int64_t tiles) {
    int64_t chunk = (tiles + kInt16Chunks - 1) / kInt16Chunks;
    chunk = chunk < kInt16ChunkTiles ? kInt16ChunkTiles : chunk;
    return {chunk, (tiles + chunk - 1) / chunk};
}

struct Plan {
    FilterKernel kernel;
    PackedLayout layout;
    int64_t chunk_tiles, chunks, float_rows;  // of the float32 filter, which takes so many rows at once
    int64_t block_rows, blocks;
    bool int16;  // whether codebooks of this width have an int16 part and the kernel reads it
    // A participant's scratch: one row in float64, the largest radius of each chunk, rows, rows in 16 bits, maxima.
    size_t reach_at, x_at, x16_at, lanes_at, scratch_bytes;
};

Plan make_plan(const AssignParams& params) {
    const int64_t width = params.codebook.width;
    Plan plan;
    plan.kernel = choose_filter();
    plan.layout = packed_layout(params.codebook.groups, params.codebook.codes, width);
    plan.int16 = plan.kernel.run_int16 != nullptr && width >= kInt16Narrowest && width <= kInt16Widest;
    const int64_t tiles = plan.layout.tiles > 0 ? plan.layout.tiles : 1;
    plan.chunk_tiles = (tiles + kMaxChunks - 1) / kMaxChunks;
    plan.chunks = (tiles + plan.chunk_tiles - 1) / plan.chunk_tiles;
    const auto rows_of = [&](int64_t chunks) {
        int64_t rows = kLaneWords / (chunks * plan.kernel.width);
        if (rows * width > kXFloats) rows = kXFloats / width;
        if (rows > kMaxBlockRows) rows = kMaxBlockRows;
        rows = rows / plan.kernel.row_tile * plan.kernel.row_tile;
        return rows < plan.kernel.row_tile ? plan.kernel.row_tile : rows;
    };
    plan.float_rows = rows_of(plan.chunks);
    plan.block_rows = plan.int16 ? rows_of(int16_chunks(tiles).count) : plan.float_rows;
    plan.blocks = (params.rows + plan.block_rows - 1) / plan.block_rows;
    const auto bytes = [](int64_t count, size_t size) { return align_up(static_cast<size_t>(count) * size); };
    const int64_t pairs = plan.int16 ? int16_pairs(width, params.metric) : 0;
    plan.reach_at = bytes(width, sizeof(double));
    plan.x_at = plan.reach_at + bytes(kMaxChunks, sizeof(float));
    plan.x16_at = plan.x_at + bytes(plan.block_rows * width, sizeof(float));
    plan.lanes_at = plan.x16_at + bytes(plan.block_rows * pairs * 2, sizeof(int16_t));
    plan.scratch_bytes = plan.lanes_at + align_up(kLaneWords * sizeof(float)) +
                         bytes(plan.kernel.row_tile * plan.chunks * plan.kernel.width, sizeof(float));
    return plan;
}

// ---- a block: rows begin..end of one group -------------------------------------------------------------------

class BlockSearch {
  public:
    BlockSearch(const AssignParams& params, const AssignHook& hook, const Plan& plan, int64_t group,
                unsigned char* scratch)
        : params_(params),
          hook_(hook),
          plan_(plan),
          group_(group),
          view_(packed_view(params.packed, plan.layout, group)),
          wide_(reinterpret_cast<double*>(scratch)),
          reach_(reinterpret_cast<float*>(scratch + plan.reach_at)),
          x_(reinterpret_cast<float*>(scratch + plan.x_at)),
          x16_(reinterpret_cast<int16_t*>(scratch + plan.x16_at)),
          lanes_(scratch + plan.lanes_at),
          pairs_(int16_pairs(params.codebook.width, params.metric)) {}

    void run(int64_t begin, int64_t end) {
        const bool int16 = plan_.int16 && view_.group->int16_codes > 0;
        for_dtype(params_.x_type, [&](auto element) {
            using T = decltype(element);
            for (int64_t row = begin; row < end; ++row) {
                if (hook_.mask != nullptr && hook_.mask[row * hook_.mask_stride] == 0) {
                    id(row) = -1;
                    continue;
                }
                const double square = widen<T>(row);
                if (!(int16 && prepare_int16(row, square))) prepare(row);
            }
        });
        if (int16_count_ > 0) run_int16();
        if (count_ > 0) run_float();
    }

  private:
    // Reads a row as float64 into wide_ and returns the sum of its squares.
    template <class T>
    double widen(int64_t row) {
        constexpr int64_t kAhead = 8;
        const T* x =
            static_cast<const T*>(params_.x) + row * params_.row_stride + group_ * params_.group_stride;
        if (row + kAhead < params_.rows) __builtin_prefetch(x + kAhead * params_.row_stride);
        double even = 0.0, odd = 0.0;
        const int64_t width = params_.codebook.width;
        for (int64_t i = 0; i < width; ++i) wide_[i] = to_double(x[i * params_.column_stride]);
        int64_t i = 0;
        for (; i + 2 <= width; i += 2) {
            even += wide_[i] * wide_[i];
            odd += wide_[i + 1] * wide_[i + 1];
        }
        if (i < width) even += wide_[i] * wide_[i];
        wide_row_ = row;
        return even + odd;
    }

    void widen_again(int64_t row) {
        if (wide_row_ == row) return;
        for_dtype(params_.x_type, [&](auto element) { widen<decltype(element)>(row); });
    }

    int64_t& id(int64_t row) { return params_.ids[row * params_.codebook.groups + group_]; }

    double score(int64_t row, int64_t code) {
        widen_again(row);
        return score_code(params_.codebook, group_, code, view_.norm[code], params_.metric, wide_);
    }

    // Rounds the row in wide_ to 16 bits; false where it is not for the int16 filter.
    bool prepare_int16(int64_t row, double square) {
        constexpr double kSmallest = 1.1830521861667747e-271,
                         kLargest = 8.452712498170644e+270;  // 2^-900, 2^900
        const bool cosine = params_.metric == Metric::kCosine;
        const double last = view_.group->last_column, longest = kInt16LongestX * last;
        if (!(cosine ? square > kSmallest && square < kLargest : square <= longest * longest)) return false;
        const double scale = kInt16Length / std::sqrt(square + last * last);
        const int64_t width = params_.codebook.width;
        int16_t* x = x16_ + int16_count_ * pairs_ * 2;
        x[pairs_ * 2 - 1] = 0;  // the column after an odd number of them
        for (int64_t i = 0; i < width; ++i) x[i] = round_to_int16(wide_[i] * scale);
        if (!cosine) x[width] = round_to_int16(last * scale);
        int16_rows_[int16_count_++] = row;
        return true;
    }

    // Decides what happens to the row in wide_ and, for the filter, writes it as float32 with a bound of its norm.
    void prepare(int64_t row) {
        const int64_t width = params_.codebook.width;
        double largest = 0.0, sum = 0.0;
        for (int64_t i = 0; i < width; ++i) {
            const double magnitude = wide_[i] < 0 ? -wide_[i] : wide_[i];
            if (!is_finite(magnitude)) {
                id(row) = -1;
                return;
            }
            largest = magnitude > largest ? magnitude : largest;
        }
        if (view_.group->choosable == 0) {
            id(row) = -1;
            return;
        }
        double scale = 1.0;
        bool filter = plan_.kernel.run != nullptr && view_.group->unsafe == 0 && width <= kLargestWidth;
        if (params_.metric == Metric::kCosine) {
            if (largest == 0.0) {  // every score is 0
                id(row) = view_.group->first_choosable;
                return;
            }
            filter = filter && largest < kLargestCosine && largest > kSmallestCosine;
            int exponent;
            std::frexp(largest, &exponent);
            if (filter) scale = std::ldexp(1.0, -exponent);
        }
        float* x = x_ + count_ * width;
        for (int64_t i = 0; i < width && filter; ++i) {
            const double value = wide_[i] * scale;
            sum += value * value;
            x[i] = static_cast<float>(value);
        }
        const double norm = std::sqrt(sum);
        if (!filter || !(norm < kLargestL2)) {
            id(row) = assign_row(params_.codebook, group_, view_, params_.metric, wide_);
            return;
        }
        x_norm_[count_] = static_cast<float>(norm) * kRoundUp;
        rows_[count_++] = Row{row, 0, Best{}};
    }

    void run_int16() {
        const int64_t codes = view_.group->int16_codes, tiles = (codes + kTileCodes - 1) / kTileCodes;
        const Chunks chunks = int16_chunks(tiles);
        const int64_t columns = params_.codebook.width + (params_.metric == Metric::kL2 ? 1 : 0);
        plan_.kernel.run_int16({x16_, int16_count_, pairs_, view_.int16, view_.slot, codes, tiles,
                                chunks.tiles, chunks.count, int16_band(columns),
                                reinterpret_cast<int32_t*>(lanes_), found_int16, this});
    }

    // What the int16 filter leaves of a row: its only code, a few to score, or too many.
    static void found_int16(void* context, int64_t slot, const int32_t* codes, int64_t count) {
        BlockSearch& self = *static_cast<BlockSearch*>(context);
        const int64_t row = self.int16_rows_[slot];
        if (count == 1) {
            self.id(row) = codes[0];
        } else if (count <= kInt16Candidates) {
            Best best;
            for (int64_t i = 0; i < count; ++i) best.consider(self.score(row, codes[i]), codes[i]);
            self.id(row) = best.code;
        } else {
            self.widen_again(row);
            self.prepare(row);
        }
    }

    void run_float() {
        const int64_t width = params_.codebook.width;
        for (float_begin_ = 0; float_begin_ < count_; float_begin_ += plan_.float_rows) {
            const int64_t left = count_ - float_begin_;
            plan_.kernel.run({x_ + float_begin_ * width, x_norm_ + float_begin_,
                              left < plan_.float_rows ? left : plan_.float_rows, width, view_,
                              plan_.layout.tiles, plan_.chunk_tiles, plan_.chunks, make_bound(width),
                              params_.metric, reinterpret_cast<float*>(lanes_), reach_, candidate, this});
        }
        for (int64_t slot = 0; slot < count_; ++slot) id(rows_[slot].row) = rows_[slot].best.code;
    }

    // One row inside the float32 filter: the only candidate is taken as it is, from the second on all are scored.
    struct Row {
        int64_t row;
        int64_t candidates;
        Best best;
    };

    static void candidate(void* context, int64_t slot, int64_t code) {
        BlockSearch& self = *static_cast<BlockSearch*>(context);
        Row& entry = self.rows_[self.float_begin_ + slot];
        if (++entry.candidates == 1) {
            entry.best.code = code;
            return;
        }
        if (entry.candidates == 2) entry.best.score = self.score(entry.row, entry.best.code);
        entry.best.consider(self.score(entry.row, code), code);
    }

    const AssignParams& params_;
    const AssignHook& hook_;
    const Plan& plan_;
    const int64_t group_;
    const PackedView view_;
    double* const wide_;  // scratch: the row last widened
    float* const reach_;
    float* const x_;
    int16_t* const x16_;
    unsigned char* const lanes_;
    const int64_t pairs_;
    int64_t wide_row_ = -1;
    int64_t int16_count_ = 0, count_ = 0;  // rows in either filter
    int64_t float_begin_ = 0;              // the first of those that are in the float32 filter now
    int64_t int16_rows_[kMaxBlockRows];
    float x_norm_[kMaxBlockRows];
    Row rows_[kMaxBlockRows];
};

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
            BlockSearch(params, hook, plan, group, base + participant * plan.scratch_bytes).run(begin, end);
        }
        if (hook.after != nullptr) hook.after(hook.context, participant, group, begin, end);
    });
}

void vq_assign_cpu(const AssignParams& params, int threads) {
    assign_blocks(params, AssignHook{nullptr, 0, nullptr, nullptr}, threads);
}

}  // namespace meditok
