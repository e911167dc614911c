// vq_update on the device: whether anything was counted; the counts and their sum, a block a group; then 8 or 32 threads
// a code for its sums and its row. Float32 operations are rounded one by one, as on the CPU.

#include "vq/vq_train_cuda.cuh"

namespace meditok {

namespace {

constexpr int kThreads = 256;

struct Scratch {
    int32_t* any;    // (1) not 0: something was counted
    double* totals;  // (groups)
};

__global__ void __launch_bounds__(kThreads)
    any_kernel(const __grid_constant__ UpdateParams params, Scratch scratch) {
    const int64_t cell = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    bool any = false;
    if (cell < params.groups * params.codes) {
        const auto [group, code] = split_pair(cell, params.codes);
        any = params.counts[group * params.counts_strides[0] + code * params.counts_strides[1]] > 0;
    }
    if (__syncthreads_or(any) && threadIdx.x == 0) *scratch.any = 1;  // whoever writes, writes the same
}

__global__ void __launch_bounds__(kThreads)
    counts_kernel(const __grid_constant__ UpdateParams params, Scratch scratch) {
    if (*scratch.any == 0) return;
    const float keep = static_cast<float>(params.decay), take = static_cast<float>(1.0 - params.decay);
    for (int64_t group = blockIdx.x; group < params.groups; group += gridDim.x) {
        double total = 0.0;
        for (int64_t code = threadIdx.x; code < params.codes; code += kThreads) {
            float& count =
                params.ema_counts[group * params.ema_counts_strides[0] + code * params.ema_counts_strides[1]];
            const int64_t counted =
                params.counts[group * params.counts_strides[0] + code * params.counts_strides[1]];
            count = __fadd_rn(__fmul_rn(count, keep), __fmul_rn(static_cast<float>(counted), take));
            total += static_cast<double>(count);
        }
        total = block_sum<kThreads>(total);
        if (threadIdx.x == 0) scratch.totals[group] = total;
    }
}

template <int kLanes>
__global__ void __launch_bounds__(kThreads, 4)
    rows_kernel(const __grid_constant__ UpdateParams params, Scratch scratch) {
    if (*scratch.any == 0) return;
    const int lane = threadIdx.x % kLanes;
    const int64_t cell = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
    const bool present = cell < params.groups * params.codes;
    const auto [group, code] = split_pair(present ? cell : 0, params.codes);
    const float keep = static_cast<float>(params.decay), take = static_cast<float>(1.0 - params.decay);
    const int64_t *es = params.ema_sums_strides, *ss = params.sums_strides, *cs = params.codebook_strides;
    float* sums = params.ema_sums + group * es[0] + code * es[1];
    const float* added = params.sums + group * ss[0] + code * ss[1];
    double square = 0.0;
    for (int64_t i = lane; i < params.width && present; i += kLanes) {
        const float sum = __fadd_rn(__fmul_rn(sums[i * es[2]], keep), __fmul_rn(added[i * ss[2]], take));
        sums[i * es[2]] = sum;
        square += static_cast<double>(sum) * static_cast<double>(sum);
    }
    double length;  // what the sums are divided by
    bool changes;
    if (params.metric == Metric::kCosine) {
        length = sqrt(lane_sum<kLanes>(square));
        changes = length > kFloor;
    } else {
        const double count =
            params.ema_counts[group * params.ema_counts_strides[0] + code * params.ema_counts_strides[1]];
        const double total = scratch.totals[group];
        length = (count + params.eps) / (total + static_cast<double>(params.codes) * params.eps) * total;
        changes = length > 0.0;
    }
    for (int64_t i = lane; i < params.width && present && changes; i += kLanes) {
        store_element(params.codebook, params.type, group * cs[0] + code * cs[1] + i * cs[2],
                      static_cast<double>(sums[i * es[2]]) / length);
    }
}

template <int kLanes>
void launch_rows(const UpdateParams& params, const Scratch& scratch, cudaStream_t stream) {
    const unsigned blocks = blocks_for(params.groups * params.codes, kThreads / kLanes);
    rows_kernel<kLanes><<<blocks, kThreads, 0, stream>>>(params, scratch);
    cuda_check(cudaGetLastError(), "vq_update (rows)");
}

}  // namespace

void vq_update_cuda(const UpdateParams& params, int device, void* stream) {
    const int64_t cells = params.groups * params.codes;
    if (cells == 0) return;
    require_pairs(0, params.groups, params.codes);
    DeviceGuard guard(device);
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    const Scratch scratch{reinterpret_cast<int32_t*>(params.scratch),
                          reinterpret_cast<double*>(params.scratch + bytes_of(1, sizeof(int32_t)))};
    cuda_check(cudaMemsetAsync(scratch.any, 0, sizeof(int32_t), queue), "vq_update memset");
    any_kernel<<<blocks_for(cells, kThreads), kThreads, 0, queue>>>(params, scratch);
    cuda_check(cudaGetLastError(), "vq_update (any)");
    const unsigned groups = static_cast<unsigned>(params.groups < 65535 ? params.groups : 65535);
    counts_kernel<<<groups, kThreads, 0, queue>>>(params, scratch);
    cuda_check(cudaGetLastError(), "vq_update (counts)");
    if (params.width <= kNarrow) {
        launch_rows<kNarrowLanes>(params, scratch, queue);
    } else {
        launch_rows<kWideLanes>(params, scratch, queue);
    }
}

}  // namespace meditok
