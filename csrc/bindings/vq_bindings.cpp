#include "bindings/bindings.h"
#include "vq/vq.h"

namespace py = pybind11;

namespace meditok {

namespace {

Codebook make_codebook(Address data, int type, int64_t groups, int64_t codes, int64_t width,
                       int64_t group_stride, int64_t code_stride, int64_t column_stride) {
    return Codebook{pointer<const void>(data),
                    static_cast<Dtype>(type),
                    groups,
                    codes,
                    width,
                    group_stride,
                    code_stride,
                    column_stride};
}

// Arguments come in the order of meditok/ops/_native.py.

AssignParams make_assign(Address x, int x_type, int64_t rows, int64_t groups, int64_t width,
                         int64_t row_stride, int64_t group_stride, int64_t column_stride, Address data,
                         int type, int64_t codes, int64_t codebook_group_stride, int64_t code_stride,
                         int64_t codebook_column_stride, Address packed, int metric, Address ids) {
    return AssignParams{pointer<const void>(x),
                        static_cast<Dtype>(x_type),
                        rows,
                        row_stride,
                        group_stride,
                        column_stride,
                        make_codebook(data, type, groups, codes, width, codebook_group_stride, code_stride,
                                      codebook_column_stride),
                        pointer<const unsigned char>(packed),
                        static_cast<Metric>(metric),
                        pointer<int64_t>(ids)};
}

LookupParams make_lookup(Address ids, int64_t rows, int64_t row_stride, int64_t group_stride, Address data,
                         int type, int64_t groups, int64_t codes, int64_t width,
                         int64_t codebook_group_stride, int64_t code_stride, int64_t column_stride,
                         int metric, Address out) {
    return LookupParams{
        pointer<const int64_t>(ids),
        rows,
        row_stride,
        group_stride,
        make_codebook(data, type, groups, codes, width, codebook_group_stride, code_stride, column_stride),
        static_cast<Metric>(metric),
        pointer<void>(out)};
}

}  // namespace

void bind_vq(py::module_& module) {
    using Unlocked = py::call_guard<py::gil_scoped_release>;
    using I = int64_t;
    using A = Address;
    module.def("vq_packed_bytes",
               [](I groups, I codes, I width) { return packed_layout(groups, codes, width).total_bytes; });
    module.def(
        "vq_pack",
        [](A data, int type, I groups, I codes, I width, I s0, I s1, I s2, int metric, A packed,
           int threads) {
            count_call(kVqPack);
            vq_pack_cpu(make_codebook(data, type, groups, codes, width, s0, s1, s2),
                        static_cast<Metric>(metric), pointer<unsigned char>(packed), threads);
        },
        Unlocked());
    module.def(
        "vq_assign",
        [](A x, int x_type, I rows, I groups, I width, I x0, I x1, I x2, A data, int type, I codes, I s0,
           I s1, I s2, A packed, int metric, A ids, int threads) {
            count_call(kVqAssign);
            vq_assign_cpu(make_assign(x, x_type, rows, groups, width, x0, x1, x2, data, type, codes, s0, s1,
                                      s2, packed, metric, ids),
                          threads);
        },
        Unlocked());
    module.def(
        "vq_lookup",
        [](A ids, I rows, I i0, I i1, A data, int type, I groups, I codes, I width, I s0, I s1, I s2,
           int metric, A out, int threads) {
            count_call(kVqLookup);
            vq_lookup_cpu(
                make_lookup(ids, rows, i0, i1, data, type, groups, codes, width, s0, s1, s2, metric, out),
                threads);
        },
        Unlocked());
#if defined(MEDITOK_HAVE_CUDA)
    module.def(
        "vq_pack_cuda",
        [](A data, int type, I groups, I codes, I width, I s0, I s1, I s2, int metric, A packed, int device,
           A stream) {
            count_call(kVqPackCuda);
            vq_pack_cuda(make_codebook(data, type, groups, codes, width, s0, s1, s2),
                         static_cast<Metric>(metric), pointer<unsigned char>(packed), device,
                         pointer<void>(stream));
        },
        Unlocked());
    module.def(
        "vq_assign_cuda",
        [](A x, int x_type, I rows, I groups, I width, I x0, I x1, I x2, A data, int type, I codes, I s0,
           I s1, I s2, A packed, int metric, A ids, int device, A stream) {
            count_call(kVqAssignCuda);
            vq_assign_cuda(make_assign(x, x_type, rows, groups, width, x0, x1, x2, data, type, codes, s0, s1,
                                       s2, packed, metric, ids),
                           device, pointer<void>(stream));
        },
        Unlocked());
    module.def(
        "vq_lookup_cuda",
        [](A ids, I rows, I i0, I i1, A data, int type, I groups, I codes, I width, I s0, I s1, I s2,
           int metric, A out, int device, A stream) {
            count_call(kVqLookupCuda);
            vq_lookup_cuda(
                make_lookup(ids, rows, i0, i1, data, type, groups, codes, width, s0, s1, s2, metric, out),
                device, pointer<void>(stream));
        },
        Unlocked());
#endif
}

}  // namespace meditok
