// The integer filters on vectors; included after vq_simd.inl.h by the files that define IVec and kRegisters as well
// (see common/simd.h). vq_filter.h says why no best code is lost; integers are exact, so there is no rounding here.
//
// A word holds two columns in 16 bits or four in 8; Dot multiplies and adds vectors of words. Rows stay in registers
// as broadcast words while the codes of a chunk pass by: a vector of codes costs a row one instruction for each word
// and one maximum. Rows of too many words are read again for each of them. Then, as in the float32 filter: the largest
// F of the row, and a second look at the chunks that come near it.

// Rows that fit beside their maxima, two code vectors and a product.
constexpr int resident_rows(int words) {
    const int fit = (kRegisters - 2) / (words + 1);
    return fit < 1 ? 1 : fit > 4 ? 4 : fit;
}

MEDITOK_INLINE const int32_t* integer_tile(const IntegerBlock& block, int64_t tile) {
    return block.tiles + tile * block.words * kTileCodes;
}

MEDITOK_INLINE int32_t* integer_lanes(const IntegerBlock& block, int64_t row, int64_t chunk) {
    return block.lanes + (row * block.chunks + chunk) * kWidth;
}

template <class Dot, int W, int R>
MEDITOK_INLINE void integer_maxima(const IntegerBlock& block, int64_t row, int64_t chunk, int64_t first,
                                   int64_t last) {
    IVec x[R][W], best[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        best[r] = fill_int(INT32_MIN);
#pragma GCC unroll 9
        for (int w = 0; w < W; ++w) x[r][w] = fill_int(block.x[(row + r) * W + w]);
    }
    const int32_t* code = integer_tile(block, first);
    for (int64_t tile = first; tile < last; ++tile, code += W * kTileCodes) {
#pragma GCC unroll 4
        for (int64_t part = 0; part < kTileCodes; part += kWidth) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                IVec sum = Dot::first(x[r][0], load_int(code + part));
#pragma GCC unroll 9
                for (int w = 1; w < W; ++w) {
                    sum = Dot::add(sum, x[r][w], load_int(code + w * kTileCodes + part));
                }
                best[r] = max_int(best[r], sum);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store_int(integer_lanes(block, row + r, chunk), best[r]);
}

// Any number of words: R rows x 2 vectors of sums, words outermost.
template <class Dot, int R>
MEDITOK_INLINE void integer_maxima_wide(const IntegerBlock& block, int64_t row, int64_t chunk, int64_t first,
                                        int64_t last) {
    IVec best[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) best[r] = fill_int(INT32_MIN);
    for (int64_t tile = first; tile < last; ++tile) {
        for (int64_t part = 0; part < kTileCodes; part += 2 * kWidth) {
            const int32_t* code = integer_tile(block, tile) + part;
            const int32_t* x = block.x + row * block.words;
            IVec low[R], high[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) low[r] = high[r] = fill_int(0);
            for (int64_t w = 0; w < block.words; ++w, code += kTileCodes) {
                const IVec code_low = load_int(code), code_high = load_int(code + kWidth);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    const IVec word = fill_int(x[r * block.words + w]);
                    low[r] = Dot::add(low[r], word, code_low);
                    high[r] = Dot::add(high[r], word, code_high);
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) best[r] = max_int(best[r], max_int(low[r], high[r]));
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store_int(integer_lanes(block, row + r, chunk), best[r]);
}

// Every row of the block against the tiles first..last of one chunk.
template <class Dot, int W>
void integer_chunk(const IntegerBlock& block, int64_t chunk, int64_t first, int64_t last) {
    constexpr int R = W > 0 ? resident_rows(W) : 3;
    int64_t row = 0;
    if constexpr (W > 0) {
        for (; row + R <= block.rows; row += R) integer_maxima<Dot, W, R>(block, row, chunk, first, last);
        for (; row < block.rows; ++row) integer_maxima<Dot, W, 1>(block, row, chunk, first, last);
    } else {
        for (; row + R <= block.rows; row += R) integer_maxima_wide<Dot, R>(block, row, chunk, first, last);
        for (; row < block.rows; ++row) integer_maxima_wide<Dot, 1>(block, row, chunk, first, last);
    }
}

// Bit i: code i of a tile has F > limit.
template <class Dot, int W>
MEDITOK_INLINE uint32_t integer_tile_hits(const IntegerBlock& block, const int32_t* x, int64_t tile,
                                          IVec limit) {
    const int64_t words = W > 0 ? W : block.words;
    const int32_t* code = integer_tile(block, tile);
    uint32_t mask = 0;
#pragma GCC unroll 4
    for (int64_t part = 0; part < kTileCodes; part += kWidth) {
        IVec sum = Dot::first(fill_int(x[0]), load_int(code + part));
#pragma GCC unroll 9
        for (int64_t w = 1; w < words; ++w) {
            sum = Dot::add(sum, fill_int(x[w]), load_int(code + w * kTileCodes + part));
        }
        mask |= above(sum, limit) << part;
    }
    const int64_t left = block.codes - tile * kTileCodes;
    if (left < kTileCodes) mask &= (uint32_t{1} << left) - 1;  // what fills the last tile up
    return mask;
}

// Appends the codes of a chunk with F > limit to `found`; stops soon after kIntegerCandidates of them. Which tile of
// eight has some is asked once for all of them: there is mostly one, and no telling which.
template <class Dot, int W>
MEDITOK_INLINE int64_t integer_rescan(const IntegerBlock& block, int64_t row, int64_t first, int64_t last,
                                      IVec limit, int32_t* found, int64_t count) {
    constexpr int64_t kTogether = 8;
    const int32_t* x = block.x + row * (W > 0 ? W : block.words);
    for (int64_t start = first; start < last; start += kTogether) {
        uint32_t hits[kTogether], tiles = 0;
        const int64_t number = last - start < kTogether ? last - start : kTogether;
        for (int64_t i = 0; i < number; ++i) {
            hits[i] = integer_tile_hits<Dot, W>(block, x, start + i, limit);
            tiles |= static_cast<uint32_t>(hits[i] != 0) << i;
        }
        for (; tiles != 0; tiles &= tiles - 1) {
            const int64_t tile = __builtin_ctz(tiles);
            for (uint32_t mask = hits[tile]; mask != 0 && count <= kIntegerCandidates; mask &= mask - 1) {
                found[count++] = block.slot[(start + tile) * kTileCodes + __builtin_ctz(mask)];
            }
        }
        if (count > kIntegerCandidates) break;
    }
    return count;
}

// One less than the F that a code needs for its row to be in the band.
MEDITOK_INLINE int32_t integer_limit(const IntegerBlock& block, int64_t row) {
    const int32_t* lanes = integer_lanes(block, row, 0);
    IVec even = fill_int(INT32_MIN), odd = even;
    int64_t chunk = 0;
    for (; chunk + 2 <= block.chunks; chunk += 2, lanes += 2 * kWidth) {
        even = max_int(even, load_int(lanes));
        odd = max_int(odd, load_int(lanes + kWidth));
    }
    if (chunk < block.chunks) even = max_int(even, load_int(lanes));
    return largest_int(max_int(even, odd)) - block.band[row] - 1;
}

template <class Dot, int W>
void integer_candidates(const IntegerBlock& block, int64_t row, int32_t threshold) {
    const IVec limit = fill_int(threshold);
    const int32_t* lanes = integer_lanes(block, row, 0);
    uint32_t chunks = 0;  // that have a code in the band
    for (int64_t chunk = 0; chunk < block.chunks; ++chunk) {
        chunks |= static_cast<uint32_t>(above(load_int(lanes + chunk * kWidth), limit) != 0) << chunk;
    }
    int32_t found[kIntegerCandidates + 1];
    int64_t count = 0;
    for (; chunks != 0; chunks &= chunks - 1) {
        const int64_t first = __builtin_ctz(chunks) * block.chunk_tiles;
        const int64_t last = first + block.chunk_tiles;
        count = integer_rescan<Dot, W>(block, row, first, last < block.tile_count ? last : block.tile_count,
                                       limit, found, count);
    }
    block.found(block.context, row, found, count);
}

template <class Dot, int W>
void integer_rows(const IntegerBlock& block) {
    for (int64_t chunk = 0; chunk < block.chunks; ++chunk) {
        const int64_t first = chunk * block.chunk_tiles;
        const int64_t last = first + block.chunk_tiles;
        integer_chunk<Dot, W>(block, chunk, first, last < block.tile_count ? last : block.tile_count);
    }
    int32_t limits[kMaxBlockRows];
    for (int64_t row = 0; row < block.rows; ++row) limits[row] = integer_limit(block, row);
    for (int64_t row = 0; row < block.rows; ++row) integer_candidates<Dot, W>(block, row, limits[row]);
}

template <class Dot>
void run_integer(const IntegerBlock& block) {
    switch (block.words) {
        case 1: return integer_rows<Dot, 1>(block);
        case 2: return integer_rows<Dot, 2>(block);
        case 3: return integer_rows<Dot, 3>(block);
        case 4: return integer_rows<Dot, 4>(block);
        case 5: return integer_rows<Dot, 5>(block);
        case 6: return integer_rows<Dot, 6>(block);
        case 7: return integer_rows<Dot, 7>(block);
        case 8: return integer_rows<Dot, 8>(block);
        case 9: return integer_rows<Dot, 9>(block);
        default: return integer_rows<Dot, 0>(block);
    }
}
