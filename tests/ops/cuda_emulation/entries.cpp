// C functions over the emulated CUDA kernels, for ctypes.

#include <vector>

#include "vq/vq.h"

using namespace meditok;

namespace {

Codebook make(const void* data, int type, long groups, long codes, long width) {
    return {data, static_cast<Dtype>(type), groups, codes, width, codes * width, width, 1};
}

}  // namespace

extern "C" void cuda_assign(const void* x, int x_type, const void* codebook, int type, long rows, long groups,
                            long codes, long width, int metric, int64_t* ids) {
    const Codebook book = make(codebook, type, groups, codes, width);
    std::vector<unsigned char> packed(packed_layout(groups, codes, width).total_bytes + kAlignment, 0xab);
    unsigned char* start =
        packed.data() + (kAlignment - reinterpret_cast<uintptr_t>(packed.data()) % kAlignment);
    vq_pack_cuda(book, static_cast<Metric>(metric), start, 0, nullptr);
    vq_assign_cuda({x, static_cast<Dtype>(x_type), rows, groups * width, width, 1, book, start,
                    static_cast<Metric>(metric), ids},
                   0, nullptr);
}

extern "C" void cuda_lookup(const int64_t* ids, const void* codebook, int type, long rows, long groups,
                            long codes, long width, int metric, void* out) {
    vq_lookup_cuda(
        {ids, rows, groups, 1, make(codebook, type, groups, codes, width), static_cast<Metric>(metric), out},
        0, nullptr);
}
