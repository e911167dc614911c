// The rows of a batch ordered by their code, the same way in every run, without an allocation: what the sums of
// vq_stats and of the codebook's gradient walk over, each code's rows in the order of the rows.
#pragma once

#include "vq/vq_train.h"

namespace meditok {

// Which code a row has.
struct RowIds {
    const int64_t* ids;  // (rows, groups)
    int64_t row_stride, group_stride;
    const unsigned char* mask;  // (rows), 0 = masked; null: no row is masked
    int64_t mask_stride;
    int64_t rows, groups, codes;

    // -1 for a masked row and for an id outside 0..codes-1.
    MEDITOK_HD int64_t code(int64_t row, int64_t group) const {
        if (mask != nullptr && mask[row * mask_stride] == 0) return -1;
        const int64_t id = ids[row * row_stride + group * group_stride];
        return id >= 0 && id < codes ? id : -1;
    }
};

// Positions count from the start of a group's part of `order`.
struct RowOrder {
    int64_t rows, groups, codes;
    int32_t* begin;  // (groups, codes) position of a code's first row
    int32_t*
        end;  // (row_blocks(rows), groups, codes) one past its last row among the rows up to this block's last
    int32_t* order;  // (groups, rows) rows

    MEDITOK_HD int32_t first(int64_t group, int64_t code, int64_t block) const {
        const int64_t at = group * codes + code;
        return block == 0 ? begin[at] : end[(block - 1) * groups * codes + at];
    }
    MEDITOK_HD int32_t last(int64_t group, int64_t code, int64_t block) const {
        return end[(block * groups + group) * codes + code];
    }
};

// Fills order_scratch_bytes of `scratch`; if `counts` (groups, codes) is not null, it gets the number of rows of each
// code. Needs at least one row, group and code, and fewer than 2^31 rows.
RowOrder launch_order(const RowIds& rows, unsigned char* scratch, int64_t* counts, void* stream);

}  // namespace meditok
