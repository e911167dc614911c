// What the binding files share. An entry takes addresses and sizes as integers, counts its calls, releases
// the interpreter lock and converts nothing: checks and allocation are Python's.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <cstdint>

namespace meditok {

// Signatures of the entries, as meditok/native.py expects them; raise both together.
constexpr int kInterface = 7;

using Address = std::uintptr_t;

// A new entry is a line here and, at the same place, its name below.
enum Entry {
    kTemplateOp,
    kVqPack,
    kVqAssign,
    kVqLookup,
    kVqQuantize,
    kVqQuantizeBackward,
    kVqStats,
    kVqUpdate,
    kAttention,
    kAttentionBackward,
    kLinear,
    kDepthwise,
    kUpsampleDifferences,
    kUpsampleGather,
    kTemplateOpCuda,
    kVqPackCuda,
    kVqAssignCuda,
    kVqLookupCuda,
    kVqQuantizeCuda,
    kVqQuantizeBackwardCuda,
    kVqStatsCuda,
    kVqUpdateCuda,
    kAttentionCuda,
    kAttentionBackwardCuda,
    kEntries
};
constexpr const char* kEntryNames[kEntries] = {"template_op",
                                               "vq_pack",
                                               "vq_assign",
                                               "vq_lookup",
                                               "vq_quantize",
                                               "vq_quantize_backward",
                                               "vq_stats",
                                               "vq_update",
                                               "attention",
                                               "attention_backward",
                                               "linear",
                                               "depthwise",
                                               "upsample_differences",
                                               "upsample_gather",
                                               "template_op_cuda",
                                               "vq_pack_cuda",
                                               "vq_assign_cuda",
                                               "vq_lookup_cuda",
                                               "vq_quantize_cuda",
                                               "vq_quantize_backward_cuda",
                                               "vq_stats_cuda",
                                               "vq_update_cuda",
                                               "attention_cuda",
                                               "attention_backward_cuda"};
static_assert(kEntryNames[kEntries - 1] != nullptr, "an entry has no name");
extern std::atomic<int64_t> entry_calls[kEntries];

inline void count_call(Entry entry) {
    entry_calls[entry].fetch_add(1, std::memory_order_relaxed);
}

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

void bind_template_op(pybind11::module_& module);
void bind_vq(pybind11::module_& module);
void bind_vq_train(pybind11::module_& module);
void bind_attention(pybind11::module_& module);
void bind_model(pybind11::module_& module);

}  // namespace meditok
