// vq_assign on a GPU: the choice of the kernel. Small widths keep the row in registers; the rest share it in a block.

#include "vq/vq_cuda.h"

#include "common/check.h"

namespace meditok {

void vq_assign_cuda(const AssignParams& params, int device, void* stream) {
    if (params.rows == 0 || params.codebook.groups == 0) return;
    require(params.rows < (int64_t{1} << 31), "vq_assign takes fewer than 2^31 rows in one call; split them");
    if (params.codebook.width <= kSmallDim) {
        launch_assign_small_dim(params, device, stream);
    } else {
        launch_assign_large_dim(params, device, stream);
    }
}

}  // namespace meditok
