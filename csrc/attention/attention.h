// Attention: every query takes the mean of the values, weighted by how well its keys match.
//
// attention           s[i, j] = scale q[i] . k[j] (+ mask[i, j]);  p[i, :] = softmax of s[i, :];  out[i] = sum_j p[i, j] v[j]
//                     for each batch and head; with `mean` the results of the heads are averaged.
//                     Also lse[i] = log sum_j exp(s[i, j]), natural logarithm, which the backward starts from.
// attention_backward  with g = grad_out[i] (of `mean`: divided by the number of heads), dp[i, j] = g . v[j] and
//                     delta[i] = sum_j p[i, j] dp[i, j] (= g . out[i]):  ds[i, j] = p[i, j] (dp[i, j] - delta[i]);
//                     grad_q[i] = scale sum_j ds[i, j] k[j];  grad_k[j] = scale sum_i ds[i, j] q[i];
//                     grad_v[j] = sum_i p[i, j] g.
//
// Masks: causal means key j <= query i, aligned top left; bool, true = attended; additive, in the type of q, -inf = not
// attended. A key that is not attended has no part in its row, whatever it holds. A row without an attended key, or
// with all scores -inf, gives 0, lse +inf and zero gradients. A NaN score, or a score of +inf, makes its row NaN.
//
// Types: float32, float16, bfloat16, float64; q, k, v, an additive mask, out and the gradients share one. Sums in float32
// or better. Sizes: any, 0 included. The results have the same bits for any number of threads and any batch.
// Strides count elements and may be negative or zero; results must not overlap inputs or themselves.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace meditok {

enum class MaskKind : int { kNone = 0, kCausal = 1, kBool = 2, kAdditive = 3 };

struct AttentionStrides {
    int64_t batch, head, token, column;
};

struct AttentionParams {
    const void* q;  // (batch, heads, queries, width)
    const void* k;  // (batch, heads, keys, width)
    const void* v;  // (batch, heads, keys, width)
    Dtype type;
    int64_t batch, heads, queries, keys, width;
    AttentionStrides q_strides, k_strides, v_strides;
    MaskKind mask_kind;
    const void* mask;  // (batch, heads, queries, keys), bytes or `type`; null for kNone and kCausal
    AttentionStrides mask_strides;  // token: query, column: key; 0 along an axis that is broadcast
    double scale;
    bool mean;  // average the heads
    void*
        out;  // (batch, heads, queries, width), or (batch, queries, width) for `mean`; the backward reads it
    AttentionStrides out_strides;  // head unused for `mean`
    float* lse;  // (batch, heads, queries) contiguous; null: not wanted; the backward reads it
};

struct AttentionBackwardParams {
    AttentionParams forward;  // as it ran; out and lse are inputs (the CPU kernels do without out)
    const void* grad_out;     // shaped as forward.out
    AttentionStrides grad_out_strides;
    void *grad_q, *grad_k, *grad_v;  // shaped as q, k, v
    AttentionStrides grad_q_strides, grad_k_strides, grad_v_strides;
    unsigned char* scratch;  // CUDA: attention_backward_scratch_bytes, aligned to 64
};

// ---- entry points -----------------------------------------------------------------------------------------

void attention_cpu(const AttentionParams& params, int threads);
void attention_backward_cpu(const AttentionBackwardParams& params, int threads);

// On `device`, queued on `stream` (a cudaStream_t); nothing is allocated and nothing waits, and the bits are the same
// from run to run. Widths up to 128 and no float64. `tf32`: products of float32 may drop to tf32's 11 significant bits.
// Here a key that is not attended must be finite all the same: 0 times infinity is NaN.
void attention_cuda(const AttentionParams& params, bool tf32, int device, void* stream);
void attention_backward_cuda(const AttentionBackwardParams& params, bool tf32, int device, void* stream);
int64_t attention_backward_scratch_bytes(const AttentionParams& params);

}  // namespace meditok
