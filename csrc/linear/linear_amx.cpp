// AMX: float32 products on tiles of bfloat16. Every float is, exactly, a sum of three bfloat16 of 8 significant bits each,
// x = x1 + x2 + x3, |x2| <= 2^-8 |x1|, |x3| <= 2^-8 |x2|, and of the nine products of two such sums the six largest,
// x1 w1, x1 w2, x2 w1, x2 w2, x1 w3, x3 w1, leave an error of 2^-24, less than one rounding of the plain product.
// The unit takes 512 bfloat16 multiply-adds a cycle, so that six cost a third of the vector units' time for the one.
// Of 128 values of k the five small products are added up first, then the large one: the small ones are not rounded
// against the large sum. Those partial sums are added up in vectors.
//
// Weights are the left operand: their rows are split as they lie in memory, and only x, which is small, is transposed.
// Tiles hold float pairs (k, k + 16): any order does, as long as both sides have the same.

#include <immintrin.h>

#include "common/simd.h"
#include "linear/linear.h"

namespace meditok {

namespace {

#include "common/vector_avx512.inl.h"
//
#include "common/vector_math.inl.h"

constexpr int64_t kTileRows = 1;  // of the rows before they are split: one after the other

#include "linear/linear_rows.inl.h"

constexpr int64_t kStep = 32;                 // values of k in a tile
constexpr int64_t kGroup = 16;                // rows of x, or of the weights, in a tile
constexpr int64_t kRows = 2 * kGroup;         // rows of x that meet a panel at once: 2 x 2 tiles of sums
constexpr int64_t kTile = kGroup * kStep;     // bfloat16 of a tile, 1 KiB
constexpr int64_t kStepSize = 3 * 2 * kTile;  // bfloat16 of a step of either operand: (split, group, tile)
constexpr int64_t kSpan = 2;                  // steps at once ...
constexpr int64_t kAtOnce = 2;  // ... of so many panels: 24 KiB of weights, which stay in the first cache
constexpr int64_t kSums = kRows * kPanel;   // floats
constexpr int64_t kLines = kStep * 4 / 64;  // cache lines of a step of a row of weights
static_assert(kPad % kStep == 0, "whole steps in a row");
static_assert(kPanel == 2 * kGroup, "two tiles of weights in a panel");

// Two vectors -> three vectors of bfloat16 pairs (a[i], b[i]), the largest part first. Rounding to 8 bits by Dekker's
// multiplication with 2^16 + 1; infinities and values past 2^111 become NaN.
MEDITOK_INLINE void split(Vec a, Vec b, Vec* parts) {
    const Vec factor = fill(65537.0f);
    for (int part = 0; part < 3; ++part) {
        const Vec wide_a = mul(a, factor), wide_b = mul(b, factor);
        const Vec top_a = part == 2 ? a : sub(wide_a, sub(wide_a, a));
        const Vec top_b = part == 2 ? b : sub(wide_b, sub(wide_b, b));
        a = sub(a, top_a);
        b = sub(b, top_b);
        // The lower halves of both are 0.
        const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(top_a), 16);
        parts[part] = _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_castps_si512(top_b)));
    }
}

// Steps `first` to `last` of a panel -> packed (steps, split, group, 16 rows, 32).
void pack_steps(const LinearParams& params, int64_t panel, int64_t first, int64_t last, uint16_t* packed) {
    for (int64_t i = 0; i < kPanel; ++i) {
        const float* from = weight_row(params, panel, i);
        uint16_t* to = packed + i * kStep;
        for (int64_t step = first; step < last; ++step, to += kStepSize) {
            Vec halves[2], parts[3];
            for (int64_t half = 0; half < 2; ++half) {
                const int64_t k = step * kStep + half * kWidth, left = from == nullptr ? 0 : params.width - k;
                if (left >= kWidth) {
                    halves[half] = load(from + k);
                } else {
                    halves[half] = left > 0 ? load_first(from + k, left) : fill(0.0f);
                }
            }
            split(halves[0], halves[1], parts);
            for (int part = 0; part < 3; ++part) {
                store(reinterpret_cast<float*>(to + part * 2 * kTile), parts[part]);
            }
        }
    }
}

