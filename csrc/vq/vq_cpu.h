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

// ---- vq_avx2.cpp, vq_avx512.cpp ---------------------------------------------------------------------------

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
    float* reach;  // scratch (chunks): the largest radius in each chunk
    // Called for every code in the band, in rising order of codes for each row.
    void (*candidate)(void* context, int64_t row, int64_t code);
    void* context;
};

struct FilterKernel {
    void (*run)(const FilterBlock& block);
    int64_t width;     // floats in a vector
    int64_t row_tile;  // rows the register tile holds
};

FilterKernel filter_avx2();
FilterKernel filter_avx512();

}  // namespace meditok
