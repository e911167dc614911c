// The canonical loops, as a student would write them: float64 sums in index order, nothing fused. Slow and
// right; every other path has to give the same ids. Built with -ffp-contract=off.

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

}  // namespace meditok
