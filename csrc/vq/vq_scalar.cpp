// The canonical loops, as a student would write them: float64 sums in index order, nothing fused. Slow and
// right; every other path has to give the same ids. Built with -ffp-contract=off.

#include "common/threads.h"
#include "vq/vq_cpu.h"

namespace meditok {

double score_code(const Codebook& codebook, int64_t group, int64_t code, double norm, Metric metric,
                  const double* x) {
    double score = 0.0;
    for_dtype(codebook.type, [&](auto element) {
        using T = decltype(element);
        const T* row = static_cast<const T*>(codebook.data) + group * codebook.group_stride +
                       code * codebook.code_stride;
        score = canonical_score(x, 1, row, codebook.column_stride, codebook.width, norm, metric);
    });
    return score;
}

int64_t assign_row(const Codebook& codebook, int64_t group, const PackedView& view, Metric metric,
                   const double* x) {
    Best best;
    for_dtype(codebook.type, [&](auto element) {
        using T = decltype(element);
        const T* codes = static_cast<const T*>(codebook.data) + group * codebook.group_stride;
        for (int64_t code = 0; code < codebook.codes; ++code) {
            const double norm = view.norm[code];
            if (norm != norm) continue;  // NaN: never chosen
            const T* row = codes + code * codebook.code_stride;
            best.consider(canonical_score(x, 1, row, codebook.column_stride, codebook.width, norm, metric),
                          code);
        }
    });
    return best.code;
}

namespace {

template <class T>
void lookup_rows(const LookupParams& params, int64_t begin, int64_t end) {
    const Codebook& codebook = params.codebook;
    const int64_t width = codebook.width;
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t group = 0; group < codebook.groups; ++group) {
            const int64_t id = params.ids[row * params.row_stride + group * params.group_stride];
            T* out = static_cast<T*>(params.out) + (row * codebook.groups + group) * width;
            if (id < 0 || id >= codebook.codes) {
                for (int64_t i = 0; i < width; ++i) from_double(float_from_bits(0x7fc00000u), out[i]);
                continue;
            }
            const T* code = static_cast<const T*>(codebook.data) + group * codebook.group_stride +
                            id * codebook.code_stride;
            if (params.metric == Metric::kL2) {
                for (int64_t i = 0; i < width; ++i) out[i] = code[i * codebook.column_stride];
                continue;
            }
            double sum = 0.0;
            for (int64_t i = 0; i < width; ++i) {
                const double value = to_double(code[i * codebook.column_stride]);
                sum = plus(sum, multiply(value, value));
            }
            double norm = square_root(sum);
            if (norm < 1e-12) norm = 1e-12;  // a NaN norm stays NaN
            for (int64_t i = 0; i < width; ++i) {
                from_double(divide(to_double(code[i * codebook.column_stride]), norm), out[i]);
            }
        }
    }
}

}  // namespace

void vq_lookup_cpu(const LookupParams& params, int threads) {
    const int64_t elements_per_row = params.codebook.groups * params.codebook.width;
    if (params.rows == 0 || elements_per_row == 0) return;
    const int64_t block = 1 + 16384 / elements_per_row;  // rows to an item: enough to be worth a claim
    const int64_t items = (params.rows + block - 1) / block;
    for_dtype(params.codebook.type, [&](auto element) {
        using T = decltype(element);
        parallel_for(items, threads, [&](int, int64_t item) {
            const int64_t begin = item * block;
            lookup_rows<T>(params, begin, begin + block < params.rows ? begin + block : params.rows);
        });
    });
}

}  // namespace meditok
