// Between the CPU files of this folder: plain pointers only, so that no vector type crosses a file border.
#pragma once

#include "vq/vq_canonical.h"
#include "vq/vq_filter.h"

namespace meditok {

// ---- vq_scalar.cpp ----------------------------------------------------------------------------------------

// Canonical score of one code for a vector already widened to float64.
double score_code(const Codebook& codebook, int64_t group, int64_t code, double norm, Metric metric,
                  const double* x);

// The canonical loop over all codes of a group.
int64_t assign_row(const Codebook& codebook, int64_t group, const PackedView& view, Metric metric,
                   const double* x);

// ---- vq_cpu.cpp -------------------------------------------------------------------------------------------

// What the training pass adds to an assignment.
struct AssignHook {
    const unsigned char* mask;  // (rows), 0: not assigned, id -1; null: every row is
    int64_t mask_stride;
    // Called once the ids of rows [begin, end) of a group are written, at most kMaxBlockRows of them.
    void (*after)(void* context, int participant, int64_t group, int64_t begin, int64_t end);
    void* context;
};

constexpr int64_t kMaxBlockRows = 96;

void assign_blocks(const AssignParams& params, const AssignHook& hook, int threads);

// ---- vq_avx2.cpp, vq_avx512.cpp, vq_avx512vnni.cpp, vq_neon.cpp -------------------------------------------

constexpr int64_t kMaxChunks = 32;  // per codebook: a chunk's rescan costs about 1/32 of the row
constexpr int64_t kInt8HalfTiles =
    64;  // of 16 codes, looked at in 16 bits: a quarter of the int16 filter at 4,096
constexpr int64_t kInt16Chunks =
    16;  // the same for the integer filters, whose rescan is cheap beside all the maxima
constexpr int64_t kInt16ChunkTiles = 4;  // at least, lest loading the rows cost more than the products

// A block of rows of one group, ready for the filter.
struct FilterBlock {
    const float* x;       // (rows, width)
    const float* x_norm;  // (rows) upper bounds
    int64_t rows, width;
    PackedView view;
    int64_t tiles, chunk_tiles, chunks;  // chunks of chunk_tiles tiles, the last one may be shorter
    Bound bound;
    Metric metric;
    float* lanes;  // scratch (rows, chunks, kWidth): the largest F of each chunk and lane
    float* reach;  // scratch (kMaxChunks): the largest radius in each chunk
    // Called for every code in the band, in rising order of codes for each row.
    void (*candidate)(void* context, int64_t row, int64_t code);
    void* context;
};

// A block of rows of one group, ready for an integer filter. A word holds two columns in 16 bits or four in 8.
struct IntegerBlock {
    const int32_t* x;     // (rows, words)
    const int32_t* band;  // (rows): 2 E
    int64_t rows, words;
    const int32_t* tiles;  // (tile_count, words, 32)
    const int32_t* slot;   // (tile_count, 32)
    int64_t codes;         // slots in use
    int64_t tile_count, chunk_tiles, chunks;
    int32_t* lanes;  // scratch (rows, chunks, kWidth): the largest F of each chunk and lane
    // Called once for each row with the codes in its band, rising; more than kIntegerCandidates are cut off there. -1 of
    // them: too many lanes were in the int8 band to be looked at in 16 bits.
    void (*found)(void* context, int64_t row, const int32_t* codes, int64_t count);
    void* context;
};

// A block of rows of one group, ready for the int8 filter.
struct Int8Block {
    IntegerBlock filter;     // of 8-bit words; a chunk is a group of kGroupTiles tiles
    const int32_t* x16;      // (rows, pairs): the same rows in 16 bits
    const int32_t* tiles16;  // (tile_count, pairs, 32)
    int64_t pairs;
    int32_t band16;
};

struct FilterKernel {
    void (*run)(const FilterBlock& block);
    void (*run_int16)(const IntegerBlock& block);  // may be missing
    void (*run_int8)(const Int8Block& block);      // may be missing
    int64_t width;                                 // 32-bit lanes of a vector
    int64_t row_tile;                              // rows the register tile holds
};

// Whether the instruction set in use has an int8 filter: only then is it worth packing codes for it.
bool reads_int8();

FilterKernel filter_avx2();
FilterKernel filter_avx512();
FilterKernel filter_avx512vnni();
FilterKernel filter_neon();

}  // namespace meditok
