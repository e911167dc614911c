// The two passes around the channel products of a nearest-neighbour x2 upsampling with 3x3 convolution (the mathematics
// is in meditok/nn/upsample.py). differences: of the zero-padded map along h, along w, and along both. gather: output
// pixel (2i + p, 2j + q) = level[i, j] + tall[i + p, j, p] + wide[i, j + q, q] + both[i + p, j + q, 2p + q], then, where
// asked for, a layer norm over the channels of each pixel and an erf GELU.
//
// float32, contiguous, channels last, any sizes, 0 included.
#pragma once

#include <cstdint>

namespace meditok {

struct DifferencesParams {
    const float* x;  // (batch, height, width, channels)
    int64_t batch, height, width, channels;
    float* tall;  // (batch, height + 1, width, channels)
    float* wide;  // (batch, height, width + 1, channels)
    float* both;  // (batch, height + 1, width + 1, channels)
};

struct GatherParams {
    const float* level;  // (batch, height, width, channels)
    const float* tall;   // (batch, height + 1, width, 2, channels)
    const float* wide;   // (batch, height, width + 1, 2, channels)
    const float* both;   // (batch, height + 1, width + 1, 4, channels)
    int64_t batch, height, width, channels;
    const float* gain;  // (channels) of the norm, or null: neither norm nor GELU
    const float* bias;  // (channels)
    float eps;
    float* out;  // (batch, 2 height, 2 width, channels)
};

void differences_cpu(const DifferencesParams& params, int threads);
void gather_cpu(const GatherParams& params, int threads);

// ---- between the files of this folder -----------------------------------------------------------------------------

struct UpsampleKernel {
    // out = a - b over `count` floats; a null pointer stands for zeros.
    void (*subtract)(const float* a, const float* b, int64_t count, float* out);
    // One output pixel: the sum of its four parts, normalised where asked for.
    void (*pixel)(const GatherParams& params, const float* const* parts, float* out);
};

UpsampleKernel upsample_scalar();
UpsampleKernel upsample_avx2();
UpsampleKernel upsample_avx512();

}  // namespace meditok
