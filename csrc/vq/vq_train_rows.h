// Between the CPU files of lookup, of the training pass and of wide rows: what is done with one vector after another. F
// is float or double; rows of other types are widened to float first. Columns are contiguous. Plain pointers only, see
// common/simd.h.
//
// Every sum but that of the canonical norm has eight partial sums, element i going to number i mod 8, joined as
// ((0+4) + (2+6)) + ((1+5) + (3+7)), and no operation is fused: the same bits on every instruction set.
#pragma once

#include <cstdint>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace meditok {

constexpr int64_t kRowsAtOnce = 64;  // the most rows a loop is given

template <class F>
struct BackwardRows {
    int64_t rows, width;
    const F* x;  // (rows, width)
    int64_t x_stride;
    const F* grad;  // (rows, width)
    int64_t grad_stride;
    const F* const* code;  // (rows) rows of codes as vq_lookup gives them; null: masked, gradient 0
    double step;           // commitment_weight * 2 * grad_loss / elements
    bool cosine, rotation;
    F* out;  // (rows, width)
    int64_t out_stride;
    double* inverse;  // (rows) 1 / max(|x|, 1e-12) is written here; null: not wanted
    int64_t inverse_stride;
    F* const*
        sums;  // (rows) where code - x_hat is added as `add` does; null: nowhere, for all rows or for one
};

template <class F>
struct RowKernels {
    // sum of x_i^2
    double (*square)(const F* x, int64_t width);
    // sums of a_i b_i and of (a_i - b_i)^2
    double (*dot)(const F* a, const F* b, int64_t width);
    double (*distance)(const F* a, const F* b, int64_t width);
    // norms[r] = max(|code[r]|, 1e-12), summed in the order of vq_canonical.h; NaN stays
    void (*canonical_norm)(const F* const* code, int64_t rows, int64_t width, double* norms);
    // out[r] = F(code[r] / norm[r]): a row of vq_lookup; norm null: the code itself. `out` may be the codes.
    void (*divide)(const F* const* code, const double* norm, int64_t rows, int64_t width, F* out,
                   int64_t out_stride);
    // errors[r * errors_stride] = |x_hat - z|^2
    void (*error)(const F* x, int64_t x_stride, const F* z, int64_t z_stride, int64_t rows, int64_t width,
                  bool cosine, double* errors, int64_t errors_stride);
    void (*backward)(const BackwardRows<F>& block);
    // to[r] = F(from[r] / norms[r]), norms[r] = max(|from[r]|, 1e-12); to[r] may be from[r].
    void (*normalise)(const F* const* from, int64_t rows, int64_t width, F* const* to, double* norms);
    // sum += code - x[r] scale[r], the difference and the sum rounded to F, row after row; scale null: 1.
    void (*add)(const F* const* x, const double* scale, int64_t rows, int64_t width, const F* code, F* sum);
    // sum[r] = factor * sum[r], for cosine (unit not null) taken through the normalisation of a code of norm[r].
    void (*scale)(F* const* sum, double factor, const F* const* unit, const double* norm, int64_t rows,
                  int64_t width);
};

struct TrainKernels {
    RowKernels<float> single;
    RowKernels<double> wide;

    const RowKernels<float>& of(float) const { return single; }
    const RowKernels<double>& of(double) const { return wide; }
};

TrainKernels train_rows_scalar();
TrainKernels train_rows_avx2();
TrainKernels train_rows_avx512();

}  // namespace meditok