// Asks for 1 / `shares` of what pack_steps will read for these steps.
MEDITOK_INLINE void fetch_steps(const LinearParams& params, int64_t panel, int64_t first, int64_t last,
                                int64_t share, int64_t shares) {
    for (int64_t i = kPanel * share / shares; i < kPanel * (share + 1) / shares; ++i) {
        const float* from = weight_row(params, panel, i);
        if (from == nullptr) return;
        const int64_t end = last * kStep < params.width ? last * kStep : params.width;
        for (int64_t k = first * kStep; k < end; k += kWidth) __builtin_prefetch(from + k, 0, 2);
    }
}

// A tile of kRows rows as (steps, split, group, 16 pairs, 16 rows, 2).
void prepare_tile(const LinearParams& params, int64_t row, int64_t count, void* tile, void* spare) {
    float* rows = static_cast<float*>(spare);
    const int64_t width = padded_width(params);
    for (int64_t group = 0; group * kGroup < count; ++group) {
        const int64_t here = count - group * kGroup < kGroup ? count - group * kGroup : kGroup;
        for (int64_t r = 0; r < here; ++r) prepare_row(params, row + group * kGroup + r, rows + r * width);
        uint16_t* to = static_cast<uint16_t*>(tile) + group * kTile;
        for (int64_t k = 0; k < width; k += kStep, to += kStepSize) {
            Vec parts[3][kGroup];
            for (int64_t r = 0; r < kGroup; ++r) {
                Vec row_parts[3] = {fill(0.0f), fill(0.0f), fill(0.0f)};
                if (r < here)
                    split(load(rows + r * width + k), load(rows + r * width + k + kWidth), row_parts);
                for (int part = 0; part < 3; ++part) parts[part][r] = row_parts[part];
            }
            for (int part = 0; part < 3; ++part) {
                transpose(parts[part]);
                for (int64_t i = 0; i < kGroup; ++i) {
                    store(reinterpret_cast<float*>(to + part * 2 * kTile + i * kStep), parts[part][i]);
                }
            }
        }
    }
}

// Registers: sums 0 to 3 as (weights' group, rows' group), weights 4 and 5, rows 6 and 7.
MEDITOK_INLINE void load_weights(const uint16_t* from) {
    _tile_loadd(4, from, 64);
    _tile_loadd(5, from + kTile, 64);
}
template <int kGroups>
MEDITOK_INLINE void load_rows(const uint16_t* from) {
    _tile_loadd(6, from, 64);
    if (kGroups == 2) _tile_loadd(7, from + kTile, 64);
}
template <int kGroups>
MEDITOK_INLINE void multiply() {
    _tile_dpbf16ps(0, 4, 6);
    if (kGroups == 2) _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    if (kGroups == 2) _tile_dpbf16ps(3, 5, 7);
}

