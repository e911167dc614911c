#include "bindings/bindings.h"
#include "common/isa.h"

#if defined(MEDITOK_HAVE_CUDA)
#include "common/cuda_info.h"
#endif

namespace py = pybind11;

namespace meditok {

std::atomic<int64_t> entry_calls[kEntries];

namespace {

py::list to_list(const std::vector<std::string>& names) {
    py::list list;
    for (const std::string& name : names) list.append(name);
    return list;
}

py::dict build_info() {
    py::dict info;
    info["version"] = MEDITOK_VERSION;
    info["interface"] = kInterface;
    info["compiler"] = __VERSION__;
    info["isa_compiled"] = to_list(isa_compiled());
    info["isa_detected"] = to_list(isa_detected());
    info["amx"] = has_tiles();
#if defined(__SANITIZE_ADDRESS__)
    info["sanitized"] = true;
#else
    info["sanitized"] = false;
#endif
    return info;
}

py::dict call_counts() {
    py::dict counts;
    for (int entry = 0; entry < kEntries; ++entry) counts[kEntryNames[entry]] = entry_calls[entry].load();
    return counts;
}

py::dict cuda_info() {
    py::dict info;
#if defined(MEDITOK_HAVE_CUDA)
    info["compiled"] = true;
    info["architectures"] = MEDITOK_CUDA_ARCHITECTURES;
    info["driver"] = cuda_driver();
    info["driver_needed"] = cuda_driver_needed();
#else
    info["compiled"] = false;
    info["architectures"] = "";
    info["driver"] = 0;
    info["driver_needed"] = 0;
#endif
    return info;
}

}  // namespace

PYBIND11_MODULE(_core, module) {
    module.doc() = "Compiled kernels of meditok; addresses and sizes in, nothing checked. Use meditok.ops.";
    module.def("build_info", &build_info);
    module.def("call_counts", &call_counts);
    module.def("cuda_info", &cuda_info);
    module.def("choose_isa", &choose_isa);
#if defined(MEDITOK_HAVE_CUDA)
    module.def("cuda_problem", &cuda_problem);
#endif
    bind_vq(module);
    bind_vq_train(module);
    bind_attention(module);
    bind_model(module);
    bind_template_op(module);
}

}  // namespace meditok
