// template_op: the smallest complete op. out[i] = x[i]. Copy this folder to start a new op; the steps are:
//   1. x.h (this file): two sentences of mathematics, the params struct with shapes, the entry points, what is
//      covered.
//   2. x_scalar.cpp: loops a student could have written; states accumulation type, ties, NaN.
//   3. x_simd.inl.h + x_avx2.cpp (x_avx512.cpp, x_neon.cpp): the algorithm once, the instruction set per file;
//      add the files to ISA_SOURCES in CMakeLists.txt, the suffix brings the flags.
//   4. x_cpu.cpp: the dispatch table, blocks, threads.
//   5. x.cu: kernel, launch, entry (later x_<variant>.cu files and an x_cuda.cpp that chooses among them).
//   6. bindings/x_bindings.cpp, a line in bindings.h, and the entry's name in kEntryNames; raise kInterface.
//   7. meditok/ops/reference.py (the PyTorch twin), meditok/ops/x.py (see vq.py: checks, schema and kernels, fake,
//      autograd, public), meditok/ops/_native.py (the call).
//   8. tests/ops/test_x.py against the reference on every level, opcheck at its end; bench/bench_x.py.
//
// Types: float32. Sizes: any, 0 included. Strides count elements, may be negative or zero.
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
