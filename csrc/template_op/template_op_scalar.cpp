// The plain loop. No arithmetic, so nothing to say on rounding; NaNs are copied as they are.

#include "template_op/template_op.h"

namespace meditok {

void template_op_scalar(const TemplateParams& params, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) params.out[i] = params.x[i * params.stride];
}

}  // namespace meditok
