// Vector quantization, training: a fused forward, its backward, and the statistics and update of the EMA.
//
// With x_hat = x / max(|x|, 1e-12) (cosine) or x (l2), e = the row vq_lookup gives for the id vq_assign gives,
// and the mean taken over the elements of the rows the mask keeps (0 if it keeps none):
// vq_quantize           z = e;  loss = (commitment_weight + codebook_weight) mean((x_hat - e)^2);
//                       counts[g, k] = number of rows with ids[n, g] = k. A masked row: id -1, z = 0.
// vq_quantize_backward  h = R grad_z + commitment_weight 2 grad_loss / elements (x_hat - e), R = 1 or, with
//                       rotation, the transpose of the rotation and scale that take x_hat to e (Fifty et al. 2024);
//                       grad_x = h taken through the normalisation (cosine) or h (l2);
//                       grad_codebook[g, k] = codebook_weight 2 grad_loss / elements sum_n (e - x_hat), taken
//                       through the normalisation for cosine. Masked rows: grad_x = 0 and no part in the sums.
// vq_stats              counts as above; sums[g, k] = sum of x[n, g] in float32: rows in order inside blocks of
//                       4,096 rows, then the blocks in order. Ids outside 0..codes-1 take no part.
// vq_update             ema = ema decay + new (1 - decay), rounded to float32 after each of the three operations;
//                       code = ema_sum / max(|ema_sum|, 1e-12) if that is longer than 1e-12 (cosine), or ema_sum /
//                       smoothed count (l2), smoothed = (n_k + eps) / (n + codes eps) n (van den Oord et al. 2017,
//                       appendix A.1), if that is above 0. No count in any group: nothing changes.
// A row of x with a NaN or infinity has id -1: z and its gradient are NaN, the loss is NaN, it counts nowhere.
//
// Types: float32, float16, bfloat16, float64; x, z, codebook and the gradients share one. Arithmetic in float64
// unless said otherwise. Every result has the same bits for any number of threads. Strides count elements and may
// be negative or zero; they come in the order of the axes.
#pragma once

#include "vq/vq.h"

namespace meditok {

struct QuantizeParams {
    AssignParams assign;        // x, codebook, packed, metric; its ids are an output
    const unsigned char* mask;  // (rows), 0 = masked; null: no row is masked
    int64_t mask_stride;
    double commitment_weight, codebook_weight;
    void* z;                 // (rows, groups, width) contiguous
    float* loss;             // (1)
    int64_t* counts;         // (groups, codes) contiguous
    unsigned char* scratch;  // CUDA: quantize_scratch_bytes, aligned to 64
};

struct QuantizeBackwardParams {
    const void* grad_z;  // (rows, groups, width)
    int64_t grad_z_strides[3];
    const float* grad_loss;  // (1)
    const void* x;           // (rows, groups, width)
    Dtype type;              // of x, codebook, grad_z, grad_x, grad_codebook
    int64_t rows;
    int64_t x_strides[3];
    Codebook codebook;
    const int64_t* ids;  // (rows, groups)
    int64_t ids_strides[2];
    const unsigned char* mask;  // as in QuantizeParams
    int64_t mask_stride;
    Metric metric;
    double commitment_weight, codebook_weight;
    bool rotation;
    void* grad_x;            // (rows, groups, width) contiguous
    void* grad_codebook;     // (groups, codes, width) contiguous; null: not wanted
    unsigned char* scratch;  // CUDA: backward_scratch_bytes, aligned to 64
};

struct StatsParams {
    const void* x;  // (rows, groups, width)
    Dtype type;
    int64_t rows, groups, width;
    int64_t x_strides[3];
    const int64_t* ids;  // (rows, groups)
    int64_t ids_strides[2];
    int64_t codes;
    int64_t* counts;         // (groups, codes) contiguous
    float* sums;             // (groups, codes, width) contiguous
    unsigned char* scratch;  // CUDA: stats_scratch_bytes, aligned to 64
};

struct UpdateParams {
    void* codebook;  // (groups, codes, width)
    Dtype type;
    int64_t groups, codes, width;
    int64_t codebook_strides[3];
    float* ema_counts;  // (groups, codes)
    int64_t ema_counts_strides[2];
    float* ema_sums;  // (groups, codes, width)
    int64_t ema_sums_strides[3];
    const int64_t* counts;  // (groups, codes)
    int64_t counts_strides[2];
    const float* sums;  // (groups, codes, width)
    int64_t sums_strides[3];
    double decay, eps;
    Metric metric;
    unsigned char* scratch;  // CUDA: update_scratch_bytes, aligned to 64
};

constexpr int64_t kStatsRows = 4096;  // STATS_ROWS of meditok/ops/reference.py

// ---- scratch memory of the CUDA entries -----------------------------------------------------------------------
// Never more than about what the inputs take: for a row and group 8 bytes of order (and 8 of norm in the backward), for
// a code 4 bytes per 4,096 rows, for an element of the codebook 8 bytes in the backward.

MEDITOK_HD inline int64_t row_blocks(int64_t rows) {
    return (rows + kStatsRows - 1) / kStatsRows;
}

inline size_t bytes_of(int64_t count, size_t size) {
    return align_up(static_cast<size_t>(count) * size);
}

// The rows ordered by their code (vq_order.h).
inline size_t order_scratch_bytes(int64_t rows, int64_t groups, int64_t codes) {
    return bytes_of(groups * codes, sizeof(int32_t)) +
           bytes_of(row_blocks(rows) * groups * codes, sizeof(int32_t)) +
           bytes_of(groups * rows, sizeof(int32_t));
}

// A partial sum of the loss for at least kPartialPairs rows of a group.
constexpr int64_t kPartialPairs = 8;

inline size_t quantize_scratch_bytes(int64_t rows, int64_t groups, int64_t, int64_t) {
    return bytes_of((rows * groups + kPartialPairs - 1) / kPartialPairs, sizeof(double));
}

// The factor of the loss's gradient, norms of codes, inverse norms of rows, the order, sums of the codes.
inline size_t backward_scratch_bytes(int64_t rows, int64_t groups, int64_t codes, int64_t width) {
    return bytes_of(1, sizeof(double)) + bytes_of(groups * codes, sizeof(double)) +
           bytes_of(rows * groups, sizeof(double)) + order_scratch_bytes(rows, groups, codes) +
           bytes_of(groups * codes * width, sizeof(double));
}

inline size_t stats_scratch_bytes(int64_t rows, int64_t groups, int64_t codes, int64_t) {
    return order_scratch_bytes(rows, groups, codes);
}

// Whether anything was counted, and the sum of each group's counts.
inline size_t update_scratch_bytes(int64_t groups, int64_t, int64_t) {
    return bytes_of(1, sizeof(int32_t)) + bytes_of(groups, sizeof(double));
}

// ---- entry points -----------------------------------------------------------------------------------------

void vq_quantize_cpu(const QuantizeParams& params, int threads);
void vq_quantize_backward_cpu(const QuantizeBackwardParams& params, int threads);
void vq_stats_cpu(const StatsParams& params, int threads);
void vq_update_cpu(const UpdateParams& params, int threads);

// On `device`, queued on `stream` (a cudaStream_t); nothing is allocated and nothing waits.
void vq_quantize_cuda(const QuantizeParams& params, int device, void* stream);
void vq_quantize_backward_cuda(const QuantizeBackwardParams& params, int device, void* stream);
void vq_stats_cuda(const StatsParams& params, int device, void* stream);
void vq_update_cuda(const UpdateParams& params, int device, void* stream);

}  // namespace meditok
