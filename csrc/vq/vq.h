// Vector quantization: which code is nearest to a vector, and what a code looks like.
//
// vq_assign: ids[n, g] = the code k with the best canonical score, the lowest k among equals:
//     cosine  s = (sum_i x_i c_i) / max(|c|, 1e-12), largest;      l2  s = sum_i (x_i - c_i)^2, smallest;
// x = x[n, g, :], c = codebook[g, k, :], upcast exactly to float64, summed in index order, every operation
// rounded on its own. A vector with a NaN or infinity gets -1; a code with one, or whose score is NaN, is
// never chosen.
// vq_lookup: out[n, g, :] = codebook[g, ids[n, g], :], for cosine divided by max(|c|, 1e-12) in
// float64 and rounded to float32, then to the type of the codebook; an id outside 0..K-1 gives a row of NaN.
//
// Types: float32, float16, bfloat16, float64 for x and codebook, each on its own. Sizes: any, 0 included.
// All strides count elements and may be negative or zero.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace meditok {

enum class Metric : int { kCosine = 0, kL2 = 1 };

struct Codebook {
    const void* data;  // (groups, codes, width)
    Dtype type;
    int64_t groups, codes, width;
    int64_t group_stride, code_stride, column_stride;
};

struct AssignParams {
    const void* x;  // (rows, groups, width)
    Dtype x_type;
    int64_t rows;
    int64_t row_stride, group_stride, column_stride;
    Codebook codebook;
    const unsigned char* packed;  // made by vq_pack from the same codebook and metric
    Metric metric;
    int64_t* ids;  // (rows, groups) contiguous
};

struct LookupParams {
    const int64_t* ids;  // (rows, groups)
    int64_t rows;
    int64_t row_stride, group_stride;
    Codebook codebook;
    Metric metric;
    void* out;  // (rows, groups, width) contiguous, of the codebook's type
};

// ---- packed codebook --------------------------------------------------------------------------------------
// One block of bytes, every part aligned to 64 of them:
//   PackedHeader, then for each group: PackedGroup
//   tiles   float (T, width, 32)   filter codes, T = ceil(codes / 32): unit (cosine) or as given (l2)
//   bias    float (T, 32)          0 (cosine) or -|c|^2 / 2 (l2); -inf: not to be found by the filter
//   radius  float (T, 32)          upper bound of the norm of the filter code; 0 where bias is -inf
//   reach   float (T)              largest radius of the tile
//   norm    double (codes)         canonical max(|c|, 1e-12); NaN marks a code that is never chosen
//   int16   int16 (T, pairs, 32, 2)  the filter codes once more, scaled to 16 bits, without gaps; pairs of columns
//   slot    int32 (T, 32)          which code stands there and in the next part, rising
//   int8    uint8 (T8, quads, 32, 4)  cosine: the same scaled to 8 bits, plus 128, four columns each; T8 is T rounded up
//           to groups of 8 tiles, and what stands at 16 l + p of a group in the int16 part stands here at 16 p + l
//   centre  double (width)         cosine, centred: the mean of the unit codes, from which the filter codes are measured
// The filter does not look for codes with a NaN or infinity, for padding, nor for exact copies of an earlier
// code. Int16, slot and int8 have room for widths kIntegerNarrowest..kInt16Widest (int8: kInt8Widest) only, are read
// by CPU only, and hold something where int16_codes > 0 (int8: int8_reach > 0); so does centre, up to kCentredWidest. vq_filter.h says when; int8, and
// int16 beyond 32 columns, only where the instruction set reads them.

constexpr int64_t kTileCodes = 32;
constexpr int64_t kAlignment = 64;
constexpr int64_t kIntegerNarrowest = 3, kInt16Widest = 2048, kInt8Widest = 32, kCentredWidest = 32;
constexpr int64_t kGroupTiles = 8, kGroupCodes = kGroupTiles * kTileCodes;
constexpr int64_t kInt8MostCodes = 16384;

struct PackedHeader {
    uint64_t magic;
    int64_t metric, groups, codes, width;
};

struct PackedGroup {
    int64_t choosable;        // codes that may be chosen
    int64_t first_choosable;  // lowest of them, or -1
    int64_t unsafe;           // codes so long or short that the float filter cannot be trusted
    int64_t int16_codes = 0;  // codes in the int16 part, 0 where it is not used
    double last_column = 0;   // l2: what the int16 filter appends to x; 0 for cosine
    int64_t centred = 0;      // cosine: whether the filter codes are measured from their mean, as for l2
    double int8_reach = 0;    // the largest sum of the magnitudes of a code before it was rounded to 8 bits
};

constexpr uint64_t kPackedMagic = 0x3276716b6f746964ull;

