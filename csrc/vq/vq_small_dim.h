// The small-width regime of vq_assign on CPU: how rows are cut into blocks, and how the rows of a block go through the
// filters: 8 bits, 16 bits, float32, the float64 loop; each hands on the rows that it cannot settle (vq_filter.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "vq/vq_cpu.h"

namespace meditok {

constexpr int64_t kLaneWords = 10240;  // scratch for chunk maxima: 40 KiB
constexpr int64_t kXFloats = 4096;     // scratch for the rows of a block: 16 KiB

struct Chunks {
    int64_t tiles, count;
};

inline Chunks int16_chunks(int64_t tiles) {
    int64_t chunk = (tiles + kInt16Chunks - 1) / kInt16Chunks;
    chunk = chunk < kInt16ChunkTiles ? kInt16ChunkTiles : chunk;
    return {chunk, (tiles + chunk - 1) / chunk};
}

inline Chunks int8_chunks(int64_t tiles) {
    return {kGroupTiles, (tiles + kGroupTiles - 1) / kGroupTiles};
}

struct Plan {
    FilterKernel kernel;
    PackedLayout layout;
    int64_t chunk_tiles, chunks, float_rows;  // of the float32 filter, which takes so many rows at once
    int64_t block_rows, blocks;
    bool int16, int8;  // whether codebooks of this width have such a part and the kernel reads it
    int64_t words16, words8;
    // A participant's scratch: one row in float64, the largest radius of each chunk, rows, rows in 16 bits for either
    // filter and in 8 bits, maxima.
    size_t reach_at, x_at, x16_at, x8_at, lanes_at, scratch_bytes;
};

inline Plan make_plan(const AssignParams& params, const FilterKernel& kernel) {
    const int64_t width = params.codebook.width;
    Plan plan;
    plan.kernel = kernel;
    plan.layout = packed_layout(params.codebook.groups, params.codebook.codes, width);
    const bool integer = width >= kIntegerNarrowest;
    plan.int16 = integer && plan.kernel.run_int16 != nullptr && width <= kInt16Widest;
    plan.int8 = integer && plan.kernel.run_int8 != nullptr && width <= kInt8Widest &&
                params.codebook.codes <= kInt8MostCodes;
    plan.words16 = plan.int16 ? int16_pairs(width, params.metric) : 0;
    plan.words8 = plan.int8 ? int8_quads(width) : 0;
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
    if (plan.int8) plan.block_rows = std::min(plan.block_rows, rows_of(int8_chunks(tiles).count));
    plan.blocks = (params.rows + plan.block_rows - 1) / plan.block_rows;
    const auto bytes = [](int64_t count, size_t size) { return align_up(static_cast<size_t>(count) * size); };
    plan.reach_at = bytes(width, sizeof(double));
    plan.x_at = plan.reach_at + bytes(kMaxChunks, sizeof(float));
    plan.x16_at = plan.x_at + bytes(plan.block_rows * width, sizeof(float));
    plan.x8_at = plan.x16_at + bytes(plan.block_rows * plan.words16, sizeof(int32_t));
    const int64_t words8 = plan.words8 > 0 ? plan.words8 + plan.words16 : 0;
    plan.lanes_at = plan.x8_at + bytes(plan.block_rows * words8, sizeof(int32_t));
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
          lanes_(scratch + plan.lanes_at),
          int16_{reinterpret_cast<int32_t*>(scratch + plan.x16_at), plan.words16, 0, {}, {}},
          int8_{reinterpret_cast<int32_t*>(scratch + plan.x8_at), plan.words8, 0, {}, {}} {}

    void run(int64_t begin, int64_t end) {
        for_dtype(params_.x_type, [&](auto element) {
            using T = decltype(element);
            for (int64_t row = begin; row < end; ++row) {
                if (hook_.mask != nullptr && hook_.mask[row * hook_.mask_stride] == 0) {
                    id(row) = -1;
                    continue;
                }
                square_ = widen<T>(row);
                if (!prepare_int8(row) && !prepare_int16(row)) prepare(row);
            }
        });
        if (int8_.count > 0) run_int8();
        if (int16_.count > 0) run_int16();
        if (count_ > 0) run_float();
    }

  private:
    // Rows on their way through an integer filter.
    struct IntegerRows {
        int32_t* x;  // (count, words)
        int64_t words, count;
        int64_t row[kMaxBlockRows];
        int32_t band[kMaxBlockRows];
    };

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
        for_dtype(params_.x_type, [&](auto element) { square_ = widen<decltype(element)>(row); });
    }

