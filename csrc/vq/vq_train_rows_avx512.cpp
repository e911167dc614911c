// The training pass's loops for AVX-512. Right because vq_train_rows.inl.h fixes the order of every sum.

#include "common/simd.h"
#include "vq/vq_train_rows.h"

namespace meditok {

namespace {

#include "vq/vq_train_rows.inl.h"

}  // namespace

TrainKernels train_rows_avx512() {
    return TrainKernels{row_kernels<float>(), row_kernels<double>()};
}

}  // namespace meditok
