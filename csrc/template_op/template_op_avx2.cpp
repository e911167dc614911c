// AVX2: 8 floats a vector. Equal to the scalar loop bit for bit, since nothing is computed.

#include <immintrin.h>

#include "common/simd.h"
#include "template_op/template_op.h"

namespace meditok {

namespace {

#include "common/vector_avx2.inl.h"
#include "template_op/template_op_simd.inl.h"

}  // namespace

void template_op_avx2(const TemplateParams& params, int64_t begin, int64_t end) {
    copy_vectors(params.x, params.out, begin, end);
}

}  // namespace meditok
