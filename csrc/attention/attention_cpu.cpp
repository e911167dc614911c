// Attention on CPU: which kernel runs (the table below), how rows are cut into items, and memory to work in.

#include "attention/attention_cpu.h"

#include <memory>

#include "common/isa.h"
#include "common/threads.h"

namespace meditok {

namespace {

// ---- the dispatch table -----------------------------------------------------------------------------------

AttentionKernel choose_attention(Dtype type) {
    if (type == Dtype::kFloat64) return attention_scalar();
    switch (current_isa()) {
#if defined(MEDITOK_HAVE_AVX2)
        case Isa::kAvx2: return attention_avx2();
#endif
#if defined(MEDITOK_HAVE_AVX512)
        case Isa::kAvx512:
        case Isa::kAvx512Vnni: return attention_avx512();
#endif
        default: return attention_scalar();
    }
}

// ---- items and scratch memory -----------------------------------------------------------------------------

constexpr int64_t kRowChunk = 256;  // queries of an item: packing the keys is then a small part of the work
constexpr int64_t kSmallestChunk = 48;  // and where there are few items

// The calling thread's own memory of at least `bytes`, aligned to 64. Kept from call to call: fresh pages cost more
// than a small attention.
unsigned char* thread_scratch(size_t bytes) {
    thread_local std::unique_ptr<unsigned char[]> memory;
    thread_local size_t held = 0;
    if (held < bytes) {
        memory.reset();
        held = 0;
        memory.reset(new unsigned char[bytes + 64]);
        held = bytes;
    }
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    return memory.get() + (64 - address % 64) % 64;
}

}  // namespace

void attention_cpu(const AttentionParams& params, int threads) {
    const int64_t groups = params.batch * (params.mean ? 1 : params.heads);
    if (groups == 0 || params.queries == 0) return;
    const AttentionKernel kernel = choose_attention(params.type);
    int64_t chunk = kRowChunk;  // rows do not depend on each other, so this changes no bit
    const auto items_of = [&](int64_t rows) { return groups * ((params.queries + rows - 1) / rows); };
    while (chunk > kSmallestChunk && items_of(chunk) < 2 * threads && params.queries > chunk / 2) chunk /= 2;
    const int64_t chunks = (params.queries + chunk - 1) / chunk;
    const size_t bytes = kernel.scratch_bytes(params, chunk);
    parallel_for(groups * chunks, threads, [&](int, int64_t item) {
        const int64_t group = item / chunks, begin = item % chunks * chunk;
        const int64_t end = begin + chunk < params.queries ? begin + chunk : params.queries;
        const int64_t heads = params.mean ? 1 : params.heads;
        const int64_t b = group / heads, h = group % heads;
        if (kernel.forward(params, b, h, begin, end, thread_scratch(bytes))) return;
        const AttentionKernel plain = attention_scalar();
        plain.forward(params, b, h, begin, end, thread_scratch(plain.scratch_bytes(params, chunk)));
    });
}

void attention_backward_cpu(const AttentionBackwardParams& params, int threads) {
    const int64_t heads = params.forward.heads, items = params.forward.batch * heads;
    if (items == 0) return;
    const AttentionKernel kernel = choose_attention(params.forward.type);
    const size_t bytes = kernel.backward_scratch_bytes(params);
    parallel_for(items, threads, [&](int, int64_t item) {
        const int64_t b = item / heads, h = item % heads;
        if (kernel.backward(params, b, h, thread_scratch(bytes))) return;
        const AttentionKernel plain = attention_scalar();
        plain.backward(params, b, h, thread_scratch(plain.backward_scratch_bytes(params)));
    });
}

}  // namespace meditok
