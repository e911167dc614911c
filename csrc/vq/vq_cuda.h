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

// Element i of x[row, group] and of codebook[group, code], canonical norm and score; see vq_canonical.h.
__device__ inline double x_element(const AssignParams& params, int64_t row, int64_t group, int64_t i) {
    return element(params.x, params.x_type,
                   row * params.row_stride + group * params.group_stride + i * params.column_stride);
}

__device__ inline double code_element(const Codebook& codebook, int64_t group, int64_t code, int64_t i) {
    return element(codebook.data, codebook.type,
                   group * codebook.group_stride + code * codebook.code_stride + i * codebook.column_stride);
}

// Out of line: rare, and its registers would weigh on the search.
static __device__ __noinline__ double device_score(const AssignParams& params, int64_t row, int64_t group,
                                                   int64_t code, double norm) {
    double sum = 0.0;
    const bool cosine = params.metric == Metric::kCosine;
    for (int64_t i = 0; i < params.codebook.width; ++i) {
        const double x = x_element(params, row, group, i), c = code_element(params.codebook, group, code, i);
        const double difference = plus(x, -c);
        sum = plus(sum, cosine ? multiply(x, c) : multiply(difference, difference));
    }
    return cosine ? divide(sum, norm) : -sum;
}

// One thread's search. `lower` is below the score of the best code so far; a code whose upper bound stays
// under it is out. A single code in the band is not scored at all: scoring waits for a second one.
struct Search {
    float lower = -INFINITY;
    float upper = -INFINITY;  // upper bound of the code held
    bool scored = false;
    Best best;

    // `largest` of a few filter values whose bounds are at most `margin`.
    __device__ void raise(float largest, float margin) {
        const float bound = largest - margin;
        lower = fmaxf(lower, bound - kSlack * fabsf(bound));
    }

    __device__ void consider(const AssignParams& params, const PackedView& view, int64_t row, int64_t group,
                             int64_t code, float code_upper) {
        if (!(code_upper >= lower)) return;
        if (best.code < 0 || upper < lower) {  // nothing held, or what is held is out by now
            best.code = code;
            scored = false;
            upper = code_upper;
            return;
        }
        if (!scored) best.score = device_score(params, row, group, best.code, view.norm[best.code]);
        scored = true;
        const int64_t held = best.code;
        best.consider(device_score(params, row, group, code, view.norm[code]), code);
        if (best.code != held) upper = code_upper;
    }
};

#endif

}  // namespace meditok