    int64_t& id(int64_t row) { return params_.ids[row * params_.codebook.groups + group_]; }

    double score(int64_t row, int64_t code) {
        widen_again(row);
        return score_code(params_.codebook, group_, code, view_.norm[code], params_.metric, wide_);
    }

    // Whether the squares of the row in wide_ neither overflow nor vanish, so that it can be scaled for cosine.
    bool scalable() const {
        constexpr double kSmallest = 1.1830521861667747e-271,
                         kLargest = 8.452712498170644e+270;  // 2^-900, 2^900
        return square_ > kSmallest && square_ < kLargest;
    }

    // Rounds the row in wide_ to 8 and to 16 bits; false where it is not for the int8 filter.
    bool prepare_int8(int64_t row) {
        const double reach = view_.group->int8_reach;
        if (!plan_.int8 || !(reach > 0.0) || !scalable()) return false;
        const int64_t width = params_.codebook.width;
        double largest = 0.0, sum = 0.0;
        for (int64_t i = 0; i < width; ++i) {
            const double magnitude = std::fabs(wide_[i]);
            largest = magnitude > largest ? magnitude : largest;
            sum += magnitude;
        }
        const double scale = kInt8Length / largest;
        int32_t* words = int8_.x + int8_.count * int8_.words;
        words[int8_.words - 1] = 0;  // the columns after the last
        int8_t* x = reinterpret_cast<int8_t*>(words);
        for (int64_t i = 0; i < width; ++i) x[i] = static_cast<int8_t>(round_to_int16(wide_[i] * scale));
        round_int16(int8_.x + plan_.block_rows * int8_.words + int8_.count * int16_.words);
        int8_.band[int8_.count] = int8_band(sum * scale, reach, width);
        int8_.row[int8_.count++] = row;
        return true;
    }

    // Rounds the row in wide_ to 16 bits; false where it is not for the int16 filter.
    bool prepare_int16(int64_t row) {
        const double longest = kInt16LongestX * view_.group->last_column;
        if (!plan_.int16 || view_.group->int16_codes == 0) return false;
        if (!(params_.metric == Metric::kCosine ? scalable() : square_ <= longest * longest)) return false;
        round_int16(int16_.x + int16_.count * int16_.words);
        int16_.band[int16_.count] = band16();
        int16_.row[int16_.count++] = row;
        return true;
    }

    void round_int16(int32_t* words) const {
        const double last = view_.group->last_column, scale = kInt16Length / std::sqrt(square_ + last * last);
        const int64_t width = params_.codebook.width;
        words[int16_.words - 1] = 0;  // the column after an odd number of them
        int16_t* x = reinterpret_cast<int16_t*>(words);
        for (int64_t i = 0; i < width; ++i) x[i] = round_to_int16(wide_[i] * scale);
        if (params_.metric == Metric::kL2) x[width] = round_to_int16(last * scale);
    }

