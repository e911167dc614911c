// Packing on the device: one thread a code, a warp a tile, so that a tile's columns are written 128 bytes at
// a time. Exact copies of a code are not looked for here; they cost time in the search, not correctness.

#include "common/check.h"
#include "common/warp.cuh"
#include "vq/vq_cuda.h"

namespace meditok {

namespace {

constexpr int kThreads = 128;
static_assert(kThreads % 32 == 0, "a warp packs a tile");

__global__ void init_kernel(PackedHeader header, PackedLayout layout, unsigned char* packed) {
    if (threadIdx.x == 0) *reinterpret_cast<PackedHeader*>(packed) = header;
    for (int64_t group = threadIdx.x; group < header.groups; group += blockDim.x) {
        *const_cast<PackedGroup*>(packed_view(packed, layout, group).group) = PackedGroup{0, -1, 0};
    }
}

__global__ void __launch_bounds__(kThreads)
    pack_kernel(Codebook codebook, Metric metric, PackedLayout layout, unsigned char* packed) {
    const int64_t code = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t tile = code / kTileCodes, width = codebook.width;
    const int lane = static_cast<int>(code % kTileCodes);
    if (tile >= layout.tiles) return;  // whole warps leave
    for (int64_t group = blockIdx.y; group < codebook.groups; group += gridDim.y) {
        const PackedView view = packed_view(packed, layout, group);
        using Counter = unsigned long long;
        Counter* choosable = reinterpret_cast<Counter*>(const_cast<int64_t*>(&view.group->choosable));
        Counter* first = reinterpret_cast<Counter*>(const_cast<int64_t*>(&view.group->first_choosable));
        Counter* unsafe = reinterpret_cast<Counter*>(const_cast<int64_t*>(&view.group->unsafe));
        float bias = -INFINITY, radius = 0.0f;
        double norm = 1.0;
        bool filtered = false;
        if (code < codebook.codes) {
            double sum = 0.0, largest = 0.0;
            bool finite = true;
            for (int64_t i = 0; i < width; ++i) {
                const double value = code_element(codebook, group, code, i);
                finite = finite && is_finite(value);
                largest = fmax(largest, fabs(value));
                sum = plus(sum, multiply(value, value));
            }
            norm = square_root(sum);
            norm = norm > kFloor ? norm : kFloor;
            if (!finite) norm = static_cast<double>(NAN);
            const_cast<double*>(view.norm)[code] = norm;
            if (finite) {
                const bool cosine = metric == Metric::kCosine;
                filtered = cosine ? norm < kLargestCosine && (largest == 0.0 || largest > kSmallestCosine)
                                  : norm < kLargestL2;
                bias = !filtered ? -INFINITY : cosine ? 0.0f : static_cast<float>(-0.5 * norm * norm);
                radius = !filtered ? 0.0f : cosine ? 1.0f : static_cast<float>(norm) * kRoundUp;
                if (!cosine) norm = 1.0;  // the filter code of l2 is the code itself
                atomicAdd(choosable, Counter{1});
                atomicMin(first, static_cast<Counter>(code));  // -1 is the largest unsigned number
                if (!filtered) atomicAdd(unsafe, Counter{1});
            }
        }
        float* column = const_cast<float*>(view.tiles) + tile * width * kTileCodes + lane;
        for (int64_t i = 0; i < width; ++i) {
            column[i * kTileCodes] =
                filtered ? static_cast<float>(divide(code_element(codebook, group, code, i), norm)) : 0.0f;
        }
        const_cast<float*>(view.bias)[code] = bias;
        const_cast<float*>(view.radius)[code] = radius;
        const float reach = warp_max(radius);
        if (lane == 0) const_cast<float*>(view.reach)[tile] = reach;
    }
}

}  // namespace

void vq_pack_cuda(const Codebook& codebook, Metric metric, unsigned char* packed, int device, void* stream) {
    DeviceGuard guard(device);
    const PackedLayout layout = packed_layout(codebook.groups, codebook.codes, codebook.width);
    const PackedHeader header{kPackedMagic, static_cast<int64_t>(metric), codebook.groups, codebook.codes,
                              codebook.width};
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    // The gaps too, so that equal codebooks pack to equal bytes.
    cuda_check(cudaMemsetAsync(packed, 0, layout.total_bytes, queue), "vq_pack memset");
    init_kernel<<<1, 256, 0, queue>>>(header, layout, packed);
    cuda_check(cudaGetLastError(), "vq_pack init");
    if (codebook.groups == 0 || codebook.codes == 0) return;
    const int64_t blocks = (layout.tiles * kTileCodes + kThreads - 1) / kThreads;
    const dim3 grid(static_cast<unsigned>(blocks),
                    static_cast<unsigned>(codebook.groups < 65535 ? codebook.groups : 65535));
    pack_kernel<<<grid, kThreads, 0, queue>>>(codebook, metric, layout, packed);
    cuda_check(cudaGetLastError(), "vq_pack");
}

}  // namespace meditok
