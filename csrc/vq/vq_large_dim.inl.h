// The blocked product of the large-width regime; included by one file per instruction set inside an anonymous
// namespace, after it has defined Vec, kWidth, kPanelRows and kDepth (see common/simd.h).
//
// A register tile of kPanelRows rows x 32 codes takes kDepth columns at a time, so that a tile of codes, kDepth x 32
// floats, stays in the first-level cache while all panels of rows pass by; the unfinished sums wait in `scores`.
// The same loops serve pairs of int16, `fma` then multiplying and adding two columns at once.
// They are continued, not added up: each F is still the bias plus one fused multiply-add per column in index order,
// as vq_filter.h has it (whose bound would hold for any order of the additions).

constexpr int64_t kVectors = kTileCodes / kWidth;
constexpr int64_t kScoreStride = kBlockTiles * kTileCodes;
constexpr int64_t kLine = 16;  // floats, or pairs of int16, in a cache line

// Sums of a register tile: vectors of what `load` gives for a Score.
template <class Score>
using Sums = decltype(load(static_cast<const Score*>(nullptr)))[kPanelRows][kVectors];

// One column: the shorter side of the tile is held in registers beside the sums, the longer one passes by.
template <class Element, class Score>
MEDITOK_INLINE void tile_column(const Element* x, int64_t x_stride, const Element* code, Sums<Score>& sum) {
    using V = decltype(load(code));
    if constexpr (kVectors < kPanelRows) {
        V element[kVectors];
#pragma GCC unroll 8
        for (int64_t v = 0; v < kVectors; ++v) element[v] = load(code + v * kWidth);
#pragma GCC unroll 16
        for (int64_t row = 0; row < kPanelRows; ++row) {
            const V scalar = fill(x[row * x_stride]);
#pragma GCC unroll 8
            for (int64_t v = 0; v < kVectors; ++v) sum[row][v] = fma(scalar, element[v], sum[row][v]);
        }
    } else {
#pragma GCC unroll 8
        for (int64_t v = 0; v < kVectors; ++v) {
            const V element = load(code + v * kWidth);
#pragma GCC unroll 16
            for (int64_t row = 0; row < kPanelRows; ++row) {
                sum[row][v] = fma(fill(x[row * x_stride]), element, sum[row][v]);
            }
        }
    }
}

// Meanwhile lines of `next` go into the second-level cache, one every four columns: more at once would hold up the
// loads.
template <class Element, class Score>
MEDITOK_INLINE void tile_product(const Element* x, int64_t x_stride, const Element* code, int64_t depth,
                                 const Score* start, int64_t start_stride, const Element* next,
                                 Score* scores) {
    Sums<Score> sum;
#pragma GCC unroll 16
    for (int64_t row = 0; row < kPanelRows; ++row) {
#pragma GCC unroll 8
        for (int64_t v = 0; v < kVectors; ++v) sum[row][v] = load(start + row * start_stride + v * kWidth);
    }
    int64_t column = 0;
    for (; column + 4 <= depth; column += 4, code += 4 * kTileCodes, next += kLine) {
        __builtin_prefetch(next, 0, 2);
#pragma GCC unroll 4
        for (int64_t i = 0; i < 4; ++i)
            tile_column<Element, Score>(x + column + i, x_stride, code + i * kTileCodes, sum);
    }
    for (; column < depth; ++column, code += kTileCodes)
        tile_column<Element, Score>(x + column, x_stride, code, sum);
#pragma GCC unroll 16
    for (int64_t row = 0; row < kPanelRows; ++row) {
#pragma GCC unroll 8
        for (int64_t v = 0; v < kVectors; ++v) store(scores + row * kScoreStride + v * kWidth, sum[row][v]);
    }
}

template <class Element, class Score>
void product(const ProductBlock<Element, Score>& block) {
    const int64_t pieces = (block.width + kDepth - 1) / kDepth;
    const int64_t depth = (block.width + pieces - 1) / pieces;
    for (int64_t tile = 0; tile < block.tiles; ++tile) {
        for (int64_t first = 0; first < block.width; first += depth) {
            const int64_t count = first + depth < block.width ? depth : block.width - first;
            const Element* code = block.codes + (tile * block.width + first) * kTileCodes;
            for (int64_t panel = 0; panel < block.panels; ++panel) {
                const Element* x = block.x + panel * kPanelRows * block.x_stride + first;
                Score* scores = block.scores + panel * kPanelRows * kScoreStride + tile * kTileCodes;
                const bool begins = first == 0;
                tile_product(x, block.x_stride, code, count,
                             begins ? block.bias + tile * kTileCodes : static_cast<const Score*>(scores),
                             begins ? 0 : kScoreStride,
                             code + count * kTileCodes + panel * (depth / 4) * kLine, scores);
            }
        }
    }
}

void scan(const ScanBlock& block) {
    const Vec product = fill(block.bound.product), square = fill(block.bound.square),
              tiny = fill(block.bound.tiny), half = fill(0.5f), one = fill(1.0f);
    for (int64_t row = 0; row < block.rows; ++row) {
        const float* scores = block.scores + row * kScoreStride;
        Vec best[kBlockTiles];
        float margin[kBlockTiles];
        Vec lower = fill(-__builtin_inff());
        for (int64_t tile = 0; tile < block.tiles; ++tile) {
            best[tile] = load(scores + tile * kTileCodes);
            for (int64_t v = 1; v < kVectors; ++v) {
                best[tile] = max(best[tile], load(scores + tile * kTileCodes + v * kWidth));
            }
            margin[tile] = bound_of(block.bound, block.x_norm[row], block.reach[tile]);
            lower = max(lower, add(best[tile], fill(-margin[tile])));
        }
        float limit = largest(lower);
        limit -= kSlack * (limit < 0 ? -limit : limit);
        if (!(limit >= block.lower[row])) limit = block.lower[row];  // -inf less its slack is NaN
        block.lower[row] = limit;
        if (limit == -__builtin_inff()) continue;  // no code so far that the filter may find
        for (int64_t tile = 0; tile < block.tiles; ++tile) {
            if (at_least(add(best[tile], fill(margin[tile])), fill(limit)) == 0) continue;
            for (int64_t part = 0; part < kTileCodes; part += kWidth) {
                // bound_of on vectors
                const Vec norm = fill(block.x_norm[row]),
                          radius = load(block.radius + tile * kTileCodes + part);
                const Vec sum = add(norm, radius);
                Vec upper = mul(product, mul(radius, fma(half, radius, norm)));
                upper = fma(square, mul(sum, sum), upper);
                upper = fma(tiny, add(one, sum), upper);
                upper = add(load(scores + tile * kTileCodes + part), upper);
                uint32_t mask = at_least(upper, fill(limit));
                if (mask == 0) continue;
                float uppers[kWidth];
                store(uppers, upper);
                for (; mask != 0; mask &= mask - 1) {
                    const int lane = __builtin_ctz(mask);
                    block.candidate(block.context, row, block.first_code + tile * kTileCodes + part + lane,
                                    uppers[lane]);
                }
            }
        }
    }
}
