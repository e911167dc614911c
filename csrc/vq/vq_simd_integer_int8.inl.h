// The int8 filter and the int16 look at what it leaves, on 16 lanes; included after vq_simd_integer.inl.h by a file that
// defines Quads. A chunk is a group of 256 codes. Its lane l holds the 16 codes that stand side by side, as half tile l
// of the group, in the int16 part (vq.h): a lane whose maximum is in the band is one short product in 16 bits, whose
// narrower band then leaves mostly a single code. A few rows take each step together, since the number of lanes and
// codes is no habit that a processor could learn, and each wrong guess costs as much as a product.

constexpr int64_t kTogether = 8;  // rows

// The half tiles of some rows that have a code in the int8 band.
struct HalfTiles {
    int64_t first[kTogether + 1];  // of row r: first[r] to first[r + 1]
    int32_t at[kTogether * (kInt8HalfTiles + 1)];
};

MEDITOK_INLINE void find_half_tiles(const IntegerBlock& block, int64_t row, int64_t rows,
                                    const int32_t* limits, HalfTiles& found) {
    const int64_t used = (block.codes + kWidth - 1) / kWidth;
    int64_t count = 0;
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t most = count + kInt8HalfTiles + 1;  // one more than is looked at
        const IVec limit = fill_int(limits[row + r]);
        const int32_t* lanes = integer_lanes(block, row + r, 0);
        found.first[r] = count;
        for (int64_t chunk = 0; chunk < block.chunks; chunk += 4) {
            uint64_t hits = 0;
            for (int64_t i = 0; i < 4 && chunk + i < block.chunks; ++i) {
                hits |= static_cast<uint64_t>(above(load_int(lanes + (chunk + i) * kWidth), limit)) << 16 * i;
            }
            for (; hits != 0 && count < most; hits &= hits - 1) {
                const int64_t half_tile = chunk * kWidth + __builtin_ctzll(hits);
                found.at[count] = static_cast<int32_t>(half_tile);
                count += half_tile < used;  // what fills the last group up is there as well
            }
        }
    }
    found.first[rows] = count;
}

template <int W>
MEDITOK_INLINE IVec score_half_tile(const Int8Block& block, int64_t row, int64_t half_tile) {
    const int64_t words = W > 0 ? W : block.pairs;
    const int32_t* x = block.x16 + row * words;
    const int32_t* code = block.tiles16 + half_tile / 2 * words * kTileCodes + half_tile % 2 * kWidth;
    IVec sum = Pairs::first(fill_int(x[0]), load_int(code));
#pragma GCC unroll 9
    for (int64_t w = 1; w < words; ++w)
        sum = Pairs::add(sum, fill_int(x[w]), load_int(code + w * kTileCodes));
    return sum;
}

template <int W>
void int8_candidates(const Int8Block& block, int64_t row, int64_t rows, const int32_t* limits) {
    HalfTiles half_tiles;
    find_half_tiles(block.filter, row, rows, limits, half_tiles);
    int32_t scores[kTogether * (kInt8HalfTiles + 1) * kWidth], limits16[kTogether];
    for (int64_t r = 0; r < rows; ++r) {
        IVec most = fill_int(INT32_MIN);
        for (int64_t i = half_tiles.first[r]; i < half_tiles.first[r + 1]; ++i) {
            const IVec score = score_half_tile<W>(block, row + r, half_tiles.at[i]);
            store_int(scores + i * kWidth, score);
            most = max_int(most, score);
        }
        limits16[r] = largest_int(most) - block.band16 - 1;
    }
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t first = half_tiles.first[r], last = half_tiles.first[r + 1];
        int32_t found[kIntegerCandidates + 1];
        int64_t count = 0;
        if (last - first > kInt8HalfTiles) {
            block.filter.found(block.filter.context, row + r, nullptr, -1);
            continue;
        }
        const IVec limit = fill_int(limits16[r]);
        for (int64_t i = first; i < last; ++i) {
            uint32_t mask = above(load_int(scores + i * kWidth), limit);
            for (; mask != 0 && count <= kIntegerCandidates; mask &= mask - 1) {
                const int64_t at = half_tiles.at[i] * kWidth + __builtin_ctz(mask);
                found[count] = block.filter.slot[at];
                count += at < block.filter.codes;  // what fills the last tile up is there as well
            }
        }
        block.filter.found(block.filter.context, row + r, found, count);
    }
}

template <int W>
void int8_rows(const Int8Block& block) {
    const IntegerBlock& filter = block.filter;
    for (int64_t chunk = 0; chunk < filter.chunks; ++chunk) {
        integer_chunk<Quads, (W + 1) / 2>(filter, chunk, chunk * kGroupTiles, (chunk + 1) * kGroupTiles);
    }
    int32_t limits[kMaxBlockRows];
    for (int64_t row = 0; row < filter.rows; ++row) limits[row] = integer_limit(filter, row);
    for (int64_t row = 0; row < filter.rows; row += kTogether) {
        const int64_t left = filter.rows - row;
        int8_candidates<W>(block, row, left < kTogether ? left : kTogether, limits);
    }
}

void run_int8(const Int8Block& block) {
    switch (block.pairs) {
        case 2: return int8_rows<2>(block);
        case 3: return int8_rows<3>(block);
        case 4: return int8_rows<4>(block);
        case 5: return int8_rows<5>(block);
        case 6: return int8_rows<6>(block);
        case 7: return int8_rows<7>(block);
        case 8: return int8_rows<8>(block);
        default: return int8_rows<0>(block);
    }
}
