// vq_quantize_backward on the device:
//   step   one thread block: 2 grad_loss / elements
//   norms  8 or 32 threads a code: 1 / its norm, so that nothing below divides by element
//   rows   8 or 32 threads a row: the gradient to x, and 1 / |x|
//   sums   the rows ordered by code (vq_order.cu), then sum x_hat of each code in float64 (vq_sums.cuh)
//   codes  8 or 32 threads a code: the sum of e - x_hat taken through the normalisation
// No float atomics: the same bits in every run. Traffic: x and grad_z once and x once more for the sums, grad_x once.

#include "vq/vq_sums.cuh"

namespace meditok {

namespace {

constexpr int kThreads = 256;
constexpr int kStepThreads = 1024;

struct Scratch {
    double* step;          // (1)
    double* norms;         // (groups, codes) 1 / max(|c|, 1e-12), 1 for l2
    double* inverse;       // (rows, groups) 1 / max(|x|, 1e-12), 1 for l2
    unsigned char* order;  // order_scratch_bytes
    double* sums;          // (groups, codes, width) sum of e - x_hat
};

Scratch split(const QuantizeBackwardParams& params) {
    const Codebook& codebook = params.codebook;
    const int64_t cells = codebook.groups * codebook.codes;
    unsigned char* at = params.scratch;
    Scratch scratch;
    scratch.step = reinterpret_cast<double*>(at);
    at += bytes_of(1, sizeof(double));
    scratch.norms = reinterpret_cast<double*>(at);
    at += bytes_of(cells, sizeof(double));
    scratch.inverse = reinterpret_cast<double*>(at);
    at += bytes_of(params.rows * codebook.groups, sizeof(double));
    scratch.order = at;
    at += order_scratch_bytes(params.rows, codebook.groups, codebook.codes);
    scratch.sums = reinterpret_cast<double*>(at);
    return scratch;
}

__global__ void __launch_bounds__(kStepThreads)
    step_kernel(const __grid_constant__ QuantizeBackwardParams params, double* step) {
    const double elements = used_elements<kStepThreads>(params.mask, params.mask_stride, params.rows,
                                                        params.codebook.groups * params.codebook.width);
    if (threadIdx.x == 0) *step = 2.0 * static_cast<double>(*params.grad_loss) / elements;
}

template <int kLanes, class T>
__global__ void __launch_bounds__(kThreads)
    norms_kernel(const __grid_constant__ QuantizeBackwardParams params, double* norms) {
    const Codebook& codebook = params.codebook;
    const int lane = threadIdx.x % kLanes;
    const int64_t cell = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
    const bool present = cell < codebook.groups * codebook.codes;
    const bool cosine = params.metric == Metric::kCosine;
    const auto [group, code] = split_pair(present ? cell : 0, codebook.codes);
    double square = 0.0;
    for (int64_t i = lane; i < codebook.width && present && cosine; i += kLanes) {
        const double value = code_element<T>(codebook, group, code, i);
        square += value * value;
    }
    const double norm = floored(sqrt(lane_sum<kLanes>(square)));
    if (present && lane == 0) norms[cell] = cosine ? 1.0 / norm : 1.0;
}

// Element i of a code as vq_lookup has it, to half an ulp of the type.
template <class T>
__device__ inline double unit_element(const Codebook& codebook, int64_t group, int64_t code, int64_t i,
                                      double inverse_norm) {
    return rounded<T>(code_element<T>(codebook, group, code, i) * inverse_norm);
}

// The factors of g, x_hat and e in the gradient turned by the rotation trick, s (g - 2 r (r.g) + 2 p (q.g)) with p, q
// the unit vectors of x_hat and e, r that of p + q, and s = |e| / |x_hat|.
struct Turn {
    double grad, hat, code;
};

template <int kLanes, class X, class G, class E>
__device__ inline Turn turn_of(const X& hat, const G& grad, const E& code, int lane, int64_t width) {
    double hat_square = 0.0, code_square = 0.0, hat_grad = 0.0, code_grad = 0.0;
    for (int64_t i = lane; i < width; i += kLanes) {
        const double h = hat(i), g = grad(i), e = code(i);
        hat_square += h * h;
        code_square += e * e;
        hat_grad += h * g;
        code_grad += e * g;
    }
    const double hat_norm = floored(sqrt(lane_sum<kLanes>(hat_square)));
    const double code_norm = floored(sqrt(lane_sum<kLanes>(code_square)));
    const double p_g = lane_sum<kLanes>(hat_grad) / hat_norm;
    const double q_g = lane_sum<kLanes>(code_grad) / code_norm;
    double middle = 0.0;
    for (int64_t i = lane; i < width; i += kLanes) {
        const double r = hat(i) / hat_norm + code(i) / code_norm;
        middle += r * r;
    }
    const double middle_norm = floored(sqrt(lane_sum<kLanes>(middle)));
    const double stretch = code_norm / hat_norm;
    const double mirror = 2.0 * (p_g + q_g) / middle_norm / middle_norm;  // 2 (r.g) / |p + q|
    return Turn{stretch, stretch * (2.0 * q_g - mirror) / hat_norm, -stretch * mirror / code_norm};
}

template <int kLanes, class T>
__global__ void __launch_bounds__(kThreads) rows_kernel(const __grid_constant__ QuantizeBackwardParams params,
                                                        const __grid_constant__ RowIds ids, Scratch scratch) {
    const Codebook& codebook = params.codebook;
    const int64_t width = codebook.width;
    const int lane = threadIdx.x % kLanes;
    const int64_t pair = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
    const bool present = pair < params.rows * codebook.groups;
    const Pair at = split_pair(present ? pair : 0, codebook.groups);
    const int64_t row = at.first, group = at.second;
    const bool kept = present && (params.mask == nullptr || params.mask[row * params.mask_stride] != 0);
    const bool cosine = params.metric == Metric::kCosine;
    const int64_t code = kept ? ids.code(row, group) : -1;
    const double code_scale = code >= 0 ? scratch.norms[group * codebook.codes + code] : 1.0;

    double norm = 1.0;
    if (cosine) {
        double square = 0.0;
        for (int64_t i = lane; i < width && kept; i += kLanes) {
            const double value = row_element<T>(params.x, params.x_strides, row, group, i);
            square += value * value;
        }
        norm = sqrt(lane_sum<kLanes>(square));
    }
    const double inverse = cosine ? 1.0 / floored(norm) : 1.0;
    if (present && lane == 0) scratch.inverse[pair] = inverse;
    const auto hat = [&](int64_t i) {
        return kept ? row_element<T>(params.x, params.x_strides, row, group, i) * inverse : 0.0;
    };
    const auto grad = [&](int64_t i) {
        return kept ? row_element<T>(params.grad_z, params.grad_z_strides, row, group, i) : 0.0;
    };
    const auto chosen = [&](int64_t i) {
        if (code < 0) return kept ? static_cast<double>(NAN) : 0.0;
        return unit_element<T>(codebook, group, code, i, code_scale);
    };
    Turn turn{1.0, 0.0, 0.0};
    if (params.rotation) turn = turn_of<kLanes>(hat, grad, chosen, lane, width);
    const double step = params.commitment_weight * *scratch.step;
    const auto turned = [&](int64_t i) {
        return turn.grad * grad(i) + ((turn.hat + step) * hat(i) + (turn.code - step) * chosen(i));
    };
    double along = 0.0;
    if (cosine) {
        for (int64_t i = lane; i < width; i += kLanes) along += hat(i) * turned(i);
        along = lane_sum<kLanes>(along);
        if (norm < kFloor) along = 0.0;  // the norm was a constant
    }
    for (int64_t i = lane; i < width && present; i += kLanes) {
        const double value = kept ? (turned(i) - hat(i) * along) * inverse : 0.0;
        from_double(value, static_cast<T*>(params.grad_x)[pair * width + i]);
    }
}

template <class T>
struct GradientJob {
    using Sum = double;
    QuantizeBackwardParams params;
    Scratch scratch;
    int64_t width;

