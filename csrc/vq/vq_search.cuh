// What both assign kernels do for a row: reading it, judging it, and the searches by one warp for the rows that
// the tensor-core filter leaves open. Everything here is written once, out of the hot loops.
#pragma once

#include "common/ptx.cuh"
#include "common/warp.cuh"
#include "vq/vq_cuda.h"
#include "vq/vq_filter_half.h"

namespace meditok {

constexpr int kTile = static_cast<int>(kTileCodes);

// What happens to a row. Candidates are counted from 0 on; the rest is settled before the filter.
constexpr int kDone = -1;       // the id is written, or there is no such row
constexpr int kCanonical = -2;  // all codes are scored in float64

__device__ inline float to_float(float value) {
    return value;
}
__device__ inline float to_float(half_bits value) {
    return half_to_float(value.bits);
}
__device__ inline float to_float(bfloat16_bits value) {
    return float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}
__device__ inline float to_float(double value) {
    return static_cast<float>(value);
}

// kCount elements of one group as float32: only float64 is rounded, and what exceeds float32 becomes infinite. row(i)
// and column(i) say which; 0 where not wanted(i).
template <int kCount, class Row, class Column, class Wanted>
__device__ __forceinline__ void read_rows(const AssignParams& params, int64_t group, Row row, Column column,
                                          Wanted wanted, float (&value)[kCount]) {
    auto index = [&](int i) {
        return row(i) * params.row_stride + group * params.group_stride + column(i) * params.column_stride;
    };
    read_elements(params.x, params.x_type, index, wanted, value, [](auto raw) { return to_float(raw); });
}

// The state of a row whose largest magnitude as float32 is `largest`; `wild`: an element is NaN or beyond the range of
// the filter. A settled row gets its id.
static __device__ __noinline__ int judge_row(const AssignParams& params, const PackedLayout& layout,
                                             int64_t row, int64_t group, float largest, bool wild) {
    const PackedView view = packed_view(params.packed, layout, group);
    const bool cosine = params.metric == Metric::kCosine;
    bool finite = true;
    for (int64_t i = 0; i < params.codebook.width && wild; ++i) {
        finite = finite && is_finite(element(params.x, params.x_type,
                                             row * params.row_stride + group * params.group_stride +
                                                 i * params.column_stride));
    }
    if (!finite || view.group->choosable == 0) {
        params.ids[row * params.codebook.groups + group] = -1;
        return kDone;
    }
    // A float64 row may be 0 as float32 only.
    if (cosine && largest == 0.0f && params.x_type != Dtype::kFloat64) {
        params.ids[row * params.codebook.groups + group] = view.group->first_choosable;
        return kDone;
    }
    const bool extreme = wild || (cosine && largest < kHalfSmallest);
    const bool beyond = view.group->unsafe > 0 || params.codebook.width > kLargestWidth;
    return extreme || beyond ? kCanonical : 0;
}

// The best of all lanes, known to all: highest score, lowest code.
__device__ inline Best warp_best(Best best) {
    for (int offset = 16; offset > 0; offset /= 2) {
        Best other;
        other.score = __shfl_xor_sync(kAllLanes, best.score, offset);
        other.code = __shfl_xor_sync(kAllLanes, best.code, offset);
        const bool better = best.code < 0 || other.score > best.score ||
                            (other.score == best.score && other.code < best.code);
        if (other.code >= 0 && better) best = other;
    }
    return best;
}

// All codes in float64, a lane a code.
static __device__ __noinline__ int64_t canonical_search(const AssignParams& params,
                                                        const PackedLayout& layout, int64_t row,
                                                        int64_t group) {
    const PackedView view = packed_view(params.packed, layout, group);
    Best best;
#pragma unroll 1
    for (int64_t code = threadIdx.x % 32; code < params.codebook.codes; code += 32) {
        const double norm = view.norm[code];
        if (norm == norm) best.consider(device_score(params, row, group, code, norm), code);
    }
    return warp_best(best).code;
}

// All codes in float32, a lane a code of a tile, and in float64 those left in the band. x' = scale x.
static __device__ __noinline__ int64_t full_search(const AssignParams& params, const PackedLayout& layout,
                                                   const Frame& frame, int64_t row, int64_t group,
                                                   float scale, float x_norm) {
    const PackedView view = packed_view(params.packed, layout, group);
    const int64_t width = params.codebook.width;
    const int lane = threadIdx.x % 32;
    float lower = -INFINITY, upper = -INFINITY;  // of the best score so far; of the code held
    bool scored = false;
    Best best;
    for (int64_t tile = 0; tile < layout.tiles; ++tile) {
        const int64_t code = tile * kTile + lane;
        const float bias = view.bias[code], radius = view.radius[code];
        if (!(bias > -INFINITY)) continue;
        float value = frame.lift * bias;
#pragma unroll 1
        for (int64_t i = 0; i < width; i += 8) {
            float x[8];
            auto wanted = [&](int j) { return i + j < width; };
            read_rows(params, group, [&](int) { return row; }, [&](int j) { return i + j; }, wanted, x);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float c = wanted(j) ? view.tiles[(tile * width + i + j) * kTile + lane] : 0.0f;
                value = __fmaf_rn(x[j] * scale, c, value);
            }
        }
        const float margin = x_norm * frame.accumulation * radius + tile_slack(frame, radius);
        lower = fmaxf(lower, value - margin);
        if (!(value + margin >= lower)) continue;
        if (best.code < 0 || upper < lower) {  // nothing held, or what is held is out by now
            best.code = code;
            scored = false;
            upper = value + margin;
            continue;
        }
        if (!scored) best.score = device_score(params, row, group, best.code, view.norm[best.code]);
        scored = true;
        const int64_t held = best.code;
        best.consider(device_score(params, row, group, code, view.norm[code]), code);
        if (best.code != held) upper = value + margin;
    }
    if (!(upper >= warp_max(lower))) best.code = -1;
    if (best.code >= 0 && !scored) {
        best.score = device_score(params, row, group, best.code, view.norm[best.code]);
    }
    return warp_best(best).code;
}

// The best of a few candidates in float64, by one thread; in any order.
__device__ inline int64_t score_candidates(const AssignParams& params, const PackedLayout& layout,
                                           int64_t row, int64_t group, const int* candidates, int count) {
    const PackedView view = packed_view(params.packed, layout, group);
    Best best;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        const int code = candidates[i];
        const double score = device_score(params, row, group, code, view.norm[code]);
        const bool better = best.code < 0 || score > best.score || (score == best.score && code < best.code);
        if (better) {
            best.score = score;
            best.code = code;
        }
    }
    return best.code;
}

}  // namespace meditok
