// Between the CPU files of attention: a kernel does some query rows of one batch and head, and takes memory to work in.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/attention.h"

namespace meditok {

// A kernel returns false where it is not made for what it met: then the scalar one does the whole item.
struct AttentionKernel {
    // Bytes of scratch for `rows` rows, aligned to 64.
    size_t (*scratch_bytes)(const AttentionParams& params, int64_t rows);
    // Rows `begin` to `end` of queries of batch `b` and head `h`, or of all heads for `mean`.
    bool (*forward)(const AttentionParams& params, int64_t b, int64_t h, int64_t begin, int64_t end,
                    unsigned char* scratch);
    size_t (*backward_scratch_bytes)(const AttentionBackwardParams& params);
    // All rows of batch `b` and head `h`.
    bool (*backward)(const AttentionBackwardParams& params, int64_t b, int64_t h, unsigned char* scratch);
};

AttentionKernel attention_scalar();

// Not float64. They leave items to the scalar loop where a NaN or infinity among the values, or in the backward
// anywhere, meets a mask: weights of 0 would carry it to rows that do not attend to it.
AttentionKernel attention_avx2();
AttentionKernel attention_avx512();

}  // namespace meditok
