// depthwise: out = gelu(conv3x3(x) + bias), each channel with its own 3x3 taps, zero padding 1, stride 1 or 2, erf GELU.
// Channels last: x (batch, height, width, channels) -> out (batch, ceil(height / stride), ceil(width / stride), channels).
//
// float32, contiguous, any sizes, 0 included. Taps are added in raster order, each fused; those outside are left out.
#pragma once

#include <cstdint>

namespace meditok {

struct DepthwiseParams {
    const float* x;  // (batch, height, width, channels)
    int64_t batch, height, width, channels;
    int64_t stride;
    const float* taps;  // (9, channels): tap 3 r + c of every channel together
    const float* bias;  // (channels)
    float* out;
};

inline int64_t reduced(int64_t size, int64_t stride) {
    return (size + stride - 1) / stride;
}

void depthwise_cpu(const DepthwiseParams& params, int threads);

// ---- between the files of this folder: row `row` of batch * output height rows ----------------------------------

void depthwise_scalar(const DepthwiseParams& params, int64_t row);
void depthwise_avx2(const DepthwiseParams& params, int64_t row);
void depthwise_avx512(const DepthwiseParams& params, int64_t row);

}  // namespace meditok
