// Between the CUDA files of this folder: attention_cuda.cpp chooses, the launchers run.
#pragma once

#include "attention/attention.h"
#include "common/check.h"

namespace meditok {

// Rows longer than this, and float64, are the library's.
constexpr int64_t kWidestHead = 128;

// Where a call runs, and what decides how.
struct Place {
    int device;
    void* stream;      // a cudaStream_t
    int architecture;  // 80 for compute capability 8.0
    int shared_bytes;  // that a block may have
    int multiprocessors;
};
Place place_of(int device, void* stream);

// Products on tensor cores: fp16 from sm_75 on, bfloat16 and tf32 (of float32 inputs) from sm_80 on. False: the tiles do
// not fit into the device's shared memory, or this build has no such code for it, and nothing was launched.
bool launch_attention_mma(const AttentionParams& params, const Place& place);
bool launch_attention_backward_mma(const AttentionBackwardParams& params, const Place& place);

// Products by wgmma for short sequences; false: not covered, and nothing was launched.
bool launch_attention_sm90(const AttentionParams& params, const Place& place);

// Products in float32, for every type but float64 and every device.
void launch_attention_simt(const AttentionParams& params, const Place& place);
void launch_attention_backward_simt(const AttentionBackwardParams& params, const Place& place);

// Whether rows of an array are read and written as vectors of 16 bytes.
inline bool has_vectors(const void* data, const AttentionStrides& strides, int64_t width, Dtype type) {
    const int64_t elements = type == Dtype::kFloat32 ? 4 : 8;
    const int64_t sum = strides.batch | strides.head | strides.token | width;
    return strides.column == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && sum % elements == 0;
}

inline unsigned grid_of(int64_t blocks) {
    require(blocks < (int64_t{1} << 31),
            "attention takes fewer than 2^31 blocks of queries in one call; split the batch");
    return static_cast<unsigned>(blocks);
}

}  // namespace meditok
