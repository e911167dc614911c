// Runs the CPU kernels at the level named by the first argument on the cases in the file named by the second, and
// compares with the results stored there, bit for bit. Cross-compiled for Arm and run under qemu by test_neon.py.
//
// File, little-endian: for each case int64 {rows, groups, codes, width, metric, threads, training}, then the inputs
// float x (rows, groups, width), codebook (groups, codes, width), and the results int64 ids (rows, groups), float rows
// of the ids (rows, groups, width). With training, of vq_quantize with the default weights and its backward from
// grad_z = x and grad_loss = 1: float loss (1), int64 counts (groups, codes), float grad_x (rows, groups, width),
// grad_codebook (groups, codes, width); of vq_stats: float sums (groups, codes, width); and of vq_update from ema_counts
// 1 and ema_sums = codebook with decay 0.9 and eps 1e-5: float codebook (groups, codes, width).

#include <cinttypes>
#include <cstdio>
#include <vector>

#include "common/isa.h"
#include "vq/vq_train.h"

using namespace meditok;

namespace {

std::FILE* file;
int64_t cases = 0, wrong = 0;

template <class T>
std::vector<T> read(int64_t count) {
    std::vector<T> values(static_cast<size_t>(count));
    if (std::fread(values.data(), sizeof(T), values.size(), file) != values.size()) values.clear();
    return values;
}

template <class T>
void check(const char* what, const std::vector<T>& found) {
    const std::vector<T> expected = read<T>(static_cast<int64_t>(found.size()));
    if (expected.size() != found.size()) ++wrong;
    for (size_t i = 0; i < expected.size(); ++i) {
        const bool nan = found[i] != found[i] && expected[i] != expected[i];
        if (found[i] == expected[i] || nan) continue;
        if (wrong++ < 10) {
            std::printf("case %" PRId64 ", %s %zu: %.9g instead of %.9g\n", cases, what, i,
                        static_cast<double>(found[i]), static_cast<double>(expected[i]));
        }
    }
}

struct Case {
    int64_t rows, groups, codes, width;
    Metric metric;
    int threads;
    std::vector<float> x, codebook;
    unsigned char* packed;

    Codebook book() const {
        return {codebook.data(), Dtype::kFloat32, groups, codes, width, codes * width, width, 1};
    }
    AssignParams assign(int64_t* ids) const {
        return {x.data(), Dtype::kFloat32, rows, groups * width, width, 1, book(), packed, metric, ids};
    }
};

void check_training(const Case& c, const std::vector<int64_t>& ids) {
    const int64_t rows = c.rows, groups = c.groups, codes = c.codes, width = c.width;
    const size_t elements = c.x.size(), all = c.codebook.size();
    std::vector<int64_t> again(ids.size()), counts(static_cast<size_t>(groups * codes));
    std::vector<float> z(elements), loss(1), grad_x(elements), grad_codebook(all), sums(all);
    vq_quantize_cpu(
        {c.assign(again.data()), nullptr, 0, 0.25, 1.0, z.data(), loss.data(), counts.data(), nullptr},
        c.threads);
    if (again != ids) ++wrong;
    check("loss", loss);
    check("count", counts);
    const int64_t x0 = groups * width;
    const float one = 1.0f;
    vq_quantize_backward_cpu({c.x.data(),
                              {x0, width, 1},
                              &one,
                              c.x.data(),
                              Dtype::kFloat32,
                              rows,
                              {x0, width, 1},
                              c.book(),
                              ids.data(),
                              {groups, 1},
                              nullptr,
                              0,
                              c.metric,
                              0.25,
                              1.0,
                              false,
                              grad_x.data(),
                              grad_codebook.data(),
                              nullptr},
                             c.threads);
    check("grad_x", grad_x);
    check("grad_codebook", grad_codebook);
    vq_stats_cpu({c.x.data(),
                  Dtype::kFloat32,
                  rows,
                  groups,
                  width,
                  {x0, width, 1},
                  ids.data(),
                  {groups, 1},
                  codes,
                  counts.data(),
                  sums.data(),
                  nullptr},
                 c.threads);
    check("sum", sums);
    std::vector<float> moved = c.codebook, ema_sums = c.codebook,
                       ema_counts(static_cast<size_t>(groups * codes), 1.0f);
    const int64_t k0 = codes * width;
    vq_update_cpu({moved.data(),
                   Dtype::kFloat32,
                   groups,
                   codes,
                   width,
                   {k0, width, 1},
                   ema_counts.data(),
                   {codes, 1},
                   ema_sums.data(),
                   {k0, width, 1},
                   counts.data(),
                   {codes, 1},
                   sums.data(),
                   {k0, width, 1},
                   0.9,
                   1e-5,
                   c.metric,
                   nullptr},
                  c.threads);
    check("code", moved);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3 || choose_isa(argv[1]) != argv[1]) return 2;
    file = std::fopen(argv[2], "rb");
    if (file == nullptr) return 2;
    for (std::vector<int64_t> size; !(size = read<int64_t>(7)).empty(); ++cases) {
        Case c{size[0], size[1], size[2], size[3], static_cast<Metric>(size[4]), static_cast<int>(size[5]),
               {},      {},      nullptr};
        c.x = read<float>(c.rows * c.groups * c.width);
        c.codebook = read<float>(c.groups * c.codes * c.width);
        std::vector<unsigned char> packed(packed_layout(c.groups, c.codes, c.width).total_bytes + kAlignment);
        c.packed = packed.data() + (kAlignment - reinterpret_cast<uintptr_t>(packed.data()) % kAlignment);
        vq_pack_cpu(c.book(), c.metric, c.packed, 1);
        std::vector<int64_t> ids(static_cast<size_t>(c.rows * c.groups), -99);
        vq_assign_cpu(c.assign(ids.data()), c.threads);
        check("id", ids);
        std::vector<float> rows(c.x.size());
        vq_lookup_cpu({ids.data(), c.rows, c.groups, 1, c.book(), c.metric, rows.data()}, c.threads);
        check("row", rows);
        if (size[6] != 0) check_training(c, ids);
    }
    std::printf("%" PRId64 " cases, %" PRId64 " wrong\n", cases, wrong);
    return wrong == 0 && cases > 0 ? 0 : 1;
}
