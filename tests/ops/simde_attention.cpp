// Attention and its backward with the AVX-512 file compiled against SIMDe, behind one C function; see simde_assign.cpp.

#include <vector>

#include "attention/attention.h"
#include "common/isa.h"

// q (heads, queries, width), k and v (heads, keys, width), grad as q, contiguous -> results: out, grad_q, grad_k,
// grad_v. kind: the element type's code, and 8 for causal.
extern "C" int attend(const void* q, const void* k, const void* v, const void* grad, long heads, long queries,
                      long keys, long width, int kind, void** results) {
    using namespace meditok;
    if (choose_isa("avx512") != "avx512") return 1;
    const AttentionStrides rows{0, queries * width, width, 1}, columns{0, keys * width, width, 1};
    std::vector<float> lse(static_cast<size_t>(heads * queries));
    const MaskKind mask = (kind & 8) != 0 ? MaskKind::kCausal : MaskKind::kNone;
    const AttentionParams params{q,
                                 k,
                                 v,
                                 static_cast<Dtype>(kind & 7),
                                 1,
                                 heads,
                                 queries,
                                 keys,
                                 width,
                                 rows,
                                 columns,
                                 columns,
                                 mask,
                                 nullptr,
                                 {0, 0, 0, 0},
                                 1.0 / __builtin_sqrt(width),
                                 false,
                                 results[0],
                                 rows,
                                 lse.data()};
    attention_cpu(params, 2);
    attention_backward_cpu(
        {params, grad, rows, results[1], results[2], results[3], rows, columns, columns, nullptr}, 2);
    return 0;
}