// kGroups * 16 rows by a panel over `steps` steps, added to sums (2, 2, 16 columns, 16 rows) where `more`.
template <int kGroups>
void multiply_span(const uint16_t* weights, const uint16_t* rows, int64_t steps, bool more, float* sums) {
    constexpr int64_t kPart = 2 * kTile;
    if (more) {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + 256, 64);
        _tile_loadd(2, sums + 512, 64);
        _tile_loadd(3, sums + 768, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; ++step) {
        const uint16_t *w = weights + step * kStepSize, *x = rows + step * kStepSize;
        load_weights(w);
        load_rows<kGroups>(x + 2 * kPart);
        multiply<kGroups>();  // w1 x3
        load_rows<kGroups>(x + kPart);
        multiply<kGroups>();  // w1 x2
        load_weights(w + kPart);
        multiply<kGroups>();  // w2 x2
        load_rows<kGroups>(x);
        multiply<kGroups>();  // w2 x1
        load_weights(w + 2 * kPart);
        multiply<kGroups>();  // w3 x1
    }
    for (int64_t step = 0; step < steps; ++step) {
        load_weights(weights + step * kStepSize);
        load_rows<kGroups>(rows + step * kStepSize);
        multiply<kGroups>();  // w1 x1
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}

// Sums (2, 2, 16 columns, 16 rows) of `count` rows -> params.out.
void finish_rows(const LinearParams& params, int64_t row, int64_t count, int64_t panel, const float* sums) {
    alignas(64) float turned[kGroup * kPanel];
    const int64_t step = params.activation == Activation::kGeglu ? kPanel / 2 : kPanel, begin = panel * step;
    const int64_t end = begin + step < params.columns ? begin + step : params.columns;
    for (int64_t group = 0; group * kGroup < count; ++group) {
        for (int64_t half = 0; half < 2; ++half) {
            Vec block[kGroup];
            const float* from = sums + (half * 2 + group) * 256;
            for (int64_t i = 0; i < kGroup; ++i) block[i] = load(from + i * kGroup);
            transpose(block);
            for (int64_t i = 0; i < kGroup; ++i) store(turned + i * kPanel + half * kGroup, block[i]);
        }
        const int64_t here = count - group * kGroup < kGroup ? count - group * kGroup : kGroup;
        for (int64_t r = 0; r < here; ++r) {
            const Vec a = load(turned + r * kPanel), b = load(turned + r * kPanel + kGroup);
            const Vec zero = add(sub(a, a), sub(b, b));  // NaN where one is not finite
            if (_mm512_cmp_ps_mask(zero, zero, _CMP_UNORD_Q) != 0) {
                // Infinity has no parts; the plain loops know it.
                const int64_t at_row = row + group * kGroup + r;
                linear_scalar(params, at_row, at_row + 1, begin, end);
            } else {
                finish(params, row + group * kGroup + r, panel, turned + r * kPanel);
            }
        }
    }
}

// 64 bytes that describe the tile registers: all 16 rows of 64 bytes.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

int64_t spare_bytes(int64_t rows, int64_t width) {
    const int64_t prepared = kGroup * width * 4, packed = kSpan * kStepSize * 2;
    const int64_t run = kAtOnce * (packed + (rows + kRows - 1) / kRows * kSums * 4);
    return prepared > run ? prepared : run;
}

// `panels` <= kAtOnce panels from `panel` on. The weights of the panels after them up to `last` are fetched meanwhile.
void run_some(const LinearParams& params, int64_t row, int64_t count, const uint16_t* rows, int64_t panel,
              int64_t panels, int64_t last, uint16_t* packed) {
    const int64_t steps = padded_width(params) / kStep, blocks = (count + kRows - 1) / kRows;
    float* sums = reinterpret_cast<float*>(packed + kAtOnce * kSpan * kStepSize);  // (blocks, panels, kSums)
    auto end = [&](int64_t step) { return step + kSpan < steps ? step + kSpan : steps; };
    for (int64_t step = 0; step < steps; step += kSpan) {
        const int64_t span = end(step) - step;
        for (int64_t p = 0; p < panels; ++p) {
            pack_steps(params, panel + p, step, step + span, packed + p * kSpan * kStepSize);
        }
        for (int64_t block = 0; block < blocks; ++block) {
            const uint16_t* x = rows + (block * steps + step) * kStepSize;
            for (int64_t p = 0; p < panels; ++p) {
                if (step + span < steps) {
                    fetch_steps(params, panel + p, step + span, end(step + span), block, blocks);
                } else if (panel + panels + p < last) {
                    fetch_steps(params, panel + panels + p, 0, end(0), block, blocks);
                }
                const uint16_t* weights = packed + p * kSpan * kStepSize;
                float* to = sums + (block * panels + p) * kSums;
                if (count - block * kRows > kGroup) {
                    multiply_span<2>(weights, x, span, step != 0, to);
                } else {
                    multiply_span<1>(weights, x, span, step != 0, to);
                }
            }
        }
    }
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t left = count - block * kRows < kRows ? count - block * kRows : kRows;
        for (int64_t p = 0; p < panels; ++p) {
            finish_rows(params, row + block * kRows, left, panel + p, sums + (block * panels + p) * kSums);
        }
    }
}

void run_panels(const LinearParams& params, int64_t row, int64_t count, const void* tiles, int64_t panel,
                int64_t last, void* spare) {
    // Whoever else computes on tiles in this thread finds its configuration again.
    TileConfig before;
    const TileConfig ours;
    _tile_storeconfig(&before);
    _tile_loadconfig(&ours);
    for (; panel < last; panel += kAtOnce) {
        const int64_t panels = last - panel < kAtOnce ? last - panel : kAtOnce;
        run_some(params, row, count, static_cast<const uint16_t*>(tiles), panel, panels, last,
                 static_cast<uint16_t*>(spare));
    }
    if (before.palette == 0) {
        _tile_release();
    } else {
        _tile_loadconfig(&before);
    }
}

}  // namespace

LinearKernel linear_amx() {
    return {kRows, 3 * sizeof(uint16_t), spare_bytes, prepare_tile, run_panels};
}

}  // namespace meditok
