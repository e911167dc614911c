// Packing on the device. An exact copy of a code can never win against the code it copies, and codebooks with many
// (all zero, all equal) would leave all of them in the band, so copies are taken out of the filter:
//   1. Every code enters a hash table of 2 K slots, which lies where the norms will be: a slot keeps the lowest index
//      of its value. Equal codes probe alike and slots never empty, so they meet in one slot whatever the order.
//   2. Every code looks its value up; where the slot names a lower index, it is a copy. It marks itself by its radius.
//   3. A thread a code, a warp a tile: norms, bounds and columns, written 128 bytes at a time.
// Traffic a code: its elements three times, some from the second-level cache. What only CPUs read stays zero.

#include "common/check.h"
#include "common/warp.cuh"
#include "vq/vq_cuda.h"

namespace meditok {

namespace {

constexpr int kThreads = 128;
static_assert(kThreads % 32 == 0, "a warp packs a tile");
constexpr float kCopy = -1.0f;  // in place of a radius, from step 2 to step 3

__global__ void init_kernel(PackedHeader header, PackedLayout layout, unsigned char* packed) {
    if (threadIdx.x == 0) *reinterpret_cast<PackedHeader*>(packed) = header;
    for (int64_t group = threadIdx.x; group < header.groups; group += blockDim.x) {
        *const_cast<PackedGroup*>(packed_view(packed, layout, group).group) = PackedGroup{0, -1, 0};
    }
}

// Slots hold index + 1; 0 is empty, as the memory comes.
struct Table {
    unsigned* slots;
    uint64_t size;

    __device__ Table(const PackedView& view, int64_t codes)
        : slots(reinterpret_cast<unsigned*>(const_cast<double*>(view.norm))),
          size(2 * static_cast<uint64_t>(codes)) {}
};

// Of the values, so that -0 counts as 0; NaN is not asked.
__device__ uint64_t hash_of(const Codebook& codebook, int64_t group, int64_t code) {
    uint64_t hash = 0;
    for (int64_t i = 0; i < codebook.width; ++i) {
        const double value = code_element(codebook, group, code, i) + 0.0;
        uint64_t bits;
        memcpy(&bits, &value, sizeof bits);
        hash = (hash ^ bits) * 0x9e3779b97f4a7c15ull;
        hash ^= hash >> 29;
    }
    return hash;
}

__device__ bool equal_codes(const Codebook& codebook, int64_t group, int64_t a, int64_t b) {
    for (int64_t i = 0; i < codebook.width; ++i) {
        if (code_element(codebook, group, a, i) != code_element(codebook, group, b, i)) return false;
    }
    return true;
}

__device__ bool comparable(const Codebook& codebook, int64_t group, int64_t code) {
    for (int64_t i = 0; i < codebook.width; ++i) {
        if (!is_finite(code_element(codebook, group, code, i))) return false;
    }
    return true;
}

// Step 1 (kMark = false) and step 2 (kMark = true). A table of twice the codes always has an empty slot.
template <bool kMark>
__global__ void __launch_bounds__(kThreads)
    find_copies_kernel(Codebook codebook, PackedLayout layout, unsigned char* packed) {
    const int64_t code = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (code >= codebook.codes) return;
    for (int64_t group = blockIdx.y; group < codebook.groups; group += gridDim.y) {
        if (!comparable(codebook, group, code)) continue;
        const PackedView view = packed_view(packed, layout, group);
        const Table table(view, codebook.codes);
        const unsigned mine = static_cast<unsigned>(code) + 1;
        for (uint64_t slot = hash_of(codebook, group, code) % table.size;; slot = (slot + 1) % table.size) {
            const unsigned held = kMark ? table.slots[slot] : atomicCAS(&table.slots[slot], 0u, mine);
            if (held == 0 || held == mine) break;
            if (!equal_codes(codebook, group, held - 1, code)) continue;
            if (kMark) {
                const_cast<float*>(view.radius)[code] = held < mine ? kCopy : 0.0f;
            } else {
                atomicMin(&table.slots[slot], mine);
            }
            break;
        }
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
                const bool cosine = metric == Metric::kCosine, copy = view.radius[code] == kCopy;
                const bool safe = cosine
                                      ? norm < kLargestCosine && (largest == 0.0 || largest > kSmallestCosine)
                                      : norm < kLargestL2;
                filtered = safe && !copy;
                bias = !filtered ? -INFINITY : cosine ? 0.0f : static_cast<float>(-0.5 * norm * norm);
                radius = !filtered ? 0.0f : cosine ? 1.0f : static_cast<float>(norm) * kRoundUp;
                if (!cosine) norm = 1.0;  // the filter code of l2 is the code itself
                atomicAdd(choosable, Counter{1});
                atomicMin(first, static_cast<Counter>(code));  // -1 is the largest unsigned number
                if (!safe && !copy) atomicAdd(unsafe, Counter{1});
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
    find_copies_kernel<false><<<grid, kThreads, 0, queue>>>(codebook, layout, packed);
    cuda_check(cudaGetLastError(), "vq_pack copies");
    find_copies_kernel<true><<<grid, kThreads, 0, queue>>>(codebook, layout, packed);
    cuda_check(cudaGetLastError(), "vq_pack copies");
    pack_kernel<<<grid, kThreads, 0, queue>>>(codebook, metric, layout, packed);
    cuda_check(cudaGetLastError(), "vq_pack");
}

}  // namespace meditok
