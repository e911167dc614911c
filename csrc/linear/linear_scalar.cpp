// Plain loops: float32 values, sums in double and in index order. No ties; NaN and infinity go the way of the arithmetic.

#include <cmath>
#include <vector>

#include "linear/linear.h"

namespace meditok {

namespace {

void normalise(std::vector<float>& row, const Norm& norm) {
    const double width = static_cast<double>(row.size());
    double mean = 0.0, variance = 0.0;
    for (float value : row) mean += value;
    mean /= width;
    for (float value : row) variance += (value - mean) * (value - mean);
    const double factor = 1.0 / std::sqrt(variance / width + norm.eps);
    for (size_t k = 0; k < row.size(); ++k) {
        row[k] = static_cast<float>((row[k] - mean) * factor) * norm.gain[k] + norm.bias[k];
    }
}

float product(const std::vector<float>& row, const float* weight, const float* bias, int64_t column) {
    const float* w = weight + column * static_cast<int64_t>(row.size());
    double sum = bias == nullptr ? 0.0 : bias[column];
    for (size_t k = 0; k < row.size(); ++k) sum += static_cast<double>(row[k]) * w[k];
    return static_cast<float>(sum);
}

float activate(float value, Activation activation) {
    if (activation == Activation::kNone) return value;
    if (activation == Activation::kGelu) return 0.5f * value * (1.0f + std::erf(value * 0.707106781f));
    return 0.5f * value * (1.0f + std::tanh(0.797884561f * (value + 0.044715f * value * value * value)));
}

}  // namespace

void linear_scalar(const LinearParams& params, int64_t begin, int64_t end, int64_t first, int64_t last) {
    std::vector<float> row(static_cast<size_t>(params.width));
    for (int64_t r = begin; r < end; ++r) {
        const float* x = params.x + r * params.x_stride;
        row.assign(x, x + params.width);
        for (int i = 0; i < params.norms; ++i) normalise(row, params.norm[i]);
        for (int64_t column = first; column < last; ++column) {
            float value = activate(product(row, params.weight, params.bias, column), params.activation);
            if (params.activation == Activation::kGeglu) {
                value *= product(row, params.gate_weight, params.gate_bias, column);
            }
            if (params.residual != nullptr) value += params.residual[r * params.residual_stride + column];
            params.out[r * params.columns + column] = value;
        }
    }
}

}  // namespace meditok
