// The canonical score: what every backend's answer is measured by. Compiled for CPU and GPU from this one
// text; the CPU files that include it are built with -ffp-contract=off, the GPU spells out the rounding of
// each operation.
#pragma once

#include <cmath>

#include "vq/vq.h"

namespace meditok {

#if defined(__CUDA_ARCH__)
MEDITOK_HD inline double multiply(double a, double b) {
    return __dmul_rn(a, b);
}
MEDITOK_HD inline double plus(double a, double b) {
    return __dadd_rn(a, b);
}
MEDITOK_HD inline double divide(double a, double b) {
    return __ddiv_rn(a, b);
}
MEDITOK_HD inline double square_root(double a) {
    return __dsqrt_rn(a);
}
#else
MEDITOK_HD inline double multiply(double a, double b) {
    return a * b;
}
MEDITOK_HD inline double plus(double a, double b) {
    return a + b;
}
MEDITOK_HD inline double divide(double a, double b) {
    return a / b;
}
MEDITOK_HD inline double square_root(double a) {
    return sqrt(a);
}
#endif

// max(|c|, 1e-12), or NaN for a code with a NaN or infinity.
template <class T>
MEDITOK_HD inline double canonical_norm(const T* code, int64_t stride, int64_t width) {
    double sum = 0.0;
    bool finite = true;
    for (int64_t i = 0; i < width; ++i) {
        const double value = to_double(code[i * stride]);
        finite = finite && is_finite(value);
        sum = plus(sum, multiply(value, value));
    }
    const double norm = square_root(sum);
    if (!finite) return static_cast<double>(float_from_bits(0x7fc00000u));
    return norm > 1e-12 ? norm : 1e-12;
}

// Larger is better for both metrics: s for cosine, -s for l2. x[i * x_step] is element i of the vector.
template <class T, class X>
MEDITOK_HD inline double canonical_score(const X* x, int64_t x_step, const T* code, int64_t stride,
                                         int64_t width, double norm, Metric metric) {
    double sum = 0.0;
    if (metric == Metric::kCosine) {
        for (int64_t i = 0; i < width; ++i) {
            sum = plus(sum, multiply(to_double(x[i * x_step]), to_double(code[i * stride])));
        }
        return divide(sum, norm);
    }
    for (int64_t i = 0; i < width; ++i) {
        const double difference = plus(to_double(x[i * x_step]), -to_double(code[i * stride]));
        sum = plus(sum, multiply(difference, difference));
    }
    return -sum;
}

// The best code so far. A NaN score is never better, and the first candidate needs no comparison.
struct Best {
    double score = 0.0;
    int64_t code = -1;

    MEDITOK_HD void consider(double candidate, int64_t candidate_code) {
        if (candidate == candidate && (code < 0 || candidate > score)) {
            score = candidate;
            code = candidate_code;
        }
    }
};

}  // namespace meditok
