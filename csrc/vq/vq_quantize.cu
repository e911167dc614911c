// vq_quantize on the device, after vq_assign on the same stream:
//   finish  8 or 32 threads a row: the mask, z as vq_lookup has it (with the norms of the packed codebook), the count,
//           and the squared error in float64
//   loss    one block adds the partial errors of the blocks in their order
// The counts are integer atomics, which any order leaves the same; everything else has one order. Traffic: x and the
// ids once, z once, the codes from the second-level cache.

#include "vq/vq_train_cuda.cuh"

namespace meditok {

namespace {

constexpr int kThreads = 256;
constexpr int kLossThreads = 1024;
static_assert(kThreads / kWideLanes >= kPartialPairs, "quantize_scratch_bytes counts the partial sums");

template <int kLanes, class T>
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ QuantizeParams params,
                                                          const __grid_constant__ PackedLayout layout) {
    const AssignParams& assign = params.assign;
    const Codebook& codebook = assign.codebook;
    const int lane = threadIdx.x % kLanes;
    const int64_t pair = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
    const bool present = pair < assign.rows * codebook.groups;
    const auto [row, group] = split_pair(pair, codebook.groups);
    const bool kept = present && (params.mask == nullptr || params.mask[row * params.mask_stride] != 0);
    const bool cosine = assign.metric == Metric::kCosine;
    const int64_t strides[3] = {assign.row_stride, assign.group_stride, assign.column_stride};
    T* z = static_cast<T*>(params.z) + pair * codebook.width;

    double scale = 1.0;  // takes x to x_hat
    if (cosine) {
        double square = 0.0;
        for (int64_t i = lane; i < codebook.width && kept; i += kLanes) {
            const double value = row_element<T>(assign.x, strides, row, group, i);
            square += value * value;
        }
        scale = 1.0 / floored(sqrt(lane_sum<kLanes>(square)));
    }
    const int64_t id = kept ? assign.ids[pair] : -1;
    const bool inside = id >= 0 && id < codebook.codes;
    double norm = 1.0;
    if (inside && cosine) norm = packed_view(assign.packed, layout, group).norm[id];
    double error = 0.0;
    for (int64_t i = lane; i < codebook.width && present; i += kLanes) {
        double code = 0.0;
        if (kept) {
            code = inside ? rounded<T>(divide(code_element<T>(codebook, group, id, i), norm))
                          : static_cast<double>(NAN);
            const double difference = row_element<T>(assign.x, strides, row, group, i) * scale - code;
            error += difference * difference;
        }
        from_double(code, z[i]);
    }
    if (lane == 0 && present && !kept) assign.ids[pair] = -1;
    if (lane == 0 && inside) {
        using Counter = unsigned long long;
        atomicAdd(reinterpret_cast<Counter*>(params.counts) + group * codebook.codes + id, Counter{1});
    }
    error = block_sum<kThreads>(error);
    if (threadIdx.x == 0) reinterpret_cast<double*>(params.scratch)[blockIdx.x] = error;
}

__global__ void __launch_bounds__(kLossThreads)
    loss_kernel(const __grid_constant__ QuantizeParams params, int64_t partials) {
    const double* errors = reinterpret_cast<const double*>(params.scratch);
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < partials; i += kLossThreads) sum += errors[i];
    sum = block_sum<kLossThreads>(sum);
    const Codebook& codebook = params.assign.codebook;
    const double elements = used_elements<kLossThreads>(params.mask, params.mask_stride, params.assign.rows,
                                                        codebook.groups * codebook.width);
    if (threadIdx.x == 0) {
        *params.loss =
            static_cast<float>((params.commitment_weight + params.codebook_weight) * (sum / elements));
    }
}

template <int kLanes, class T>
int64_t launch_finish(const QuantizeParams& params, const PackedLayout& layout, cudaStream_t stream) {
    const int64_t pairs = params.assign.rows * params.assign.codebook.groups;
    const unsigned blocks = blocks_for(pairs, kThreads / kLanes);
    finish_kernel<kLanes, T><<<blocks, kThreads, 0, stream>>>(params, layout);
    cuda_check(cudaGetLastError(), "vq_quantize (finish)");
    return blocks;
}

}  // namespace

void vq_quantize_cuda(const QuantizeParams& params, int device, void* stream) {
    const Codebook& codebook = params.assign.codebook;
    require_pairs(params.assign.rows, codebook.groups, codebook.codes);
    DeviceGuard guard(device);
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    const size_t cells = static_cast<size_t>(codebook.groups * codebook.codes);
    if (cells > 0) {
        cuda_check(cudaMemsetAsync(params.counts, 0, cells * sizeof(int64_t), queue), "vq_quantize memset");
    }
    int64_t partials = 0;
    if (params.assign.rows > 0 && codebook.groups > 0) {
        vq_assign_cuda(params.assign, device, stream);
        const PackedLayout layout = packed_layout(codebook.groups, codebook.codes, codebook.width);
        for_dtype(codebook.type, [&](auto element) {
            using T = decltype(element);
            partials = codebook.width <= kNarrow ? launch_finish<kNarrowLanes, T>(params, layout, queue)
                                                 : launch_finish<kWideLanes, T>(params, layout, queue);
        });
    }
    loss_kernel<<<1, kLossThreads, 0, queue>>>(params, partials);
    cuda_check(cudaGetLastError(), "vq_quantize (loss)");
}

}  // namespace meditok
