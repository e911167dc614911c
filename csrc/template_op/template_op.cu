// out[i] = x[i], one element a thread in a grid-stride loop. Traffic: 8 bytes an element, so bound by memory;
// a block of 256 threads keeps enough loads in flight on every architecture.

#include "common/check.h"
#include "template_op/template_op.h"

namespace meditok {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;
static_assert(kThreads % 32 == 0, "whole warps");

__global__ void __launch_bounds__(kThreads) template_op_kernel(TemplateParams params) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < params.size; i += step) {
        params.out[i] = params.x[i * params.stride];
    }
}

}  // namespace

void template_op_cuda(const TemplateParams& params, int device, void* stream) {
    if (params.size == 0) return;
    DeviceGuard guard(device);
    const int64_t blocks = (params.size + kThreads - 1) / kThreads;
    const int grid = static_cast<int>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
    template_op_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
    cuda_check(cudaGetLastError(), "template_op");
}

}  // namespace meditok
