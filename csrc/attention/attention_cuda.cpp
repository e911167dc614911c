// attention on a GPU: the choice of the kernel.
//
//   sm_90, forward, 16    attention_forward_sm90.cu                            wgmma and the copy engine
//   bits, width <= 64,
//   keys of a head fit
//   float16               attention_forward.cu, attention_backward.cu          mma.sync, from sm_75 on
//   bfloat16              the same, from sm_80 on
//   float32 with tf32     the same, from sm_80 on
//   float32, bfloat16 on  attention_simt_forward.cu, attention_simt_backward.cu
//   sm_75, and what does  float32 multiply-adds, any device
//   not fit into shared
//   memory there
//   width > 128, float64  meditok/ops/attention.py takes the library
//
// Every kernel adds in one order, so all of them are deterministic and `deterministic` changes nothing.

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