    __device__ double value(int64_t row, int64_t group, int64_t column) const {
        return row_element<T>(params.x, params.x_strides, row, group, column) *
               scratch.inverse[row * params.codebook.groups + group];
    }
    __device__ void store(int64_t group, int64_t code, int64_t column, int64_t count, double sum) const {
        const int64_t cell = group * params.codebook.codes + code;
        double difference = 0.0;
        if (count > 0) {
            difference = static_cast<double>(count) *
                             unit_element<T>(params.codebook, group, code, column, scratch.norms[cell]) -
                         sum;
        }
        scratch.sums[cell * width + column] = difference;
    }
};

template <int kLanes, class T>
__global__ void __launch_bounds__(kThreads)
    codes_kernel(const __grid_constant__ QuantizeBackwardParams params, Scratch scratch) {
    const Codebook& codebook = params.codebook;
    const int64_t width = codebook.width;
    const int lane = threadIdx.x % kLanes;
    const int64_t cell = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
    const bool present = cell < codebook.groups * codebook.codes;
    const auto [group, code] = split_pair(present ? cell : 0, codebook.codes);
    const double factor = params.codebook_weight * *scratch.step;
    const double* sums = scratch.sums + cell * width;
    const double scale = present ? scratch.norms[cell] : 1.0;
    double along = 0.0;
    if (params.metric == Metric::kCosine) {
        for (int64_t i = lane; i < width && present; i += kLanes) {
            if (sums[i] != 0.0) along += sums[i] * unit_element<T>(codebook, group, code, i, scale);
        }
        along = lane_sum<kLanes>(along);
        if (!(scale < 1.0 / kFloor)) along = 0.0;  // the norm was a constant
    }
    for (int64_t i = lane; i < width && present; i += kLanes) {
        double value = sums[i];
        if (along != 0.0) value -= unit_element<T>(codebook, group, code, i, scale) * along;
        // A code that no row has gets 0, whatever the code is.
        from_double(value == 0.0 ? 0.0 : value * (factor * scale),
                    static_cast<T*>(params.grad_codebook)[cell * width + i]);
    }
}

template <int kLanes, class T>
void launch_backward(const QuantizeBackwardParams& params, const RowIds& ids, const Scratch& scratch,
                     void* stream) {
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    const Codebook& codebook = params.codebook;
    const int64_t cells = codebook.groups * codebook.codes, pairs = params.rows * codebook.groups;
    const unsigned code_blocks = blocks_for(cells, kThreads / kLanes);
    if (cells > 0) {
        norms_kernel<kLanes, T><<<code_blocks, kThreads, 0, queue>>>(params, scratch.norms);
        cuda_check(cudaGetLastError(), "vq_quantize_backward (norms)");
    }
    if (pairs > 0) {
        rows_kernel<kLanes, T>
            <<<blocks_for(pairs, kThreads / kLanes), kThreads, 0, queue>>>(params, ids, scratch);
        cuda_check(cudaGetLastError(), "vq_quantize_backward (rows)");
    }
    if (params.grad_codebook == nullptr || cells == 0) return;
    if (pairs == 0) {
        cuda_check(cudaMemsetAsync(scratch.sums, 0,
                                   static_cast<size_t>(cells * codebook.width) * sizeof(double), queue),
                   "vq_quantize_backward memset");
    } else {
        const RowOrder order = launch_order(ids, scratch.order, nullptr, stream);
        launch_sums(GradientJob<T>{params, scratch, codebook.width}, order, queue);
    }
    codes_kernel<kLanes, T><<<code_blocks, kThreads, 0, queue>>>(params, scratch);
    cuda_check(cudaGetLastError(), "vq_quantize_backward (codes)");
}

}  // namespace

void vq_quantize_backward_cuda(const QuantizeBackwardParams& params, int device, void* stream) {
    const Codebook& codebook = params.codebook;
    if (codebook.groups == 0 || codebook.width == 0) return;
    require_pairs(params.rows, codebook.groups, codebook.codes);
    DeviceGuard guard(device);
    const Scratch scratch = split(params);
    const RowIds ids{params.ids,         params.ids_strides[0], params.ids_strides[1], params.mask,
                     params.mask_stride, params.rows,           codebook.groups,       codebook.codes};
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    step_kernel<<<1, kStepThreads, 0, queue>>>(params, scratch.step);
    cuda_check(cudaGetLastError(), "vq_quantize_backward (step)");
    for_dtype(params.type, [&](auto element) {
        using T = decltype(element);
        if (codebook.width <= kNarrow) {
            launch_backward<kNarrowLanes, T>(params, ids, scratch, stream);
        } else {
            launch_backward<kWideLanes, T>(params, ids, scratch, stream);
        }
    });
}

}  // namespace meditok
