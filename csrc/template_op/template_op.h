// template_op: the smallest complete op. out[i] = x[i]. CONTRIBUTING.md, "A new op, in order", starts from this folder:
//   x.h                          two sentences of mathematics, the params struct with shapes, the entry points
//   x_scalar.cpp                 loops a student could have written; accumulation type, ties, NaN
//   x_simd.inl.h, x_avx2.cpp ... the algorithm once, the instruction set per file
//   x_cpu.cpp                    the dispatch table, blocks, threads
//   x.cu                         kernel, launch, entry (later x_<variant>.cu files and an x_cuda.cpp that chooses)
//
// Types: float32; an op for more takes `const void*` and a Dtype (common/dtype.h), and leaves to the scalar file what
// the vectors of common/, which are of float32, do not cover. Sizes: any, 0 included. Strides count elements, may be
// negative or zero.
#pragma once

#include <cstdint>

namespace meditok {

struct TemplateParams {
    const float* x;  // (size)
    int64_t size;
    int64_t stride;  // of x, in elements
    float* out;      // (size) contiguous
};

void template_op_cpu(const TemplateParams& params, int threads);
void template_op_cuda(const TemplateParams& params, int device, void* stream);

// ---- between the files of this folder ---------------------------------------------------------------------

void template_op_scalar(const TemplateParams& params, int64_t begin, int64_t end);

// Covers stride 1 only; the dispatcher takes the scalar loop for the rest.
void template_op_avx2(const TemplateParams& params, int64_t begin, int64_t end);

}  // namespace meditok
