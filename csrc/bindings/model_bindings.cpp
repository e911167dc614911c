// The ops around attention and vector quantization. Arguments come in the order of meditok/ops/_native.py.

#include "bindings/bindings.h"
#include "depthwise/depthwise.h"
#include "linear/linear.h"
#include "upsample/upsample.h"

namespace py = pybind11;

namespace meditok {

void bind_model(py::module_& module) {
    using I = int64_t;
    using A = Address;
    module.def(
        "linear",
        [](A x, I rows, I width, I x_stride, A gain0, A bias0, double eps0, A gain1, A bias1, double eps1,
           int norms, A weight, A bias, A gate_weight, A gate_bias, I columns, int activation, A residual,
           I residual_stride, A out, int threads) {
            count_call(kLinear);
            const Norm first{pointer<const float>(gain0), pointer<const float>(bias0),
                             static_cast<float>(eps0)};
            const Norm second{pointer<const float>(gain1), pointer<const float>(bias1),
                              static_cast<float>(eps1)};
            linear_cpu({pointer<const float>(x),
                        rows,
                        width,
                        x_stride,
                        {first, second},
                        norms,
                        pointer<const float>(weight),
                        pointer<const float>(bias),
                        pointer<const float>(gate_weight),
                        pointer<const float>(gate_bias),
                        columns,
                        static_cast<Activation>(activation),
                        pointer<const float>(residual),
                        residual_stride,
                        pointer<float>(out)},
                       threads);
        },
        py::call_guard<py::gil_scoped_release>());
    module.def(
        "depthwise",
        [](A x, I batch, I height, I width, I channels, I stride, A taps, A bias, A out, int threads) {
            count_call(kDepthwise);
            depthwise_cpu({pointer<const float>(x), batch, height, width, channels, stride,
                           pointer<const float>(taps), pointer<const float>(bias), pointer<float>(out)},
                          threads);
        },
        py::call_guard<py::gil_scoped_release>());
    module.def(
        "upsample_differences",
        [](A x, I batch, I height, I width, I channels, A tall, A wide, A both, int threads) {
            count_call(kUpsampleDifferences);
            differences_cpu({pointer<const float>(x), batch, height, width, channels, pointer<float>(tall),
                             pointer<float>(wide), pointer<float>(both)},
                            threads);
        },
        py::call_guard<py::gil_scoped_release>());
    module.def(
        "upsample_gather",
        [](A level, A tall, A wide, A both, I batch, I height, I width, I channels, A gain, A bias,
           double eps, A out, int threads) {
            count_call(kUpsampleGather);
            gather_cpu(
                {pointer<const float>(level), pointer<const float>(tall), pointer<const float>(wide),
                 pointer<const float>(both), batch, height, width, channels, pointer<const float>(gain),
                 pointer<const float>(bias), static_cast<float>(eps), pointer<float>(out)},
                threads);
        },
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace meditok
