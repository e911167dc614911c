#include "bindings/bindings.h"
#include "vq/vq_train.h"

namespace py = pybind11;

namespace meditok {

namespace {

// Arguments come in the order of meditok/ops/_native.py.

using I = int64_t;
using A = Address;

QuantizeParams make_quantize(A x, int type, I rows, I groups, I width, I x0, I x1, I x2, A data, I codes,
                             I c0, I c1, I c2, A packed, int metric, A ids, A mask, I mask_stride,
                             double commitment_weight, double codebook_weight, A z, A loss, A counts,
                             A scratch) {
    const auto dtype = static_cast<Dtype>(type);
    const Codebook codebook{pointer<const void>(data), dtype, groups, codes, width, c0, c1, c2};
    const AssignParams assign{pointer<const void>(x),
                              dtype,
                              rows,
                              x0,
                              x1,
                              x2,
                              codebook,
                              pointer<const unsigned char>(packed),
                              static_cast<Metric>(metric),
                              pointer<int64_t>(ids)};
    return QuantizeParams{assign,
                          pointer<const unsigned char>(mask),
                          mask_stride,
                          commitment_weight,
                          codebook_weight,
                          pointer<void>(z),
                          pointer<float>(loss),
                          pointer<int64_t>(counts),
                          pointer<unsigned char>(scratch)};
}

QuantizeBackwardParams make_backward(A grad_z, I g0, I g1, I g2, A grad_loss, A x, int type, I rows, I groups,
                                     I width, I x0, I x1, I x2, A data, I codes, I c0, I c1, I c2, A ids,
                                     I i0, I i1, A mask, I mask_stride, int metric, double commitment_weight,
                                     double codebook_weight, bool rotation, A grad_x, A grad_codebook,
                                     A scratch) {
    const auto dtype = static_cast<Dtype>(type);
    return QuantizeBackwardParams{
        pointer<const void>(grad_z),
        {g0, g1, g2},
        pointer<const float>(grad_loss),
        pointer<const void>(x),
        dtype,
        rows,
        {x0, x1, x2},
        Codebook{pointer<const void>(data), dtype, groups, codes, width, c0, c1, c2},
        pointer<const int64_t>(ids),
        {i0, i1},
        pointer<const unsigned char>(mask),
        mask_stride,
        static_cast<Metric>(metric),
        commitment_weight,
        codebook_weight,
        rotation,
        pointer<void>(grad_x),
        pointer<void>(grad_codebook),
        pointer<unsigned char>(scratch)};
}

StatsParams make_stats(A x, int type, I rows, I groups, I width, I x0, I x1, I x2, A ids, I i0, I i1, I codes,
                       A counts, A sums, A scratch) {
    return StatsParams{
        pointer<const void>(x), static_cast<Dtype>(type),       rows,     groups, width,
        {x0, x1, x2},           pointer<const int64_t>(ids),    {i0, i1}, codes,  pointer<int64_t>(counts),
        pointer<float>(sums),   pointer<unsigned char>(scratch)};
}

UpdateParams make_update(A data, int type, I groups, I codes, I width, I c0, I c1, I c2, A ema_counts, I n0,
                         I n1, A ema_sums, I s0, I s1, I s2, A counts, I k0, I k1, A sums, I m0, I m1, I m2,
                         double decay, double eps, int metric, A scratch) {
    return UpdateParams{pointer<void>(data),
                        static_cast<Dtype>(type),
                        groups,
                        codes,
                        width,
                        {c0, c1, c2},
                        pointer<float>(ema_counts),
                        {n0, n1},
                        pointer<float>(ema_sums),
                        {s0, s1, s2},
                        pointer<const int64_t>(counts),
                        {k0, k1},
                        pointer<const float>(sums),
                        {m0, m1, m2},
                        decay,
                        eps,
                        static_cast<Metric>(metric),
                        pointer<unsigned char>(scratch)};
}

// module.def(name): make(arguments...), then run(params, last arguments...), counted as `entry`.
template <class Params, class... Arguments, class... Last>
void define(py::module_& module, Entry entry, Params (*make)(Arguments...),
            void (*run)(const Params&, Last...)) {
    module.def(
        kEntryNames[entry],
        [=](Arguments... arguments, Last... last) {
            count_call(entry);
            run(make(arguments...), last...);
        },
        py::call_guard<py::gil_scoped_release>());
}

#if defined(MEDITOK_HAVE_CUDA)
// A stream comes as an address.
template <class Params, void (*run)(const Params&, int, void*)>
void on_stream(const Params& params, int device, A stream) {
    run(params, device, pointer<void>(stream));
}
#endif

}  // namespace

void bind_vq_train(py::module_& module) {
    define(module, kVqQuantize, &make_quantize, &vq_quantize_cpu);
    define(module, kVqQuantizeBackward, &make_backward, &vq_quantize_backward_cpu);
    define(module, kVqStats, &make_stats, &vq_stats_cpu);
    define(module, kVqUpdate, &make_update, &vq_update_cpu);
    module.def("vq_quantize_scratch_bytes", &quantize_scratch_bytes);
    module.def("vq_quantize_backward_scratch_bytes", &backward_scratch_bytes);
    module.def("vq_stats_scratch_bytes", &stats_scratch_bytes);
    module.def("vq_update_scratch_bytes", &update_scratch_bytes);
#if defined(MEDITOK_HAVE_CUDA)
    define(module, kVqQuantizeCuda, &make_quantize, &on_stream<QuantizeParams, vq_quantize_cuda>);
    define(module, kVqQuantizeBackwardCuda, &make_backward,
           &on_stream<QuantizeBackwardParams, vq_quantize_backward_cuda>);
    define(module, kVqStatsCuda, &make_stats, &on_stream<StatsParams, vq_stats_cuda>);
    define(module, kVqUpdateCuda, &make_update, &on_stream<UpdateParams, vq_update_cuda>);
#endif
}

}  // namespace meditok
