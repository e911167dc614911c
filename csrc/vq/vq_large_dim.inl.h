// The blocked product of the large-width regime; included by one file per instruction set inside an anonymous
// namespace, after it has defined Vec, kWidth, kPanelRows and kDepth (see common/simd.h).
//
// A register tile of kPanelRows rows x 32 codes takes kDepth columns at a time, so that a tile of codes, kDepth x 32
// floats, stays in the first-level cache while all panels of rows pass by; the unfinished sums wait in `scores`.
// They are continued, not added up: each F is still the bias plus one fused multiply-add per column in index order,
// as vq_filter.h has it (whose bound would hold for any order of the additions).

constexpr int64_t kVectors = kTileCodes / kWidth;
constexpr int64_t kScoreStride = kBlockTiles * kTileCodes;
constexpr int64_t kLine = 16;  // floats in a cache line

MEDITOK_INLINE void tile_product(const float* x, int64_t x_stride, const float* code, int64_t depth,
                                 const float* start, int64_t start_stride, float* scores) {
    Vec sum[kPanelRows][kVectors];
#pragma GCC unroll 16
    for (int64_t row = 0; row < kPanelRows; ++row) {
#pragma GCC unroll 8
        for (int64_t v = 0; v < kVectors; ++v) sum[row][v] = load(start + row * start_stride + v * kWidth);
    }
    for (int64_t column = 0; column < depth; ++column, code += kTileCodes) {
#pragma GCC unroll 8
        for (int64_t v = 0; v < kVectors; ++v) {
            const Vec element = load(code + v * kWidth);
#pragma GCC unroll 16
            for (int64_t row = 0; row < kPanelRows; ++row) {
                sum[row][v] = fma(fill(x[row * x_stride + column]), element, sum[row][v]);
            }
        }
    }
#pragma GCC unroll 16
    for (int64_t row = 0; row < kPanelRows; ++row) {
#pragma GCC unroll 8
        for (int64_t v = 0; v < kVectors; ++v) store(scores + row * kScoreStride + v * kWidth, sum[row][v]);
    }
}

void product(const ProductBlock& block) {
    const int64_t pieces = (block.width + kDepth - 1) / kDepth;
    const int64_t depth = (block.width + pieces - 1) / pieces;
    const int64_t ahead = (depth * kTileCodes / kLine + block.panels - 1) / block.panels;
    for (int64_t tile = 0; tile < block.tiles; ++tile) {
        for (int64_t first = 0; first < block.width; first += depth) {
            const int64_t count = first + depth < block.width ? depth : block.width - first;
            const float* code = block.codes + (tile * block.width + first) * kTileCodes;
            for (int64_t panel = 0; panel < block.panels; ++panel) {
                const float* x = block.x + panel * kPanelRows * block.x_stride + first;
                for (int64_t line = 0; line < ahead; ++line) {  // the next piece, into the second-level cache
                    __builtin_prefetch(code + count * kTileCodes + (panel * ahead + line) * kLine, 0, 2);
                }
                float* scores = block.scores + panel * kPanelRows * kScoreStride + tile * kTileCodes;
                const bool begins = first == 0;
                tile_product(x, block.x_stride, code, count, begins ? block.bias + tile * kTileCodes : scores,
                             begins ? 0 : kScoreStride, scores);
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