    int32_t band16() const {
        return int16_band(params_.codebook.width + (params_.metric == Metric::kL2 ? 1 : 0));
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
        const double* centre = nullptr;
        bool filter = plan_.kernel.run != nullptr && view_.group->unsafe == 0 && width <= kLargestWidth;
        if (params_.metric == Metric::kCosine) {
            if (largest == 0.0) {  // every score is 0
                id(row) = view_.group->first_choosable;
                return;
            }
            filter = filter && largest < kLargestCosine && largest > kSmallestCosine;
            if (view_.group->centred != 0) {
                centre = view_.centre;
                filter = filter && scalable();
                scale = 1.0 / std::sqrt(square_);
            } else if (filter) {
                int exponent;
                std::frexp(largest, &exponent);
                scale = std::ldexp(1.0, -exponent);
            }
        }
        float* x = x_ + count_ * width;
        for (int64_t i = 0; i < width && filter; ++i) {
            const double value = wide_[i] * scale - (centre != nullptr ? centre[i] : 0.0);
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

    IntegerBlock integer_block(const IntegerRows& rows, const void* codes_at, const Chunks& chunks) {
        IntegerBlock block;
        block.x = rows.x;
        block.band = rows.band;
        block.rows = rows.count;
        block.words = rows.words;
        block.tiles = static_cast<const int32_t*>(codes_at);
        block.slot = view_.slot;
        block.codes = view_.group->int16_codes;
        block.tile_count = tiles_of(block.codes);
        block.chunk_tiles = chunks.tiles;
        block.chunks = chunks.count;
        block.lanes = reinterpret_cast<int32_t*>(lanes_);
        block.context = this;
        return block;
    }

    static int64_t tiles_of(int64_t codes) { return (codes + kTileCodes - 1) / kTileCodes; }

    void run_int8() {
        IntegerBlock filter =
            integer_block(int8_, view_.int8, int8_chunks(tiles_of(view_.group->int16_codes)));
        filter.found = [](void* context, int64_t slot, const int32_t* codes, int64_t count) {
            BlockSearch& self = *static_cast<BlockSearch*>(context);
            const int64_t row = self.int8_.row[slot];
            if (count >= 0 && self.settle(row, codes, count)) return;
            self.widen_again(row);
            if (count >= 0 || !self.prepare_int16(row)) self.prepare(row);
        };
        plan_.kernel.run_int8({filter, int8_.x + plan_.block_rows * int8_.words,
                               reinterpret_cast<const int32_t*>(view_.int16), int16_.words, band16()});
    }

    void run_int16() {
        IntegerBlock block =
            integer_block(int16_, view_.int16, int16_chunks(tiles_of(view_.group->int16_codes)));
        block.found = [](void* context, int64_t slot, const int32_t* codes, int64_t count) {
            BlockSearch& self = *static_cast<BlockSearch*>(context);
            const int64_t row = self.int16_.row[slot];
            if (self.settle(row, codes, count)) return;
            self.widen_again(row);
            self.prepare(row);
        };
        plan_.kernel.run_int16(block);
    }

    // What an integer filter leaves of a row: its only code, a few to score, or too many (false).
    bool settle(int64_t row, const int32_t* codes, int64_t count) {
        if (count > kIntegerCandidates) return false;
        Best best;
        if (count == 1) best.code = codes[0];
        for (int64_t i = 0; i < count && count > 1; ++i) best.consider(score(row, codes[i]), codes[i]);
        id(row) = best.code;
        return true;
    }

    void run_float() {
        const int64_t width = params_.codebook.width;
        const Bound bound = view_.group->centred != 0 ? make_centred_bound(width) : make_bound(width);
        for (float_begin_ = 0; float_begin_ < count_; float_begin_ += plan_.float_rows) {
            const int64_t left = count_ - float_begin_;
            plan_.kernel.run({x_ + float_begin_ * width, x_norm_ + float_begin_,
                              left < plan_.float_rows ? left : plan_.float_rows, width, view_,
                              plan_.layout.tiles, plan_.chunk_tiles, plan_.chunks, bound, params_.metric,
                              reinterpret_cast<float*>(lanes_), reach_, candidate, this});
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
    unsigned char* const lanes_;
    IntegerRows int16_, int8_;
    double square_ = 0.0;  // of the row in wide_
    int64_t wide_row_ = -1;
    int64_t count_ = 0;        // rows for the float32 filter
    int64_t float_begin_ = 0;  // the first of those that are in it now
    float x_norm_[kMaxBlockRows];
    Row rows_[kMaxBlockRows];
};

}  // namespace meditok
