// C functions over the emulated CUDA kernels, for ctypes. Strides count elements: row, group, column of x; group, code,
// column of the codebook.

#include <vector>

#include "common/ptx.cuh"
#include "vq/vq.h"

using namespace meditok;

extern "C" void cuda_assign(const void* x, int x_type, const long* x_strides, const void* codebook, int type,
                            const long* strides, long rows, long groups, long codes, long width, int metric,
                            int64_t* ids) {
    const Codebook book{codebook,  static_cast<Dtype>(type), groups, codes, width, strides[0], strides[1],
                        strides[2]};
    std::vector<unsigned char> packed(packed_layout(groups, codes, width).total_bytes + kAlignment, 0xab);
    unsigned char* start =
        packed.data() + (kAlignment - reinterpret_cast<uintptr_t>(packed.data()) % kAlignment);
    vq_pack_cuda(book, static_cast<Metric>(metric), start, 0, nullptr);
    vq_assign_cuda({x, static_cast<Dtype>(x_type), rows, x_strides[0], x_strides[1], x_strides[2], book,
                    start, static_cast<Metric>(metric), ids},
                   0, nullptr);
}

// kept[code] = 1 for the codes (float32, one group) that the filter looks for.
extern "C" void codes_in_filter(const float* codebook, long codes, long width, int metric,
                                unsigned char* kept) {
    const PackedLayout layout = packed_layout(1, codes, width);
    std::vector<unsigned char> packed(layout.total_bytes);
    vq_pack_cuda({codebook, Dtype::kFloat32, 1, codes, width, codes * width, width, 1},
                 static_cast<Metric>(metric), packed.data(), 0, nullptr);
    const PackedView view = packed_view(packed.data(), layout, 0);
    for (long code = 0; code < codes; ++code) kept[code] = view.bias[code] > -INFINITY;
}

extern "C" void cuda_lookup(const int64_t* ids, const void* codebook, int type, long rows, long groups,
                            long codes, long width, int metric, void* out) {
    const Codebook book{codebook, static_cast<Dtype>(type), groups, codes, width, codes * width, width, 1};
    vq_lookup_cuda({ids, rows, groups, 1, book, static_cast<Metric>(metric), out}, 0, nullptr);
}

extern "C" void set_device(int multiprocessors, int block_shared, int multiprocessor_shared) {
    emulation::multiprocessors = multiprocessors;
    emulation::block_shared = block_shared;
    emulation::multiprocessor_shared = multiprocessor_shared;
}

extern "C" void set_accumulator_bits(int bits) {
    emulation::accumulator_bits = bits;
}

// Rows since the last call that the fp16 filter left to a search by a whole warp.
extern "C" long searches() {
    const long count = double_shuffles / (5 * 32);
    double_shuffles = 0;
    return count;
}