struct PackedLayout {
    int64_t tiles;                    // per group
    size_t group_bytes, total_bytes;  // of a group, of everything
    size_t tile_at, bias_at, radius_at, reach_at, norm_at, int16_at, slot_at, int8_at,
        centre_at;  // within a group
};

MEDITOK_HD inline size_t align_up(size_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// Pairs of columns of the int16 part; l2 has one column more than the codebook (vq_filter.h).
MEDITOK_HD inline int64_t int16_pairs(int64_t width, Metric metric) {
    return (width + (metric == Metric::kL2 ? 2 : 1)) / 2;
}

MEDITOK_HD inline int64_t int8_quads(int64_t width) {
    return (width + 3) / 4;
}

MEDITOK_HD inline PackedLayout packed_layout(int64_t groups, int64_t codes, int64_t width) {
    PackedLayout layout;
    layout.tiles = (codes + kTileCodes - 1) / kTileCodes;
    const size_t padded_codes = static_cast<size_t>(layout.tiles * kTileCodes);
    layout.tile_at = align_up(sizeof(PackedGroup));
    layout.bias_at = layout.tile_at + align_up(padded_codes * static_cast<size_t>(width) * sizeof(float));
    layout.radius_at = layout.bias_at + align_up(padded_codes * sizeof(float));
    layout.reach_at = layout.radius_at + align_up(padded_codes * sizeof(float));
    layout.norm_at = layout.reach_at + align_up(static_cast<size_t>(layout.tiles) * sizeof(float));
    layout.int16_at = layout.norm_at + align_up(static_cast<size_t>(codes) * sizeof(double));
    const size_t slots = width >= kIntegerNarrowest && width <= kInt16Widest ? padded_codes : 0;
    const size_t pairs = static_cast<size_t>(int16_pairs(width, Metric::kL2));
    const size_t quads =
        width <= kInt8Widest && codes <= kInt8MostCodes ? static_cast<size_t>(int8_quads(width)) : 0;
    layout.slot_at = layout.int16_at + align_up(slots * pairs * 2 * sizeof(int16_t));
    layout.int8_at = layout.slot_at + align_up(slots * sizeof(int32_t));
    const size_t slots8 = (slots + kGroupCodes - 1) / kGroupCodes * kGroupCodes;
    layout.centre_at = layout.int8_at + align_up(slots8 * quads * 4);
    const size_t centre = width <= kCentredWidest ? static_cast<size_t>(width) : 0;
    layout.group_bytes = layout.centre_at + align_up(centre * sizeof(double));
    layout.total_bytes = align_up(sizeof(PackedHeader)) + static_cast<size_t>(groups) * layout.group_bytes;
    return layout;
}

// The parts of one group of a packed codebook.
struct PackedView {
    const PackedGroup* group;
    const float* tiles;    // (T, width, 32)
    const float* bias;     // (T, 32)
    const float* radius;   // (T, 32)
    const float* reach;    // (T)
    const double* norm;    // (codes)
    const int16_t* int16;  // (T, pairs, 32, 2)
    const int32_t* slot;   // (T, 32)
    const uint8_t* int8;   // (T8, quads, 32, 4)
    const double* centre;  // (width)
};

MEDITOK_HD inline PackedView packed_view(const unsigned char* packed, const PackedLayout& layout,
                                         int64_t group) {
    const unsigned char* base =
        packed + align_up(sizeof(PackedHeader)) + static_cast<size_t>(group) * layout.group_bytes;
    PackedView view;
    view.group = reinterpret_cast<const PackedGroup*>(base);
    view.tiles = reinterpret_cast<const float*>(base + layout.tile_at);
    view.bias = reinterpret_cast<const float*>(base + layout.bias_at);
    view.radius = reinterpret_cast<const float*>(base + layout.radius_at);
    view.reach = reinterpret_cast<const float*>(base + layout.reach_at);
    view.norm = reinterpret_cast<const double*>(base + layout.norm_at);
    view.int16 = reinterpret_cast<const int16_t*>(base + layout.int16_at);
    view.slot = reinterpret_cast<const int32_t*>(base + layout.slot_at);
    view.int8 = base + layout.int8_at;
    view.centre = reinterpret_cast<const double*>(base + layout.centre_at);
    return view;
}

// ---- entry points -----------------------------------------------------------------------------------------

void vq_pack_cpu(const Codebook& codebook, Metric metric, unsigned char* packed, int threads);
void vq_assign_cpu(const AssignParams& params, int threads);
void vq_lookup_cpu(const LookupParams& params, int threads);

// On `device`, queued on `stream` (a cudaStream_t); nothing is allocated and nothing waits.
void vq_pack_cuda(const Codebook& codebook, Metric metric, unsigned char* packed, int device, void* stream);
void vq_assign_cuda(const AssignParams& params, int device, void* stream);
void vq_lookup_cuda(const LookupParams& params, int device, void* stream);

}  // namespace meditok
