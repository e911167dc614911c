// Between the CPU files of the training pass that are built for the base instruction set: which loops run, and how
// rows of any type and stride become contiguous rows of float or double.
#pragma once

#include <memory>
#include <type_traits>
#include <vector>

#include "common/dtype.h"
#include "vq/vq_train.h"
#include "vq/vq_train_rows.h"

namespace meditok {

// The loops of the instruction set in use.
TrainKernels train_kernels();

// ids (rows, groups) -> counts (groups, codes); ids outside 0..codes-1 are not counted.
void count_ids(const int64_t* ids, int64_t row_stride, int64_t group_stride, int64_t rows, int64_t groups,
               int64_t codes, int64_t* counts, int threads);

// The rows of each code in rising order: what a sum over them goes through, whoever makes it. Rows with an id outside
// 0..codes-1 and masked rows belong to none.
class RowsByCode {
  public:
    RowsByCode(const int64_t* ids, int64_t row_stride, int64_t group_stride, const unsigned char* mask,
               int64_t mask_stride, int64_t rows, int64_t groups, int64_t codes, int threads);

    const uint32_t* begin(int64_t group, int64_t code) const { return rows_of(group) + start(group)[code]; }
    int64_t count(int64_t group, int64_t code) const { return start(group)[code + 1] - start(group)[code]; }

  private:
    const uint32_t* rows_of(int64_t group) const { return order_.get() + group * rows_; }
    const uint32_t* start(int64_t group) const { return start_.data() + group * (codes_ + 1); }

    int64_t rows_, codes_;
    std::unique_ptr<uint32_t[]> order_;  // (groups, rows)
    std::vector<uint32_t> start_;        // (groups, codes + 1)
};

// What rows of T are computed in.
template <class T>
using Wide = std::conditional_t<std::is_same<T, double>::value, double, float>;

template <class T>
inline Wide<T> widened(T value) {
    if constexpr (std::is_same<T, Wide<T>>::value) {
        return value;
    } else {
        return static_cast<Wide<T>>(to_double(value));
    }
}

// Rows that loops over contiguous columns can read.
template <class F>
struct RowView {
    const F* data;
    int64_t stride;
};

// `rows` rows of T, in place where they already are rows of Wide<T>, else copied to `scratch` (rows * width).
template <class T>
inline RowView<Wide<T>> contiguous_rows(const T* data, int64_t row_stride, int64_t column_stride,
                                        int64_t rows, int64_t width, Wide<T>* scratch) {
    if constexpr (std::is_same<T, Wide<T>>::value) {
        if (column_stride == 1 || width <= 1) return {data, row_stride};
    }
    for (int64_t row = 0; row < rows; ++row) {
        const T* from = data + row * row_stride;
        for (int64_t i = 0; i < width; ++i) scratch[row * width + i] = widened(from[i * column_stride]);
    }
    return {scratch, width};
}

// Rows handled together: few enough for scratch to stay in the first-level cache, one at least.
constexpr int64_t kScratchElements = 2048;

constexpr int64_t kCodesAtOnce = 64;  // codes to an item of work

inline int64_t rows_at_once(int64_t width) {
    const int64_t rows = kScratchElements / (width > 0 ? width : 1);
    return rows < 1 ? 1 : rows > kRowsAtOnce ? kRowsAtOnce : rows;
}

// Work too small to be worth waking threads for: under about 50 microseconds.
inline int worth_threads(double elements, int threads) {
    return elements < 4e4 ? 1 : threads;
}

inline int64_t used_rows(const unsigned char* mask, int64_t stride, int64_t rows) {
    if (mask == nullptr) return rows;
    int64_t used = 0;
    for (int64_t row = 0; row < rows; ++row) used += mask[row * stride] != 0;
    return used;
}

}  // namespace meditok
