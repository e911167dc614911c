// linear: out = act(norm(x) weight^T + bias) + residual, row by row, where norm is none, one or two layer norms in
// turn and act is none, gelu (erf), or geglu: gelu_tanh(y weight^T + bias) * (y gate_weight^T + gate_bias).
//
// float32, any sizes, 0 included. Every row's result depends on that row alone: not on the number of rows, their
// order, or the threads. Vector kernels add up k in index order in chains of 256 or 128, the scalar one in double.
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

// Columns are computed in panels of 32 outputs, for geglu 16 outputs and their 16 gates. Rows are prepared in tiles that
// follow each other; widths are padded with zeros to a multiple of kPad.
constexpr int64_t kPanel = 32;
constexpr int64_t kPad = 32;

struct LinearKernel {
    int64_t tile_rows;  // rows of a tile
    int64_t bytes;      // that a prepared value takes
    // Bytes of memory of its own that a thread needs to run `rows` rows of `width` values, padded.
    int64_t (*spare)(int64_t rows, int64_t width);
    // `count` <= tile_rows normalised rows from `row` on -> tile, tile_rows * (padded width) values.
    void (*prepare)(const LinearParams& params, int64_t row, int64_t count, void* tile, void* spare);
    // `count` rows from `row` on, which lie in `tiles`, by panels `panel` to `last`, activation and residual included,
    // into params.out.
    void (*run)(const LinearParams& params, int64_t row, int64_t count, const void* tiles, int64_t panel,
                int64_t last, void* spare);
};

LinearKernel linear_avx2();
LinearKernel linear_avx512();
LinearKernel linear_amx();

// Columns first to last of rows begin to end, by plain loops.
void linear_scalar(const LinearParams& params, int64_t begin, int64_t end, int64_t first, int64_t last);

}  // namespace meditok
