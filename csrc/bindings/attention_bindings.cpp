#include <pybind11/stl.h>

#include <array>

#include "attention/attention.h"
#include "bindings/bindings.h"

namespace py = pybind11;

namespace meditok {

namespace {

// Arguments come in the order of meditok/ops/_native.py; strides as tuples of four.

using I = int64_t;
using A = Address;
using S = const std::array<int64_t, 4>&;

AttentionStrides strides(S s) {
    return AttentionStrides{s[0], s[1], s[2], s[3]};
}

AttentionParams make_params(A q, A k, A v, int type, I batch, I heads, I queries, I keys, I width,
                            S q_strides, S k_strides, S v_strides, int mask_kind, A mask, S mask_strides,
                            double scale, bool mean, A out, S out_strides, A lse) {
    return AttentionParams{pointer<const void>(q),
                           pointer<const void>(k),
                           pointer<const void>(v),
                           static_cast<Dtype>(type),
                           batch,
                           heads,
                           queries,
                           keys,
                           width,
                           strides(q_strides),
                           strides(k_strides),
                           strides(v_strides),
                           static_cast<MaskKind>(mask_kind),
                           pointer<const void>(mask),
                           strides(mask_strides),
                           scale,
                           mean,
                           pointer<void>(out),
                           strides(out_strides),
                           pointer<float>(lse)};
}

// The forward's arguments, then these.
AttentionBackwardParams make_backward(const AttentionParams& forward, A grad_out, S grad_out_strides,
                                      A grad_q, A grad_k, A grad_v, S q_strides, S k_strides, S v_strides,
                                      A scratch) {
    return AttentionBackwardParams{forward,
                                   pointer<const void>(grad_out),
                                   strides(grad_out_strides),
                                   pointer<void>(grad_q),
                                   pointer<void>(grad_k),
                                   pointer<void>(grad_v),
                                   strides(q_strides),
                                   strides(k_strides),
                                   strides(v_strides),
                                   pointer<unsigned char>(scratch)};
}

}  // namespace

void bind_attention(py::module_& module) {
    py::class_<AttentionParams>(module, "AttentionParams").def(py::init(&make_params));
    module.def(
        "attention",
        [](const AttentionParams& params, int threads) {
            count_call(kAttention);
            attention_cpu(params, threads);
        },
        py::call_guard<py::gil_scoped_release>());
    module.def(
        "attention_backward",
        [](const AttentionParams& forward, A grad_out, S g, A grad_q, A grad_k, A grad_v, S q, S k, S v,
           int threads) {
            count_call(kAttentionBackward);
            attention_backward_cpu(make_backward(forward, grad_out, g, grad_q, grad_k, grad_v, q, k, v, 0),
                                   threads);
        },
        py::call_guard<py::gil_scoped_release>());
#if defined(MEDITOK_HAVE_CUDA)
    module.def(
        "attention_cuda",
        [](const AttentionParams& params, bool tf32, int device, A stream) {
            count_call(kAttentionCuda);
            attention_cuda(params, tf32, device, pointer<void>(stream));
        },
        py::call_guard<py::gil_scoped_release>());
    module.def("attention_backward_scratch_bytes", &attention_backward_scratch_bytes);
    module.def(
        "attention_backward_cuda",
        [](const AttentionParams& forward, A grad_out, S g, A grad_q, A grad_k, A grad_v, S q, S k, S v,
           A scratch, bool tf32, int device, A stream) {
            count_call(kAttentionBackwardCuda);
            attention_backward_cuda(
                make_backward(forward, grad_out, g, grad_q, grad_k, grad_v, q, k, v, scratch), tf32, device,
                pointer<void>(stream));
        },
        py::call_guard<py::gil_scoped_release>());
#endif
}

}  // namespace meditok
