// Plain loops, float32 throughout.

#include <cmath>

#include "upsample/upsample.h"

namespace meditok {

namespace {

void subtract(const float* a, const float* b, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = (a == nullptr ? 0.0f : a[i]) - (b == nullptr ? 0.0f : b[i]);
}

void pixel(const GatherParams& params, const float* const* parts, float* out) {
    const int64_t channels = params.channels;
    float mean = 0.0f, variance = 0.0f;
    for (int64_t c = 0; c < channels; ++c) {
        out[c] = ((parts[0][c] + parts[1][c]) + parts[2][c]) + parts[3][c];
        mean += out[c];
    }
    if (params.gain == nullptr) return;
    mean /= static_cast<float>(channels);
    for (int64_t c = 0; c < channels; ++c) variance += (out[c] - mean) * (out[c] - mean);
    const float factor = 1.0f / std::sqrt(variance / static_cast<float>(channels) + params.eps);
    for (int64_t c = 0; c < channels; ++c) {
        const float value = (out[c] - mean) * factor * params.gain[c] + params.bias[c];
        out[c] = 0.5f * value * (1.0f + std::erf(value * 0.707106781f));
    }
}

}  // namespace

UpsampleKernel upsample_scalar() {
    return {subtract, pixel};
}

}  // namespace meditok
