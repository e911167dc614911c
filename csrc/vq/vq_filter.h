// The float32 filter in front of the canonical score, and the proof that it loses nothing. Shared by every
// fast backend.
//
// Maximised by both metrics: S = x.c/|c| (cosine), S = x.c - |c|^2/2 = (|x|^2 - s)/2 (l2). The filter
// computes F, the same in float32: start from the bias, then one fused multiply-add per column. With u =
// 2^-24, X >= |x| and R >= |c'|, c' being the code the filter sees:
//   - each of the C additions rounds a partial sum of at most |bias| + sum|x_i c'_i| <= R^2/2 + X R;
//   - rounding x, c' and the bias to float32 moves F by at most 2u X R + u R^2/2;
//   - for cosine the bias is 0 and R <= 1, so the R^2/2 only loosens the bound;
//   - the canonical score itself is off by (C + 2) 2^-53 X R (cosine) or (C + 2) 2^-53 (X + R)^2 (l2, of s).
// Together, with room for the rounding of the bound itself (1.01 covers C <= 65,536, where C u <= 0.004):
//   |F - S| <= E(X, R) = (C + 4) (1.01 u (X R + R^2/2) + 2^-53 (X + R)^2 + 2^-140 (1 + X + R)),
// the last term being for results below the normal range. E depends on R, so every tile has its own bound,
// and one outlier code of norm 1e4 widens the band of its own tile only.
// Let L = max over tiles of (largest F - E). The best code has S >= L, hence F + E >= L: only such codes are
// scored again, in float64, in rising order, the first best winning. A slack of 8u|L| absorbs the rounding of
// L and F + E.
//
// Cosine does not depend on the length of x, so x is scaled by a power of two until its largest element lies in
// [0.5, 1). Vectors or codes outside the ranges below take the canonical loop over all codes instead.
#pragma once

#include "vq/vq.h"

namespace meditok {

constexpr double kFloor = 1e-12;                             // of the norm of a code
constexpr double kLargestL2 = 1152921504606846976.0;         // 2^60: squares and products stay below 2^121
constexpr double kLargestCosine = 3.2733906078961419e150;    // 2^500: no float64 product overflows
constexpr double kSmallestCosine = 3.0549363634996047e-151;  // 2^-500: nor underflows
constexpr int64_t kLargestWidth = 65536;

struct Bound {
    float product, square, tiny;
};

// E(X, R); the bound for all codes of a tile when R is the tile's reach. `static`: see common/simd.h.
MEDITOK_HD static inline float bound_of(const Bound& bound, float x_norm, float radius) {
    const float sum = x_norm + radius;
    return bound.product * (x_norm * radius + 0.5f * radius * radius) + bound.square * (sum * sum) +
           bound.tiny * (1.0f + sum);
}

MEDITOK_HD inline Bound make_bound(int64_t width) {
    const double terms = static_cast<double>(width + 4);
    Bound bound;
    bound.product = static_cast<float>(terms * 6.05e-8);  // a little over 1.01 * 2^-24
    bound.square = static_cast<float>(terms * 1.1102230246251565e-16);
    bound.tiny = static_cast<float>(terms * 7.1746481373430634e-43);  // 2^-140
    return bound;
}

constexpr float kSlack = 4.76837158203125e-7f;  // 8u
constexpr float kRoundUp = 1.000001f;           // makes a float32 norm an upper bound

}  // namespace meditok
