// The rows of a block in the large-width regime, for vq_large_dim.cpp alone: which filter a row is for, the codes that
// may still be its best, and the scores that decide between them.
#pragma once

#include <cmath>

#include "vq/vq_large_dim.h"
#include "vq/vq_train_rows.h"

namespace meditok {

// What becomes of a row: its id is known already, the canonical loop finds it, or the filter does.
struct Fate {
    enum Kind { kKnown, kCanonical, kFilter } kind;
    int64_t id;
    double scale;  // the filter sees x * scale, a power of two
    double norm;   // of that
};

// From a sum of squares in float64; where it over- or underflows, the canonical loop decides.
inline Fate row_fate(const double* x, double square, int64_t width, const PackedView& view, Metric metric) {
    const Fate nowhere{Fate::kKnown, -1, 1.0, 0.0}, canonical{Fate::kCanonical, -1, 1.0, 0.0};
    if (view.group->choosable == 0) return nowhere;
    if (!is_finite(square)) {
        for (int64_t i = 0; i < width; ++i) {
            if (!is_finite(x[i])) return nowhere;
        }
        return canonical;
    }
    if (view.group->unsafe > 0 || width > kLargestWidth) return canonical;
    const double norm = std::sqrt(square);
    if (metric == Metric::kL2) return norm < kLargestL2 ? Fate{Fate::kFilter, -1, 1.0, norm} : canonical;
    if (!(norm > kSmallestCosine && norm < kLargestCosine)) {
        for (int64_t i = 0; i < width; ++i) {
            if (x[i] != 0.0) return canonical;
        }
        return {Fate::kKnown, view.group->first_choosable, 1.0, 0.0};  // every score is 0
    }
    int exponent;
    std::frexp(norm, &exponent);
    const double scale = std::ldexp(1.0, -exponent);
    return {Fate::kFilter, -1, scale, norm * scale};
}

constexpr int kMostHeld = 8;

// Codes of one row that may be best. When there is no room for another, the float32 filter scores those held; of the
// int16 filter the row is crowded, and left to the float32 filter.
struct Held {
    int count;
    bool scored;  // `best` holds the best of the codes scored so far
    bool crowded;
    int32_t code[kMostHeld];
    double upper[kMostHeld];
    Best best;
};

// A block of rows in one of the filters: slot by slot the row that stands there and what is known of it.
struct LargeDimBlock {
    const AssignParams& params;
    const RowKernels<float>& rows;
    int64_t group;
    PackedView view;
    double* wide;  // scratch: the row last widened
    int64_t wide_row;
    int64_t slots;
    int64_t row[kMaxBlockRows];
    float x_norm[kMaxBlockRows], lower[kMaxBlockRows];
    int32_t int16_lower[kMaxBlockRows];
    Held held[kMaxBlockRows];

    void widen(int64_t wanted) {
        if (wide_row == wanted) return;
        wide_row = wanted;
        for_dtype(params.x_type, [&](auto element) {
            using T = decltype(element);
            const T* x =
                static_cast<const T*>(params.x) + wanted * params.row_stride + group * params.group_stride;
            for (int64_t i = 0; i < params.codebook.width; ++i)
                wide[i] = to_double(x[i * params.column_stride]);
        });
    }

    // The row where it lies, if its columns are neighbouring floats.
    const float* plain_row(int64_t wanted) const {
        if (params.x_type != Dtype::kFloat32 || params.column_stride != 1) return nullptr;
        return static_cast<const float*>(params.x) + wanted * params.row_stride + group * params.group_stride;
    }

    void add(int64_t wanted) {
        lower[slots] = -__builtin_inff();
        int16_lower[slots] = INT32_MIN;
        held[slots] = Held{0, false, false, {}, {}, Best{}};
        row[slots++] = wanted;
    }

    // Drops codes whose bound does not reach the limit.
    static void prune(Held& entry, const double* bound, double limit) {
        int kept = 0;
        for (int i = 0; i < entry.count; ++i) {
            if (!(bound[i] >= limit)) continue;
            entry.code[kept] = entry.code[i];
            entry.upper[kept++] = entry.upper[i];
        }
        entry.count = kept;
    }

    // Drops codes that float64 sums, in whatever order is fast, show to be worse. Such a sum and the canonical score are
    // both within (C + 2) 2^-53 |x| (cosine) or that part of itself (l2) of the exact one; two codes: 4 of these.
    void prune_by_sums(Held& entry, int64_t slot) {
        const Codebook& codebook = params.codebook;
        const float* x = plain_row(row[slot]);
        if (entry.count < 2 || x == nullptr || codebook.type != Dtype::kFloat32 ||
            codebook.column_stride != 1)
            return;
        const bool cosine = params.metric == Metric::kCosine;
        const float* codes = static_cast<const float*>(codebook.data) + group * codebook.group_stride;
        double sums[kMostHeld], best = -__builtin_inf();
        for (int i = 0; i < entry.count; ++i) {
            const float* code = codes + entry.code[i] * codebook.code_stride;
            sums[i] = cosine ? rows.dot(x, code, codebook.width) / view.norm[entry.code[i]]
                             : -rows.distance(x, code, codebook.width);
            best = sums[i] > best ? sums[i] : best;
        }
        const double unit = cosine ? std::sqrt(rows.square(x, codebook.width)) : -best;
        prune(entry, sums, best - static_cast<double>(codebook.width + 4) * 0x1p-50 * unit);
    }

    // Makes room: what remains of the codes held gets its canonical score, unless it is the only one so far.
    void score(Held& entry, int64_t slot) {
        prune_by_sums(entry, slot);
        if (entry.count == 1 && !entry.scored) return;
        widen(row[slot]);
        for (int i = 0; i < entry.count; ++i) {
            const int64_t code = entry.code[i];
            entry.best.consider(
                score_code(params.codebook, group, code, view.norm[code], params.metric, wide), code);
        }
        entry.scored = true;
        entry.count = 0;
    }

    static void hold(Held& entry, int64_t code, double upper) {
        entry.code[entry.count] = static_cast<int32_t>(code);
        entry.upper[entry.count++] = upper;
    }

    static void candidate(void* context, int64_t slot, int64_t code, double upper) {
        LargeDimBlock& block = *static_cast<LargeDimBlock*>(context);
        Held& entry = block.held[slot];
        if (entry.count == kMostHeld) prune(entry, entry.upper, static_cast<double>(block.lower[slot]));
        if (entry.count == kMostHeld) block.score(entry, slot);
        hold(entry, code, upper);
    }

    static void int16_candidate(void* context, int64_t slot, int64_t code_slot, double upper) {
        LargeDimBlock& block = *static_cast<LargeDimBlock*>(context);
        Held& entry = block.held[slot];
        if (entry.count == kMostHeld) prune(entry, entry.upper, static_cast<double>(block.int16_lower[slot]));
        entry.crowded = entry.crowded || entry.count == kMostHeld;
        if (!entry.crowded) hold(entry, block.view.slot[code_slot], upper);
    }

    int64_t winner(int64_t slot, double limit) {
        Held& entry = held[slot];
        prune(entry, entry.upper, limit);
        score(entry, slot);
        return entry.count == 1 ? entry.code[0] : entry.best.code;
    }
};

}  // namespace meditok
