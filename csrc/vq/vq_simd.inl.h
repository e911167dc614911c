// The float32 filter on vectors; included by one file per instruction set inside an anonymous namespace,
// after it has defined Vec, kWidth and kRows (see common/simd.h). vq_filter.h says why no best code is lost.
//
// For each chunk of codes and each tile of kRows rows: kRows x 2 vector accumulators start from the bias, the
// columns of the tile come outermost, and only a running maximum per lane is kept (no index): 2 loads, kRows
// broadcasts and 2 kRows multiply-adds a column. A chunk of 128 codes x 8 columns is 4 KiB and stays in the
// first-level cache while the rows of the block pass by. Then, per row: the lower bound L, and a second look
// at the few chunks that reach it.

constexpr int64_t kVectorsInTile = kTileCodes / kWidth;
static_assert(kVectorsInTile % 2 == 0 && kMaxChunks % kWidth == 0,
              "vectors fill tiles in pairs, and margins");

template <int R>
MEDITOK_INLINE void chunk_maxima(const float* x, int64_t width, const float* tiles, const float* bias,
                                 int64_t count, float* lanes, int64_t lane_stride) {
    Vec best[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) best[r] = fill(-__builtin_inff());
    for (int64_t tile = 0; tile < count; ++tile) {
        for (int64_t pair = 0; pair < kVectorsInTile; pair += 2) {
            const float* code = tiles + tile * width * kTileCodes + pair * kWidth;
            const float* start = bias + tile * kTileCodes + pair * kWidth;
            Vec low[R], high[R];
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                low[r] = load(start);
                high[r] = load(start + kWidth);
            }
            for (int64_t column = 0; column < width; ++column, code += kTileCodes) {
                const Vec code_low = load(code), code_high = load(code + kWidth);
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) {
                    const Vec element = fill(x[r * width + column]);
                    low[r] = fma(element, code_low, low[r]);
                    high[r] = fma(element, code_high, high[r]);
                }
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) best[r] = max(best[r], max(low[r], high[r]));
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) store(lanes + r * lane_stride, best[r]);
}

// Rows that do not fill a whole register tile go through the next smaller one.
void chunk_rows(const FilterBlock& block, int64_t chunk) {
    const int64_t first = chunk * block.chunk_tiles;
    const int64_t left = block.tiles - first;
    const int64_t count = left < block.chunk_tiles ? left : block.chunk_tiles;
    const float* tiles = block.view.tiles + first * block.width * kTileCodes;
    const float* bias = block.view.bias + first * kTileCodes;
    const int64_t stride = block.chunks * kWidth;
    int64_t row = 0;
    auto at = [&](int64_t r) { return block.lanes + r * stride + chunk * kWidth; };
    for (; row + kRows <= block.rows; row += kRows) {
        chunk_maxima<kRows>(block.x + row * block.width, block.width, tiles, bias, count, at(row), stride);
    }
    for (; row + 3 <= block.rows; row += 3) {
        chunk_maxima<3>(block.x + row * block.width, block.width, tiles, bias, count, at(row), stride);
    }
    for (; row < block.rows; ++row) {
        chunk_maxima<1>(block.x + row * block.width, block.width, tiles, bias, count, at(row), stride);
    }
}

// E(X, R) of vq_filter.h on vectors of radii.
MEDITOK_INLINE Vec bound_vector(const FilterBlock& block, Vec norm, Vec radius) {
    const Vec sum = add(norm, radius);
    Vec error = mul(fill(block.bound.product), mul(radius, fma(fill(0.5f), radius, norm)));
    error = fma(fill(block.bound.square), mul(sum, sum), error);
    return fma(fill(block.bound.tiny), add(fill(1.0f), sum), error);
}

// Reports the codes of one chunk whose F + E reaches `threshold`; `margin` is the largest E of the chunk.
MEDITOK_INLINE void rescan(const FilterBlock& block, int64_t row, int64_t chunk, float margin,
                           float threshold) {
    const float* x = block.x + row * block.width;
    const int64_t first = chunk * block.chunk_tiles;
    const int64_t left = block.tiles - first;
    const int64_t last = first + (left < block.chunk_tiles ? left : block.chunk_tiles);
    const Vec norm = fill(block.x_norm[row]), limit = fill(threshold), widest = fill(margin);
    for (int64_t tile = first; tile < last; ++tile) {
        for (int64_t part = 0; part < kTileCodes; part += 2 * kWidth) {
            const float* code = block.view.tiles + tile * block.width * kTileCodes + part;
            const int64_t at = tile * kTileCodes + part;
            Vec value[2] = {load(block.view.bias + at), load(block.view.bias + at + kWidth)};
            for (int64_t column = 0; column < block.width; ++column, code += kTileCodes) {
                const Vec element = fill(x[column]);
                value[0] = fma(element, load(code), value[0]);
                value[1] = fma(element, load(code + kWidth), value[1]);
            }
            if (!at_least(add(max(value[0], value[1]), widest), limit)) continue;
            for (int half = 0; half < 2; ++half) {
                const Vec error = bound_vector(block, norm, load(block.view.radius + at + half * kWidth));
                uint32_t mask = at_least(add(value[half], error), limit);
                for (; mask != 0; mask &= mask - 1) {
                    block.candidate(block.context, row, at + half * kWidth + __builtin_ctz(mask));
                }
            }
        }
    }
}

void find_candidates(const FilterBlock& block, int64_t row) {
    const float* lanes = block.lanes + row * block.chunks * kWidth;
    float margin[kMaxChunks];  // the largest E of each chunk
    const Vec norm = fill(block.x_norm[row]);
    for (int64_t chunk = 0; chunk < block.chunks; chunk += kWidth) {
        store(margin + chunk, bound_vector(block, norm, load(block.reach + chunk)));
    }
    Vec lower = fill(-__builtin_inff());
    for (int64_t chunk = 0; chunk < block.chunks; ++chunk) {
        lower = max(lower, add(load(lanes + chunk * kWidth), fill(-margin[chunk])));
    }
    float best = largest(lower);
    best -= kSlack * (best < 0 ? -best : best);
    const Vec limit = fill(best);
    constexpr int64_t kTogether = 4;  // chunks ruled out by one comparison
    for (int64_t start = 0; start < block.chunks; start += kTogether) {
        const int64_t end = start + kTogether < block.chunks ? start + kTogether : block.chunks;
        Vec upper = fill(-__builtin_inff());
        for (int64_t chunk = start; chunk < end; ++chunk) {
            upper = max(upper, add(load(lanes + chunk * kWidth), fill(margin[chunk])));
        }
        if (!at_least(upper, limit)) continue;
        for (int64_t chunk = start; chunk < end; ++chunk) {
            if (at_least(add(load(lanes + chunk * kWidth), fill(margin[chunk])), limit)) {
                rescan(block, row, chunk, margin[chunk], best);
            }
        }
    }
}

void run_filter(const FilterBlock& block) {
    for (int64_t chunk = 0; chunk < kMaxChunks; ++chunk) {
        if (chunk < block.chunks) chunk_rows(block, chunk);
        float reach = 0.0f;
        for (int64_t t = chunk * block.chunk_tiles; t < (chunk + 1) * block.chunk_tiles && t < block.tiles;
             ++t) {
            reach = block.view.reach[t] > reach ? block.view.reach[t] : reach;
        }
        block.reach[chunk] = reach;
    }
    for (int64_t row = 0; row < block.rows; ++row) find_candidates(block, row);
}
