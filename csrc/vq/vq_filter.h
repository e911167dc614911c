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
//   |F - S| <= E(X, R) = (C + 4) (1.01 u (X R + R^2/2) + 2^-53 (X + R)^2 + 2^-124 (1 + X + R)),
// the last term being for results below the normal range (2^-140 would do, but arithmetic on subnormal numbers takes
// some processors a hundred cycles). E depends on R, so every tile has its own bound, and one outlier code of norm 1e4
// widens the band of its own tile only.
// Let L = max over tiles of (largest F - E). The best code has S >= L, hence F + E >= L: only such codes are
// scored again, in float64, in rising order, the first best winning. A slack of 8u|L| absorbs the rounding of
// L and F + E.
//
// Cosine codes in a narrow cone have scores that differ less than float32 resolves. Packing on the CPU measures those
// whose mean square distance from their mean m is below kCentredSpread, in up to 32 columns, from m: for vectors of
// length 1, x.c = 1 - |x - c|^2 / 2 = 1 - |(x - m) - (c - m)|^2 / 2, so that the filter is that of l2 for x/|x| - m and
// c/|c| - m, whose X and R are small. Both are computed in float64: their errors and that of the canonical score move
// S by less than 7 (C + 7) 2^-53, all lengths being at most 2, which the last term of E covers with (C + 8) 2^-50.
//
// The int16 filter (CPU, widths 3 to 2,048) stands before the float32 one. Both metrics become a product of vectors:
//     cosine  a = s x, b = t c/|c|;     l2  a = s (x, m), b = t (c, -|c|^2 / (2 m)), a.b = s t S,  m = M / sqrt 2,
// M being the largest norm of the group's filter codes (1 for cosine). s and t make |a| = 32764 and |b| <= 32764 (for
// l2 the appended vector is at most M sqrt 1.5 long). A and B are a and b rounded to integers, D = C or C + 1 columns:
//   - |A|, |B| <= 32764 + sqrt(2049) / 2 < 32787, so by Cauchy and Schwarz no partial sum of F = A.B leaves 31 bits;
//   - |F - a.b| <= (|a|_1 + |b|_1) / 2 + D / 4 <= 32764 sqrt D + D / 4;
//   - wide rows are scaled in float32: three roundings of each a_i move F by at most 3 u 32764 32787 < 193;
//   - float64 rounding of a and b, and the canonical score itself in units of 1 / (s t), add less than 2: for l2
//     because |x| <= 2^10 M is asked for, (|x| + M)^2 s t being at most 32764^2 sqrt 2 (1 + |x| / M).
// So |F - a.b| <= E = 32764 sqrt D + D / 4 + 195, the same number for every row and code, and the best code has
// F >= largest F - 2 E. A row with too many such codes goes on to the float32 filter.
// The band is 2 sqrt D / 32764 of |a| |b|: 5e-4 at 32 columns, 2e-3 at 1,000. It is of no use in one or two dimensions,
// nor where it is wide against the spread of the codes (an outlier, or a codebook far from the origin): packing leaves
// it out where M^2 > int16_spread times the mean squared distance of the filter codes
// from their mean. Scores of D columns spread by about |x| sqrt(distance / D), of which the band shall be 0.3 at most.
//
// The int8 filter (CPU, cosine, widths 3 to 32) stands before the int16 one: twice the columns an instruction. What it
// leaves is looked at in 16 bits, with the band above, among the codes that share a lane with one in its own band.
// a = s x with the largest |a_i| of the row 127, b = 127 c/|c|; A and B are their nearest integers, and B + 128, which is
// not negative, stands for B:
//   - that adds 128 times the sum of A to each F of a row, and changes no comparison within it;
//   - |F - a.b| <= (|a|_1 + |b|_1) / 2 + D / 4, and rounding in float64, of a and b and of the canonical score, adds
//     less than 1e-6: 2 E = |a|_1 + largest |b|_1 of the group + D / 2 + 1.
// A row with too many codes in its band goes on to the int16 filter. On a sphere of D dimensions the codes at a distance
// below r of a row are about the share cap r^(D-1), cap = Gamma(D/2) / (sqrt(pi) (D-1) Gamma((D-1)/2)). If the nearest of
// K has the square distance q = (K cap)^(-2/(D-1)), those in a band of width w below its score 1 - q/2 number
// (1 + 2 w / q)^((D-1)/2). w = sqrt(D) / 95 was measured; q is smaller by the mean squared distance of the codes from
// their mean, should they not fill the sphere. Packing leaves the int8 part out where looking at so many codes would
// cost more than the products that are saved.
//
// Cosine does not depend on the length of x, so x is scaled by a power of two until its largest element lies in
// [0.5, 1). Vectors or codes outside the ranges below take the canonical loop over all codes instead.
#pragma once

#include <cmath>

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
    bound.tiny = static_cast<float>(terms * 4.70197740328915e-38);  // 2^-124
    return bound;
}

constexpr double kCentredSpread = 0.0625;

// E(X, R) of filter codes that are measured from their mean.
inline Bound make_centred_bound(int64_t width) {
    Bound bound = make_bound(width);
    bound.tiny = static_cast<float>(static_cast<double>(width + 8) * 8.8817841970012523e-16);  // 2^-50
    return bound;
}

constexpr double kInt16Length = 32764.0;
constexpr double kInt16LongestX = 1024.0;                      // of M
constexpr double kInt16SmallestNorm = 3.872591914849318e-121;  // 2^-400 <= M: no square underflows
constexpr double kInt8Length = 127.0;                          // of the longest column
constexpr double kInt8Look = 40.0;  // what a code in the band costs, in products of words and 16 codes
constexpr int64_t kIntegerCandidates = 16;  // about the cost of a filter itself

// 2 E
inline int32_t int16_band(int64_t columns) {
    const double terms = static_cast<double>(columns);
    return 2 * static_cast<int32_t>(kInt16Length * sqrt(terms) + 0.25 * terms + 196.0);
}

// 2 E of the int8 filter
inline int32_t int8_band(double x_reach, double code_reach, int64_t width) {
    return static_cast<int32_t>(x_reach + code_reach + 0.5 * static_cast<double>(width) + 1.0);
}

// `spread`: the mean squared distance of the codes from their mean.
inline bool int8_pays(int64_t codes, int64_t width, double spread) {
    const double columns = static_cast<double>(width), less = columns - 1.0;
    const double cap = exp(lgamma(0.5 * columns) - lgamma(0.5 * less)) / (1.7724538509055159 * less);
    const double nearest = spread * pow(static_cast<double>(codes) * cap, -2.0 / less);
    const double expected = pow(1.0 + sqrt(columns) / 47.5 / nearest, 0.5 * less);
    const int64_t groups = (codes + kGroupCodes - 1) / kGroupCodes;
    const int64_t saved =
        (codes + 15) / 16 * int16_pairs(width, Metric::kCosine) - groups * 16 * int8_quads(width);
    return expected * kInt8Look < static_cast<double>(saved);
}

inline double int16_spread(int64_t columns) {
    const double ratio = 0.15 * kInt16Length / static_cast<double>(columns), most = 64.0;
    return ratio * ratio < most ? ratio * ratio : most;
}

// The nearest integer of a |value| < 2^15: the low bits of the sum are the rounded value.
inline int16_t round_to_int16(double value) {
    const double shifted = value + 6755399441055744.0;  // 1.5 * 2^52
    int64_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    return static_cast<int16_t>(bits);
}

constexpr float kSlack = 4.76837158203125e-7f;  // 8u
constexpr float kRoundUp = 1.000001f;           // makes a float32 norm an upper bound

}  // namespace meditok
