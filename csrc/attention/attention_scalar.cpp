// The plain loops, in float64, keys and columns in index order: the meaning of attention.h, for any type and shape.

#include <cmath>
#include <limits>

#include "attention/attention_cpu.h"

namespace meditok {

namespace {

int64_t offset(const AttentionStrides& strides, int64_t b, int64_t h, int64_t token) {
    return b * strides.batch + h * strides.head + token * strides.token;
}

template <class T>
double dot(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t width) {
    double sum = 0.0;
    for (int64_t i = 0; i < width; ++i) sum += to_double(a[i * a_stride]) * to_double(b[i * b_stride]);
    return sum;
}

// scores[j] of query i, -inf where key j is not attended.
template <class T>
void score_row(const AttentionParams& params, int64_t b, int64_t h, int64_t i, double* scores) {
    constexpr double kNever = -std::numeric_limits<double>::infinity();
    const T* q = static_cast<const T*>(params.q) + offset(params.q_strides, b, h, i);
    for (int64_t j = 0; j < params.keys; ++j) {
        const int64_t at = offset(params.mask_strides, b, h, i) + j * params.mask_strides.column;
        double bias = 0.0;
        if (params.mask_kind == MaskKind::kCausal && j > i) bias = kNever;
        if (params.mask_kind == MaskKind::kBool && static_cast<const unsigned char*>(params.mask)[at] == 0) {
            bias = kNever;
        }
        if (params.mask_kind == MaskKind::kAdditive) bias = to_double(static_cast<const T*>(params.mask)[at]);
        scores[j] = bias;
        if (bias == kNever) continue;
        const T* k = static_cast<const T*>(params.k) + offset(params.k_strides, b, h, j);
        scores[j] =
            bias + params.scale * dot(q, params.q_strides.column, k, params.k_strides.column, params.width);
    }
}

bool attended(double score) {
    return score != -std::numeric_limits<double>::infinity();  // true for NaN
}

template <class T>
void forward_row(const AttentionParams& params, int64_t b, int64_t h, int64_t i, double* p, double* sums) {
    score_row<T>(params, b, h, i, p);
    double largest = -std::numeric_limits<double>::infinity(), total = 0.0;
    for (int64_t j = 0; j < params.keys; ++j) largest = p[j] > largest ? p[j] : largest;
    for (int64_t c = 0; c < params.width; ++c) sums[c] = 0.0;
    for (int64_t j = 0; j < params.keys; ++j) {
        if (!attended(p[j])) continue;
        const double weight = std::exp(p[j] - largest);
        total += weight;
        const T* v = static_cast<const T*>(params.v) + offset(params.v_strides, b, h, j);
        for (int64_t c = 0; c < params.width; ++c)
            sums[c] += weight * to_double(v[c * params.v_strides.column]);
    }
    for (int64_t c = 0; c < params.width; ++c) sums[c] = total == 0.0 ? 0.0 : sums[c] / total;
    if (params.lse != nullptr) {
        params.lse[(b * params.heads + h) * params.queries + i] = static_cast<float>(
            total == 0.0 ? std::numeric_limits<double>::infinity() : largest + std::log(total));
    }
}

template <class T>
void forward(const AttentionParams& params, int64_t b, int64_t h, int64_t begin, int64_t end,
             double* scratch) {
    double *p = scratch, *sums = p + params.keys, *mean = sums + params.width;
    for (int64_t i = begin; i < end; ++i) {
        T* out = static_cast<T*>(params.out) + offset(params.out_strides, b, params.mean ? 0 : h, i);
        if (!params.mean) forward_row<T>(params, b, h, i, p, sums);
        for (int64_t c = 0; c < params.width; ++c) mean[c] = params.mean ? 0.0 : sums[c];
        for (int64_t head = 0; params.mean && head < params.heads; ++head) {
            forward_row<T>(params, b, head, i, p, sums);
            for (int64_t c = 0; c < params.width; ++c) {
                mean[c] += sums[c] / static_cast<double>(params.heads);
            }
        }
        for (int64_t c = 0; c < params.width; ++c) from_double(mean[c], out[c * params.out_strides.column]);
    }
}

// sums[c] += factor * row[c]
template <class T>
void add_row(double* sums, double factor, const T* row, int64_t stride, int64_t width) {
    for (int64_t c = 0; c < width; ++c) sums[c] += factor * to_double(row[c * stride]);
}

template <class T>
void write_row(void* out, const AttentionStrides& strides, int64_t b, int64_t h, int64_t token,
               const double* row, int64_t width) {
    T* to = static_cast<T*>(out) + offset(strides, b, h, token);
    for (int64_t c = 0; c < width; ++c) from_double(row[c], to[c * strides.column]);
}

template <class T>
void backward(const AttentionBackwardParams& params, int64_t b, int64_t h, double* scratch) {
    const AttentionParams& f = params.forward;
    const int64_t width = f.width;
    double *grad_k = scratch, *grad_v = grad_k + f.keys * width, *grad_q = grad_v + f.keys * width;
    double *p = grad_q + width, *dp = p + f.keys;
    for (int64_t n = 0; n < 2 * f.keys * width; ++n) grad_k[n] = 0.0;
    const double share = f.mean ? 1.0 / static_cast<double>(f.heads) : 1.0;
    for (int64_t i = 0; i < f.queries; ++i) {
        const T* q = static_cast<const T*>(f.q) + offset(f.q_strides, b, h, i);
        const T* grad =
            static_cast<const T*>(params.grad_out) + offset(params.grad_out_strides, b, f.mean ? 0 : h, i);
        for (int64_t c = 0; c < width; ++c) grad_q[c] = 0.0;
        score_row<T>(f, b, h, i, p);
        double largest = -std::numeric_limits<double>::infinity(), total = 0.0, delta = 0.0;
        for (int64_t j = 0; j < f.keys; ++j) largest = p[j] > largest ? p[j] : largest;
        for (int64_t j = 0; j < f.keys; ++j) {
            p[j] = attended(p[j]) ? std::exp(p[j] - largest) : -1.0;
            if (p[j] != -1.0) total += p[j];
        }
        for (int64_t j = 0; j < f.keys; ++j) {
            if (p[j] == -1.0) continue;
            p[j] /= total;
            const T* v = static_cast<const T*>(f.v) + offset(f.v_strides, b, h, j);
            dp[j] = share * dot(grad, params.grad_out_strides.column, v, f.v_strides.column, width);
            delta += p[j] * dp[j];
        }
        for (int64_t j = 0; j < f.keys; ++j) {
            if (p[j] == -1.0) continue;
            const double ds = f.scale * p[j] * (dp[j] - delta);
            const T* k = static_cast<const T*>(f.k) + offset(f.k_strides, b, h, j);
            add_row(grad_q, ds, k, f.k_strides.column, width);
            add_row(grad_k + j * width, ds, q, f.q_strides.column, width);
            add_row(grad_v + j * width, share * p[j], grad, params.grad_out_strides.column, width);
        }
        write_row<T>(params.grad_q, params.grad_q_strides, b, h, i, grad_q, width);
    }
    for (int64_t j = 0; j < f.keys; ++j) {
        write_row<T>(params.grad_k, params.grad_k_strides, b, h, j, grad_k + j * width, width);
        write_row<T>(params.grad_v, params.grad_v_strides, b, h, j, grad_v + j * width, width);
    }
}

}  // namespace

AttentionKernel attention_scalar() {
    return AttentionKernel{
        [](const AttentionParams& params, int64_t) {
            return static_cast<size_t>(params.keys + 2 * params.width) * sizeof(double);
        },
        [](const AttentionParams& params, int64_t b, int64_t h, int64_t begin, int64_t end,
           unsigned char* scratch) {
            for_dtype(params.type, [&](auto element) {
                forward<decltype(element)>(params, b, h, begin, end, reinterpret_cast<double*>(scratch));
            });
            return true;
        },
        [](const AttentionBackwardParams& params) {
            const AttentionParams& f = params.forward;
            return static_cast<size_t>(2 * f.keys * f.width + f.width + 2 * f.keys) * sizeof(double);
        },
        [](const AttentionBackwardParams& params, int64_t b, int64_t h, unsigned char* scratch) {
            for_dtype(params.forward.type, [&](auto element) {
                backward<decltype(element)>(params, b, h, reinterpret_cast<double*>(scratch));
            });
            return true;
        }};
}

}  // namespace meditok
