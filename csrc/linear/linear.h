// linear: out = act(norm(x) weight^T + bias) + residual, row by row, where norm is none, one or two layer norms in
// turn and act is none, gelu (erf), or geglu: gelu_tanh(y weight^T + bias) * (y gate_weight^T + gate_bias).
//
// float32, any sizes, 0 included. Every row's result depends on that row alone: not on the number of rows, their
// order, or the threads. Vector kernels add up k in index order in chains of 256, the scalar one in double.
#pragma once

#include <cstdint>

namespace meditok {

enum class Activation : int { kNone = 0, kGelu = 1, kGeglu = 2 };  // shared with meditok/ops/_native.py

struct Norm {
    const float* gain;  // (width)
    const float* bias;  // (width)
    float eps;
};

struct LinearParams {
    const float* x;  // (rows, width), unit stride along width
    int64_t rows, width, x_stride;
    Norm norm[2];
    int norms;
    const float* weight;       // (columns, width) contiguous
    const float* bias;         // (columns), or null
    const float* gate_weight;  // as weight, for geglu
    const float* gate_bias;    // (columns), or null
    int64_t columns;
    Activation activation;
    const float* residual;  // (rows, columns), unit stride along columns, or null
    int64_t residual_stride;
    float* out;  // (rows, columns) contiguous
};

void linear_cpu(const LinearParams& params, int threads);

// ---- between the files of this folder ---------------------------------------------------------------------

// Columns are computed in panels of 32 outputs, for geglu 16 outputs and their 16 gates. Widths are padded with zeros to
// a multiple of 16.
constexpr int64_t kPanel = 32;

struct LinearKernel {
    int64_t tile_rows;  // rows a tile computes at once
    // Panel `panel` of the weight(s) -> packed (padded width, kPanel).
    void (*pack)(const LinearParams& params, int64_t panel, float* packed);
    // `count` <= tile_rows normalised rows from `row` on -> tile (padded width / 16, tile_rows, 16).
    void (*prepare)(const LinearParams& params, int64_t row, int64_t count, float* tile);
    // One tile by one packed panel, activation and residual included, into params.out. Meanwhile 2 * (padded width)
    // floats from `later` on are fetched towards the processor.
    void (*run)(const LinearParams& params, int64_t row, int64_t count, const float* tile, int64_t panel,
                const float* packed, const float* later);
};

LinearKernel linear_avx2();
LinearKernel linear_avx512();

// Rows begin to end, by plain loops.
void linear_scalar(const LinearParams& params, int64_t begin, int64_t end);

}  // namespace meditok
