// The int16 filter on vectors; included after vq_simd.inl.h by the files that define IVec and kRegisters as well
// (see common/simd.h). vq_filter.h says why no best code is lost; integers are exact, so there is no rounding here.
//
// Rows stay in registers as broadcast pairs of columns while the codes of a chunk pass by: a vector of codes costs a
// row one multiply-add of pairs for each two columns and one maximum. Rows too wide for that are read again for each
// pair. Then, as in the float32 filter: the largest F of the row, and a second look at the chunks that come near it.

// Rows that fit beside their maxima, two code vectors and a product.
constexpr int resident_rows(int pairs) {
    const int fit = (kRegisters - 2) / (pairs + 1);
    return fit < 1 ? 1 : fit > 4 ? 4 : fit;
}

MEDITOK_INLINE IVec fill_pair(const int16_t* p) {
    int32_t both;
    __builtin_memcpy(&both, p, sizeof both);
    return fill_int(both);
}

MEDITOK_INLINE const int16_t* int16_tile(const Int16Block& block, int64_t tile) {
    return block.tiles + tile * block.pairs * kTileCodes * 2;
}

MEDITOK_INLINE int32_t* int16_lanes(const Int16Block& block, int64_t row, int64_t chunk) {
    return block.lanes + (row * block.chunks + chunk) * kWidth;
}

