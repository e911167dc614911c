// Reductions over the 32 lanes of a warp, and floats whose order is that of integers.
#pragma once

#include <cstdint>

#include "common/ptx.cuh"

namespace meditok {

constexpr unsigned kAllLanes = 0xffffffffu;

// Read anew, see thread_id().
__device__ inline int lane_id() {
    return thread_id() % 32;
}

// Over `kLanes` neighbouring lanes, known to all of them.
template <int kLanes = 32>
__device__ inline float warp_sum(float value) {
    for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
    return value;
}

// The largest value of `kLanes` neighbouring lanes, known to all of them.
template <int kLanes = 32>
__device__ inline float warp_max(float value) {
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, offset));
    }
    return value;
}

// Not for NaN. -0 comes before 0.
__device__ inline int ordered(float value) {
    const int bits = __float_as_int(value);
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}

__device__ inline float from_ordered(int key) {
    return __int_as_float(key < 0 ? key ^ 0x7fffffff : key);
}

}  // namespace meditok
