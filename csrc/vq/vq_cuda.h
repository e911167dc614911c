// Between the CUDA files of this folder. An element is read through its type at run time: once a row in the
// filter, and in the rare canonical scoring, so one kernel serves all types.
#pragma once

#include "vq/vq_canonical.h"
#include "vq/vq_filter.h"

namespace meditok {

// vq_assign_small_dim.cu covers widths up to 32, vq_assign_large_dim.cu the rest; vq_cuda.cpp chooses.
constexpr int64_t kSmallDim = 32;
void launch_assign_small_dim(const AssignParams& params, int device, void* stream);
void launch_assign_large_dim(const AssignParams& params, int device, void* stream);

#if defined(__CUDACC__)

__device__ inline double element(const void* data, Dtype type, int64_t index) {
    switch (type) {
        case Dtype::kFloat32: return to_double(static_cast<const float*>(data)[index]);
        case Dtype::kFloat16: return to_double(static_cast<const half_bits*>(data)[index]);
        case Dtype::kBfloat16: return to_double(static_cast<const bfloat16_bits*>(data)[index]);
        default: return static_cast<const double*>(data)[index];
    }
}

__device__ inline void store_element(void* data, Dtype type, int64_t index, double value) {
    switch (type) {
        case Dtype::kFloat32: from_double(value, static_cast<float*>(data)[index]); break;
        case Dtype::kFloat16: from_double(value, static_cast<half_bits*>(data)[index]); break;
        case Dtype::kBfloat16: from_double(value, static_cast<bfloat16_bits*>(data)[index]); break;
        default: static_cast<double*>(data)[index] = value;
    }
}

__device__ inline double code_element(const Codebook& codebook, int64_t group, int64_t code, int64_t i) {
    return element(codebook.data, codebook.type,
                   group * codebook.group_stride + code * codebook.code_stride + i * codebook.column_stride);
}

// value[i] = convert(element of index(i)) where wanted(i), else 0. The type is chosen once and all loads are on their
// way before the first is used.
template <int kCount, class T, class Index, class Wanted, class Value, class Convert>
__device__ __forceinline__ void read_as(const void* data, Index index, Wanted wanted, Value (&value)[kCount],
                                        Convert convert) {
    T raw[kCount] = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        if (wanted(i)) raw[i] = static_cast<const T*>(data)[index(i)];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) value[i] = convert(raw[i]);
}

template <int kCount, class Index, class Wanted, class Value, class Convert>
__device__ __forceinline__ void read_elements(const void* data, Dtype type, Index index, Wanted wanted,
                                              Value (&value)[kCount], Convert convert) {
    switch (type) {
        case Dtype::kFloat32: read_as<kCount, float>(data, index, wanted, value, convert); break;
        case Dtype::kFloat16: read_as<kCount, half_bits>(data, index, wanted, value, convert); break;
        case Dtype::kBfloat16: read_as<kCount, bfloat16_bits>(data, index, wanted, value, convert); break;
        default: read_as<kCount, double>(data, index, wanted, value, convert);
    }
}

// The canonical score, see vq_canonical.h. Out of line: rare, and its registers would weigh on the search.
static __device__ __noinline__ double device_score(const AssignParams& params, int64_t row, int64_t group,
                                                   int64_t code, double norm) {
    constexpr int kBatch = 4;
    const Codebook& codebook = params.codebook;
    const bool cosine = params.metric == Metric::kCosine;
    const int64_t x_start = row * params.row_stride + group * params.group_stride;
    const int64_t c_start = group * codebook.group_stride + code * codebook.code_stride;
    double sum = 0.0;
    for (int64_t first = 0; first < codebook.width; first += kBatch) {
        double x[kBatch], c[kBatch];
        auto wanted = [&](int i) { return first + i < codebook.width; };
        auto widen = [](auto value) { return to_double(value); };
        read_elements(
            params.x, params.x_type, [&](int i) { return x_start + (first + i) * params.column_stride; },
            wanted, x, widen);
        read_elements(
            codebook.data, codebook.type,
            [&](int i) { return c_start + (first + i) * codebook.column_stride; }, wanted, c, widen);
        for (int i = 0; i < kBatch; ++i) {  // beyond the width zeros are added, and the sum is never -0
            const double difference = plus(x[i], -c[i]);
            sum = plus(sum, cosine ? multiply(x[i], c[i]) : multiply(difference, difference));
        }
    }
    return cosine ? divide(sum, norm) : -sum;
}

#endif

}  // namespace meditok
