// attention on a GPU: the choice of the kernel.
//
//   attention_forward_sm90.cu       wgmma and the copy engine: the forward on sm_90 in fp16 and bfloat16, width <= 64,
//                                   no mask or causal, a head's keys in shared memory, rows of 16-byte vectors
//   attention_forward.cu,           mma.sync: fp16 from sm_75 on; bfloat16, and float32 where tf32 is allowed, from
//   attention_backward.cu           sm_80 on; where the tiles fit
//   attention_simt_forward.cu,      float32 multiply-adds, on every device: strict float32, and whatever is left
//   attention_simt_backward.cu
//
// Widths above 128 and float64 are the library's, see _by_kernel() of meditok/ops/attention.py. Every kernel adds in one
// order, without atomics, so there is no other path for deterministic mode.

#include "attention/attention_cuda.h"

#include "common/check.h"

namespace meditok {

namespace {

void check_covered(const AttentionParams& params) {
    require(params.width <= kWidestHead && params.type != Dtype::kFloat64,
            "attention on CUDA takes widths up to 128 and float32, float16 or bfloat16");
    constexpr int64_t kLimit = int64_t{1} << 30;
    require(params.queries < kLimit && params.keys < kLimit && params.heads < kLimit && params.batch < kLimit,
            "attention on CUDA takes fewer than 2^30 queries, keys, heads and rows of a batch in one call");
}

bool on_tensor_cores(const AttentionParams& params, bool tf32, const Place& place) {
    switch (params.type) {
        case Dtype::kFloat16: return place.architecture >= 75;
        case Dtype::kBfloat16: return place.architecture >= 80;
        default: return tf32 && place.architecture >= 80;
    }
}

}  // namespace

void attention_cuda(const AttentionParams& params, bool tf32, int device, void* stream) {
    check_covered(params);
    if (params.batch == 0 || params.heads == 0 || params.queries == 0) return;
    const Place place = place_of(device, stream);
    if (on_tensor_cores(params, tf32, place)) {
        if (launch_attention_sm90(params, place) || launch_attention_mma(params, place)) return;
    }
    launch_attention_simt(params, place);
}

void attention_backward_cuda(const AttentionBackwardParams& params, bool tf32, int device, void* stream) {
    const AttentionParams& forward = params.forward;
    check_covered(forward);
    if (forward.batch == 0 || forward.heads == 0) return;
    const Place place = place_of(device, stream);
    if (on_tensor_cores(forward, tf32, place) && launch_attention_backward_mma(params, place)) return;
    launch_attention_backward_simt(params, place);
}

int64_t attention_backward_scratch_bytes(const AttentionParams& params) {
    return params.batch * params.heads * params.queries * static_cast<int64_t>(sizeof(float));
}

}  // namespace meditok
