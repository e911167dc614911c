// Runs the CPU kernels at the level named by the first argument on the cases in the file named by the second, and
// compares with the ids stored there by the reference. Cross-compiled for Arm and run under qemu by test_neon.py.
//
// File, little-endian: for each case int64 {rows, groups, codes, width, metric, threads}, float x (rows, groups, width),
// float codebook (groups, codes, width), int64 ids (rows, groups).

#include <cinttypes>
#include <cstdio>
#include <vector>

#include "common/isa.h"
#include "vq/vq.h"

using namespace meditok;

namespace {

template <class T>
std::vector<T> read(std::FILE* file, int64_t count) {
    std::vector<T> values(static_cast<size_t>(count));
    if (std::fread(values.data(), sizeof(T), values.size(), file) != values.size()) values.clear();
    return values;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3 || choose_isa(argv[1]) != argv[1]) return 2;
    std::FILE* file = std::fopen(argv[2], "rb");
    if (file == nullptr) return 2;
    int64_t cases = 0, wrong = 0;
    for (std::vector<int64_t> size; !(size = read<int64_t>(file, 6)).empty(); ++cases) {
        const int64_t rows = size[0], groups = size[1], codes = size[2], width = size[3];
        const Metric metric = static_cast<Metric>(size[4]);
        const std::vector<float> x = read<float>(file, rows * groups * width);
        const std::vector<float> codebook = read<float>(file, groups * codes * width);
        const std::vector<int64_t> expected = read<int64_t>(file, rows * groups);
        const Codebook book{codebook.data(), Dtype::kFloat32, groups, codes, width, codes * width, width, 1};
        std::vector<unsigned char> packed(packed_layout(groups, codes, width).total_bytes + kAlignment);
        unsigned char* start =
            packed.data() + (kAlignment - reinterpret_cast<uintptr_t>(packed.data()) % kAlignment);
        vq_pack_cpu(book, metric, start, 1);
        std::vector<int64_t> ids(expected.size(), -99);
        vq_assign_cpu(
            {x.data(), Dtype::kFloat32, rows, groups * width, width, 1, book, start, metric, ids.data()},
            static_cast<int>(size[5]));
        for (size_t i = 0; i < ids.size(); ++i) {
            if (ids[i] == expected[i]) continue;
            if (wrong++ < 10) {
                std::printf("case %" PRId64 " (%" PRId64 " codes, width %" PRId64 "), id %zu: %" PRId64
                            " instead of %" PRId64 "\n",
                            cases, codes, width, i, ids[i], expected[i]);
            }
        }
    }
    std::printf("%" PRId64 " cases, %" PRId64 " wrong ids\n", cases, wrong);
    return wrong == 0 && cases > 0 ? 0 : 1;
}
