// The fp16 filter of the tensor cores in front of the canonical score, and the proof that it loses nothing. The sister
// of vq_filter.h (float32); S, X = |x|, R and u = 2^-24 as there.
//
// fp16 and tf32 round to the same 11 bits; fp16 has a narrow range, but twice the rate, half the bytes, and tensor
// cores since sm_75. So operands are scaled by powers of two, which rounds nothing:
//   x' = 2^a x   cosine: a of the row, its largest element in [0.5, 1);
//                l2: one a for the rows of a block, because the bias has to be scaled alike
//   c' = 2^b c   b of a tile of 32 codes, its reach in [0.5, 1): an outlier costs its own tile only
// With lift = 2^a for l2, 0 for cosine, all that follows is in units of S' = x'.c + lift bias = 2^a S. X' = |x'| is at
// most sqrt(columns), columns being the width rounded up for the tensor core.
//
// What a tile computes, divided by 2^b, is off from S' + offset by at most
//   E(x, tile) = alpha R + slack,   alpha = 1.001 (D + X' (w + k)),   D = |x' - fp16(x')|, measured for every row
//   w = 1.002 2^-11 + 2^-24 sqrt(columns): fp16(c') is off from c' by 2^-11 c'_i, or by 2^-25 where subnormal
//   k = (columns + columns / 4 + 8) 2^-22: each of the columns products, of the accumulators that one product hands to
//       the next (two a product of depth 8 or more), and of a few float32 operations loses at most 2^-22 of the largest
//       magnitude in the sum. A tensor core that keeps 24 bits and truncates loses 2^-23 an addend (Fasi, Higham,
//       Mikaitis, Pranesh: Numerical behavior of NVIDIA tensor cores, PeerJ CS 2021), so half of it is room.
//   slack = k (lift R^2 / 2 + offset) + (C + 4) 2^-53 (sqrt(columns) + lift R)^2 / lift + 2^-76: the same of the bias,
//       the rounding of the canonical l2 score, and whatever falls below the normal range
// (D R bounds |(x' - fp16(x')) . fp16(c')| / 2^b, whose factor |fp16(c')| exceeds 2^b R by 2^-11: hence 1.001.)
//
// The offset makes the best score positive, so that maxima can start at 0 and floats be compared as integers: with r
// the reach of any tile that has a code, some code has S' >= -(X' r + lift r^2 / 2) >= -offset. So L may start at 0.
// Then, as in vq_filter.h: L = max over tiles of (largest F - E), and only codes with F + E >= L are candidates.
#pragma once

#include "vq/vq_filter.h"

namespace meditok {

constexpr float kHalfLimit = 1152921504606846976.0f;  // 2^60: rows and codes beyond it are scored canonically
constexpr float kHalfSmallest = 8.673617379884035e-19f;  // 2^-60: so are rows below it, for cosine
constexpr float kHalfTiny = 1.3234889800848443e-23f;     // 2^-76
constexpr float kAlphaRoom = 1.001f;
static_assert(kHalfLimit == static_cast<float>(kLargestL2), "the range of packed l2 codes");

// Exponent e of value = f 2^e with f in [0.5, 1); 0 for 0. Normal values only.
MEDITOK_HD inline int exponent_of(float value) {
    return value == 0.0f ? 0 : static_cast<int>((bits_from_float(value) >> 23) & 255u) - 126;
}

// 2^exponent for -126 <= exponent <= 127.
MEDITOK_HD inline float power_of_two(int exponent) {
    return float_from_bits(static_cast<uint32_t>(exponent + 127) << 23);
}

// What the rows of a block and the codes of a group have in common.
struct Frame {
    float lift, offset;
    float code_rounding, accumulation;  // w and k
    float norm;                         // sqrt(columns) >= X'
    float canonical, drop;              // (C + 4) 2^-53 and 1 / lift; 0 for cosine
};

// a for l2: the block's largest |x_i| below 1, and lift R^2 far from overflow for the largest reach R of the group.
MEDITOK_HD inline int row_exponent_l2(float largest_x, float largest_reach) {
    int exponent = 60;
    if (largest_x > 0.0f && -exponent_of(largest_x) < exponent) exponent = -exponent_of(largest_x);
    const int room = 100 - 2 * exponent_of(largest_reach);
    return exponent < room ? exponent : room;
}

// `exponent` is that of l2; `reach` the smallest of a tile that is not 0, or 0 if all are.
MEDITOK_HD inline Frame make_frame(Metric metric, int64_t width, int columns, int exponent, float reach) {
    Frame frame;
    frame.lift = metric == Metric::kL2 ? power_of_two(exponent) : 0.0f;
    frame.norm = sqrtf(static_cast<float>(columns)) * kRoundUp;
    frame.offset = (frame.norm * reach + 0.5f * frame.lift * reach * reach) * 1.0001f;
    frame.code_rounding = 4.892578125e-4f + 5.9604645e-8f * frame.norm;
    frame.accumulation = static_cast<float>(columns + columns / 4 + 8) * 2.384185791015625e-7f;
    frame.canonical = metric == Metric::kL2 ? static_cast<float>(width + 4) * 1.1102231e-16f : 0.0f;
    frame.drop = metric == Metric::kL2 ? power_of_two(-exponent) : 0.0f;
    return frame;
}

// b of a tile.
MEDITOK_HD inline int code_exponent(float reach) {
    const int exponent = reach > kHalfSmallest ? -exponent_of(reach) : 60;
    return reach == 0.0f ? 0 : exponent;
}

MEDITOK_HD inline float row_alpha(const Frame& frame, float x_norm, float x_error) {
    return kAlphaRoom * (x_error + x_norm * (frame.code_rounding + frame.accumulation));
}

MEDITOK_HD inline float tile_slack(const Frame& frame, float reach, float accumulation) {
    const float square = frame.lift * reach * reach;
    const float canonical = frame.norm * frame.norm * frame.drop + 2.0f * frame.norm * reach + square;
    return accumulation * (0.5f * square + frame.offset) + frame.canonical * canonical + kHalfTiny;
}

MEDITOK_HD inline float tile_slack(const Frame& frame, float reach) {
    return tile_slack(frame, reach, frame.accumulation);
}

}  // namespace meditok
