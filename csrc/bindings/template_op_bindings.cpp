#include "bindings/bindings.h"
#include "template_op/template_op.h"

namespace py = pybind11;

namespace meditok {

void bind_template_op(py::module_& module) {
    module.def(
        "template_op",
        [](Address x, int64_t size, int64_t stride, Address out, int threads) {
            count_call(kTemplateOp);
            template_op_cpu({pointer<const float>(x), size, stride, pointer<float>(out)}, threads);
        },
        py::call_guard<py::gil_scoped_release>());
#if defined(MEDITOK_HAVE_CUDA)
    module.def(
        "template_op_cuda",
        [](Address x, int64_t size, int64_t stride, Address out, int device, Address stream) {
            count_call(kTemplateOpCuda);
            template_op_cuda({pointer<const float>(x), size, stride, pointer<float>(out)}, device,
                             pointer<void>(stream));
        },
        py::call_guard<py::gil_scoped_release>());
#endif
}

}  // namespace meditok