template <int P, int R>
MEDITOK_INLINE void int16_maxima(const Int16Block& block, int64_t row, int64_t chunk, int64_t first,
                                 int64_t last) {
    IVec x[R][P], best[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        best[r] = fill_int(INT32_MIN);
#pragma GCC unroll 9
        for (int p = 0; p < P; ++p) x[r][p] = fill_pair(block.x + ((row + r) * P + p) * 2);
    }
    const int16_t* code = int16_tile(block, first);
    for (int64_t tile = first; tile < last; ++tile, code += P * kTileCodes * 2) {
#pragma GCC unroll 4
        for (int64_t part = 0; part < kTileCodes; part += kWidth) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                IVec sum = dot_pairs(x[r][0], load_int(code + part * 2));
#pragma GCC unroll 9
                for (int p = 1; p < P; ++p) {
                    sum = add_dot_pairs(sum, x[r][p], load_int(code + (p * kTileCodes + part) * 2));
                }
                best[r] = max_int(best[r], sum);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store_int(int16_lanes(block, row + r, chunk), best[r]);
}

// Any number of pairs: R rows x 2 vectors of sums, pairs outermost.
template <int R>
MEDITOK_INLINE void int16_maxima_wide(const Int16Block& block, int64_t row, int64_t chunk, int64_t first,
                                      int64_t last) {
    IVec best[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) best[r] = fill_int(INT32_MIN);
    for (int64_t tile = first; tile < last; ++tile) {
        for (int64_t part = 0; part < kTileCodes; part += 2 * kWidth) {
            const int16_t* code = int16_tile(block, tile) + part * 2;
            const int16_t* x = block.x + row * block.pairs * 2;
            IVec low[R], high[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) low[r] = high[r] = fill_int(0);
            for (int64_t p = 0; p < block.pairs; ++p, code += kTileCodes * 2) {
                const IVec code_low = load_int(code), code_high = load_int(code + kWidth * 2);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    const IVec pair = fill_pair(x + (r * block.pairs + p) * 2);
                    low[r] = add_dot_pairs(low[r], pair, code_low);
                    high[r] = add_dot_pairs(high[r], pair, code_high);
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) best[r] = max_int(best[r], max_int(low[r], high[r]));
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store_int(int16_lanes(block, row + r, chunk), best[r]);
}

// Every row of the block against the tiles first..last of one chunk.
template <int P>
void int16_chunk(const Int16Block& block, int64_t chunk, int64_t first, int64_t last) {
    constexpr int R = P > 0 ? resident_rows(P) : 3;
    int64_t row = 0;
    if constexpr (P > 0) {
        for (; row + R <= block.rows; row += R) int16_maxima<P, R>(block, row, chunk, first, last);
        for (; row < block.rows; ++row) int16_maxima<P, 1>(block, row, chunk, first, last);
    } else {
        for (; row + R <= block.rows; row += R) int16_maxima_wide<R>(block, row, chunk, first, last);
        for (; row < block.rows; ++row) int16_maxima_wide<1>(block, row, chunk, first, last);
    }
}

// Bit i: code i of a tile has F > limit.
template <int P>
MEDITOK_INLINE uint32_t int16_tile_hits(const Int16Block& block, const int16_t* x, int64_t tile, IVec limit) {
    const int64_t pairs = P > 0 ? P : block.pairs;
    const int16_t* code = int16_tile(block, tile);
    uint32_t mask = 0;
#pragma GCC unroll 4
    for (int64_t part = 0; part < kTileCodes; part += kWidth) {
        IVec sum = dot_pairs(fill_pair(x), load_int(code + part * 2));
#pragma GCC unroll 9
        for (int64_t p = 1; p < pairs; ++p) {
            sum = add_dot_pairs(sum, fill_pair(x + p * 2), load_int(code + (p * kTileCodes + part) * 2));
        }
        mask |= above(sum, limit) << part;
    }
    const int64_t left = block.codes - tile * kTileCodes;
    if (left < kTileCodes) mask &= (uint32_t{1} << left) - 1;  // what fills the last tile up
    return mask;
}

// Appends the codes of a chunk with F > limit to `found`; stops soon after kInt16Candidates of them. Which tile of
// eight has some is asked once for all of them: there is mostly one, and no telling which.
template <int P>
MEDITOK_INLINE int64_t int16_rescan(const Int16Block& block, int64_t row, int64_t first, int64_t last,
                                    IVec limit, int32_t* found, int64_t count) {
    constexpr int64_t kTogether = 8;
    const int16_t* x = block.x + row * (P > 0 ? P : block.pairs) * 2;
    for (int64_t start = first; start < last; start += kTogether) {
        uint32_t hits[kTogether], tiles = 0;
        const int64_t number = last - start < kTogether ? last - start : kTogether;
        for (int64_t i = 0; i < number; ++i) {
            hits[i] = int16_tile_hits<P>(block, x, start + i, limit);
            tiles |= static_cast<uint32_t>(hits[i] != 0) << i;
        }
        for (; tiles != 0; tiles &= tiles - 1) {
            const int64_t tile = __builtin_ctz(tiles);
            for (uint32_t mask = hits[tile]; mask != 0 && count <= kInt16Candidates; mask &= mask - 1) {
                found[count++] = block.slot[(start + tile) * kTileCodes + __builtin_ctz(mask)];
            }
        }
        if (count > kInt16Candidates) break;
    }
    return count;
}

// One less than the F that a code needs for its row to be in the band.
MEDITOK_INLINE int32_t int16_limit(const Int16Block& block, int64_t row) {
    const int32_t* lanes = int16_lanes(block, row, 0);
    IVec even = fill_int(INT32_MIN), odd = even;
    int64_t chunk = 0;
    for (; chunk + 2 <= block.chunks; chunk += 2, lanes += 2 * kWidth) {
        even = max_int(even, load_int(lanes));
        odd = max_int(odd, load_int(lanes + kWidth));
    }
    if (chunk < block.chunks) even = max_int(even, load_int(lanes));
    return largest_int(max_int(even, odd)) - block.band - 1;
}

template <int P>
void int16_candidates(const Int16Block& block, int64_t row, int32_t threshold) {
    const IVec limit = fill_int(threshold);
    const int32_t* lanes = int16_lanes(block, row, 0);
    uint32_t chunks = 0;  // that have a code in the band
    for (int64_t chunk = 0; chunk < block.chunks; ++chunk) {
        chunks |= static_cast<uint32_t>(above(load_int(lanes + chunk * kWidth), limit) != 0) << chunk;
    }
    int32_t found[kInt16Candidates + 1];
    int64_t count = 0;
    for (; chunks != 0; chunks &= chunks - 1) {
        const int64_t first = __builtin_ctz(chunks) * block.chunk_tiles;
        const int64_t last = first + block.chunk_tiles;
        count = int16_rescan<P>(block, row, first, last < block.tile_count ? last : block.tile_count, limit,
                                found, count);
    }
    block.found(block.context, row, found, count);
}

template <int P>
void int16_rows(const Int16Block& block) {
    for (int64_t chunk = 0; chunk < block.chunks; ++chunk) {
        const int64_t first = chunk * block.chunk_tiles;
        const int64_t last = first + block.chunk_tiles;
        int16_chunk<P>(block, chunk, first, last < block.tile_count ? last : block.tile_count);
    }
    int32_t limits[kMaxBlockRows];
    for (int64_t row = 0; row < block.rows; ++row) limits[row] = int16_limit(block, row);
    for (int64_t row = 0; row < block.rows; ++row) int16_candidates<P>(block, row, limits[row]);
}

void run_int16(const Int16Block& block) {
    switch (block.pairs) {
        case 2: return int16_rows<2>(block);
        case 3: return int16_rows<3>(block);
        case 4: return int16_rows<4>(block);
        case 5: return int16_rows<5>(block);
        case 6: return int16_rows<6>(block);
        case 7: return int16_rows<7>(block);
        case 8: return int16_rows<8>(block);
        case 9: return int16_rows<9>(block);
        default: return int16_rows<0>(block);
    }
}
