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
constexpr int64_t kInt16Chunks =
    16;  // the same for the int16 filter, whose rescan is cheap beside all the maxima
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

// A block of rows of one group, ready for the int16 filter.
struct Int16Block {
    const int16_t* x;  // (rows, pairs, 2)
    int64_t rows, pairs;
    const int16_t* tiles;  // (tile_count, pairs, 32, 2)
    const int32_t* slot;   // (tile_count, 32)
    int64_t codes;         // slots in use
    int64_t tile_count, chunk_tiles, chunks;
    int32_t band;    // 2 E
    int32_t* lanes;  // scratch (rows, chunks, kWidth): the largest F of each chunk and lane
    // Called once for each row with the codes in its band, rising; more than kInt16Candidates are cut off there.
    void (*found)(void* context, int64_t row, const int32_t* codes, int64_t count);
    void* context;
};

struct FilterKernel {
    void (*run)(const FilterBlock& block);
    void (*run_int16)(const Int16Block& block);  // may be missing
    int64_t width;                               // 32-bit lanes of a vector
    int64_t row_tile;                            // rows the register tile holds
};

FilterKernel filter_avx2();
FilterKernel filter_avx512();
FilterKernel filter_avx512vnni();
FilterKernel filter_neon();

}  // namespace meditok
