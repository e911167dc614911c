// The CPU kernels with the AVX-512 files compiled against SIMDe, behind one C function: proves the AVX-512 sources
// on machines that cannot run them. Built by test_levels.py.

#include <vector>

#include "common/isa.h"
#include "vq/vq.h"

extern "C" int assign(const char* level, const float* x, const float* codebook, long rows, long groups,
                      long codes, long width, int metric, int threads, long* ids) {
    using namespace meditok;
    if (choose_isa(level) != level) return 1;
    const Codebook book{codebook, Dtype::kFloat32, groups, codes, width, codes * width, width, 1};
    const PackedLayout layout = packed_layout(groups, codes, width);
    std::vector<unsigned char> packed(layout.total_bytes + kAlignment);
    unsigned char* start =
        packed.data() + (kAlignment - reinterpret_cast<uintptr_t>(packed.data()) % kAlignment);
    vq_pack_cpu(book, static_cast<Metric>(metric), start, threads);
    static_assert(sizeof(long) == sizeof(int64_t), "ids are int64");
    vq_assign_cpu({x, Dtype::kFloat32, rows, groups * width, width, 1, book, start,
                   static_cast<Metric>(metric), reinterpret_cast<int64_t*>(ids)},
                  threads);
    return 0;
}
