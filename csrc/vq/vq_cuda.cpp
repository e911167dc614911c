// vq_assign on a GPU: the choice of the kernel. Both multiply fp16 roundings on tensor cores, prove from the sums which
// codes can still be the best (vq_filter_half.h), and score those in float64, so the ids are those of every backend.
//
//   width <= 32   vq_assign_small_dim.cu   codes in shared memory, maxima in registers
//   wider         vq_assign_large_dim.cu   both operands pass through shared memory, sums in registers
//
// What an architecture takes; the choices are made in common/ptx.cuh:
//   sm_75          mma.m16n8k8, two for a depth of 16; 64 KiB of shared memory stage 1,900 codes of width 8
//   sm_80          mma.m16n8k16 where the depth allows; codes of width 8: 2,800 a stage, two blocks a multiprocessor
//   sm_90a         the same with a three-way integer maximum, and 4,096 codes of width 8 stay resident
//   sm_100         the same with a three-way float maximum
//   sm_120         as sm_80, with 99 KiB of shared memory and one block a multiprocessor
//   PTX            compute_80: what sm_80 takes, for architectures to come
// fp16 and not tf32: the same 11 bits at twice the rate and half the bytes, and one source for sm_75 as well. wgmma is
// not used: for small widths the maxima and not the products are the limit, and for large ones it could not be proven
// without a device.
//
// No tensor cores are used for rows and codes outside 2^-60 .. 2^60, for widths above 65,536, and for rows whose
// candidates overflow their list: one warp searches all codes, in float64 or float32 (vq_search.cuh).

#include "vq/vq_cuda.h"

#include "common/check.h"

namespace meditok {

void vq_assign_cuda(const AssignParams& params, int device, void* stream) {
    if (params.rows == 0 || params.codebook.groups == 0) return;
    require(params.rows < (int64_t{1} << 31), "vq_assign takes fewer than 2^31 rows in one call; split them");
    require(params.codebook.codes < (int64_t{1} << 31), "vq_assign takes fewer than 2^31 codes");
    if (params.codebook.width <= kSmallDim) {
        launch_assign_small_dim(params, device, stream);
    } else {
        launch_assign_large_dim(params, device, stream);
    }
}

}  // namespace meditok
