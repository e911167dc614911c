// Plain loops, float32 throughout.

#include <cmath>

#include "depthwise/depthwise.h"

namespace meditok {

void depthwise_scalar(const DepthwiseParams& params, int64_t row) {
    const int64_t out_height = reduced(params.height, params.stride),
                  out_width = reduced(params.width, params.stride);
    const int64_t image = row / out_height, y = row % out_height * params.stride, channels = params.channels;
    for (int64_t column = 0; column < out_width; ++column) {
        for (int64_t channel = 0; channel < channels; ++channel) {
            float sum = params.bias[channel];
            for (int64_t tap = 0; tap < 9; ++tap) {
                const int64_t from_y = y + tap / 3 - 1, from_x = column * params.stride + tap % 3 - 1;
                if (from_y < 0 || from_y >= params.height || from_x < 0 || from_x >= params.width) continue;
                const int64_t pixel = (image * params.height + from_y) * params.width + from_x;
                sum = std::fma(params.x[pixel * channels + channel], params.taps[tap * channels + channel],
                               sum);
            }
            params.out[(row * out_width + column) * channels + channel] =
                0.5f * sum * (1.0f + std::erf(sum * 0.707106781f));
        }
    }
}

}  // namespace meditok
