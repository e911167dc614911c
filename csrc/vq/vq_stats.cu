// vq_stats on the device: the rows ordered by code (vq_order.cu), then summed in float32 (vq_sums.cuh): the bits of the
// CPU, in every run. Traffic: the ids twice, the order out and in, x once.

#include "vq/vq_sums.cuh"

namespace meditok {

namespace {

template <class T>
struct StatsJob {
    using Sum = float;
    StatsParams params;
    int64_t width;

    __device__ float value(int64_t row, int64_t group, int64_t column) const {
        return static_cast<float>(row_element<T>(params.x, params.x_strides, row, group, column));
    }
    __device__ void store(int64_t group, int64_t code, int64_t column, int64_t, float sum) const {
        params.sums[(group * params.codes + code) * width + column] = sum;
    }
};

}  // namespace

void vq_stats_cuda(const StatsParams& params, int device, void* stream) {
    const int64_t cells = params.groups * params.codes;
    if (cells == 0) return;
    require_pairs(params.rows, params.groups, params.codes);
    DeviceGuard guard(device);
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    if (params.rows == 0) {
        const size_t elements = static_cast<size_t>(cells * params.width);
        cuda_check(cudaMemsetAsync(params.counts, 0, static_cast<size_t>(cells) * sizeof(int64_t), queue),
                   "vq_stats memset");
        if (elements > 0)
            cuda_check(cudaMemsetAsync(params.sums, 0, elements * sizeof(float), queue), "vq_stats memset");
        return;
    }
    const RowIds rows{params.ids, params.ids_strides[0], params.ids_strides[1], nullptr,
                      0,          params.rows,           params.groups,         params.codes};
    const RowOrder order = launch_order(rows, params.scratch, params.counts, stream);
    if (params.width == 0) return;
    for_dtype(params.type, [&](auto element) {
        launch_sums(StatsJob<decltype(element)>{params, params.width}, order, queue);
    });
}

}  // namespace meditok
