// vq_lookup on the device: one thread a row for narrow codes, one warp a row for wide ones. For cosine the
// norm is summed in index order by every lane alike, because the order is part of the answer; the loads are
// broadcasts.

#include "common/check.h"
#include "vq/vq_cuda.h"

namespace meditok {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 20;

// kLanes threads work on one row of one group.
template <int kLanes>
__global__ void __launch_bounds__(kThreads) lookup_kernel(LookupParams params) {
    const Codebook& codebook = params.codebook;
    const int64_t pairs = params.rows * codebook.groups;
    const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / kLanes);
    const int lane = threadIdx.x % kLanes;
    for (int64_t pair = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
         pair < pairs; pair += step) {
        const int64_t row = pair / codebook.groups, group = pair % codebook.groups;
        const int64_t id = params.ids[row * params.row_stride + group * params.group_stride];
        const bool inside = id >= 0 && id < codebook.codes;
        double norm = 1.0;
        if (inside && params.metric == Metric::kCosine) {
            double sum = 0.0;
            for (int64_t i = 0; i < codebook.width; ++i) {
                const double value = code_element(codebook, group, id, i);
                sum = plus(sum, multiply(value, value));
            }
            norm = square_root(sum);
            if (norm < kFloor) norm = kFloor;
        }
        for (int64_t i = lane; i < codebook.width; i += kLanes) {
            // x / 1 is x, so l2 takes the same way.
            const double value =
                inside ? divide(code_element(codebook, group, id, i), norm) : static_cast<double>(NAN);
            store_element(params.out, codebook.type, pair * codebook.width + i, value);
        }
    }
}

template <int kLanes>
void launch_lookup(const LookupParams& params, cudaStream_t stream) {
    const int64_t per_block = kThreads / kLanes;
    const int64_t blocks = (params.rows * params.codebook.groups + per_block - 1) / per_block;
    lookup_kernel<kLanes>
        <<<static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads, 0, stream>>>(params);
    cuda_check(cudaGetLastError(), "vq_lookup");
}

}  // namespace

void vq_lookup_cuda(const LookupParams& params, int device, void* stream) {
    if (params.rows == 0 || params.codebook.groups == 0 || params.codebook.width == 0) return;
    DeviceGuard guard(device);
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    if (params.codebook.width <= kSmallDim) {
        launch_lookup<1>(params, queue);
    } else {
        launch_lookup<32>(params, queue);
    }
}

}  // namespace meditok
