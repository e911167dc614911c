// vq_stats and vq_update on CPU. Each code sums its rows as vq_train.h states: whoever does it and however many, the bits
// are the same, and every row is read once. Narrow rows go to their code's sum as they come, each worker having groups of
// its own; wide ones, and those of fewer groups than workers, are sorted by their codes first, which keeps their order.

#include <cmath>
#include <cstring>
#include <vector>

#include "common/check.h"
#include "common/threads.h"
#include "vq/vq_large_dim.h"
#include "vq/vq_train_cpu.h"

namespace meditok {

void count_ids(const int64_t* ids, int64_t row_stride, int64_t group_stride, int64_t rows, int64_t groups,
               int64_t codes, int64_t* counts, int threads) {
    parallel_for(groups, threads, [&](int, int64_t group) {
        int64_t* count = counts + group * codes;
        std::memset(count, 0, static_cast<size_t>(codes) * sizeof *count);
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t id = ids[row * row_stride + group * group_stride];
            if (id >= 0 && id < codes) ++count[id];
        }
    });
}

RowsByCode::RowsByCode(const int64_t* ids, int64_t row_stride, int64_t group_stride,
                       const unsigned char* mask, int64_t mask_stride, int64_t rows, int64_t groups,
                       int64_t codes, int threads)
    : rows_(rows),
      codes_(codes),
      order_(new uint32_t[static_cast<size_t>(groups * rows)]),
      start_(static_cast<size_t>(groups * (codes + 1)), 0) {
    require(rows < (int64_t{1} << 32), "fewer than 2^32 rows fit into one call; split them");
    parallel_for(groups, threads, [&](int, int64_t group) {
        // start[k + 1] counts the rows of k, then says where the next one goes, and in the end where they stop.
        uint32_t* next = start_.data() + group * (codes + 1) + 1;
        auto code_of = [&](int64_t row) -> int64_t {
            const int64_t id = ids[row * row_stride + group * group_stride];
            const bool used = mask == nullptr || mask[row * mask_stride] != 0;
            return used && id >= 0 && id < codes ? id : -1;
        };
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t code = code_of(row);
            if (code >= 0) ++next[code];
        }
        uint32_t before = 0;
        for (int64_t code = 0; code < codes; ++code) {
            const uint32_t count = next[code];
            next[code] = before;
            before += count;
        }
        uint32_t* order = order_.get() + group * rows;
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t code = code_of(row);
            if (code >= 0) order[next[code]++] = static_cast<uint32_t>(row);
        }
    });
}

namespace {

template <class T>
void sum_code(const StatsParams& params, const uint32_t* rows, int64_t count, const T* x, float* partial,
              float* sum) {
    const int64_t width = params.width, row_stride = params.x_strides[0], column_stride = params.x_strides[2];
    std::memset(sum, 0, static_cast<size_t>(width) * sizeof(float));
    for (int64_t i = 0; i < count;) {
        const int64_t block = rows[i] / kStatsRows;
        std::memset(partial, 0, static_cast<size_t>(width) * sizeof(float));
        for (; i < count && rows[i] / kStatsRows == block; ++i) {
            const T* from = x + rows[i] * row_stride;
            if (column_stride == 1) {
                for (int64_t c = 0; c < width; ++c) partial[c] += static_cast<float>(to_double(from[c]));
            } else {
                for (int64_t c = 0; c < width; ++c) {
                    partial[c] += static_cast<float>(to_double(from[c * column_stride]));
                }
            }
        }
        for (int64_t c = 0; c < width; ++c) sum[c] += partial[c];
    }
}

// Sums of some groups' codes for the block of rows that is passing by, to be added to those of the blocks before.
struct Passing {
    std::vector<float> partial;     // (groups, codes, width), of the codes of `touched`
    std::vector<int64_t> block_of;  // (groups, codes) number of the last block that touched a code
    std::vector<int64_t> touched;   // positions in (groups, codes)
};

// W: the width where it is known at compile time, else 0.
template <class T, int W>
class Passage {
  public:
    Passage(const StatsParams& params, int64_t first_group, int64_t last_group)
        : params_(params),
          width_(W > 0 ? W : params.width),
          first_group_(first_group),
          last_group_(last_group),
          counts_(params.counts + first_group * params.codes),
          sums_(params.sums + first_group * params.codes * width_) {}

    void run() {
        const size_t codes = static_cast<size_t>((last_group_ - first_group_) * params_.codes);
        std::memset(counts_, 0, codes * sizeof *counts_);
        std::memset(sums_, 0, codes * static_cast<size_t>(width_) * sizeof *sums_);
        block(0, sums_, nullptr);  // nothing is there yet that it would have to be added to
        if (params_.rows <= kStatsRows) return;
        Passing passing{
            std::vector<float>(codes * static_cast<size_t>(width_)), std::vector<int64_t>(codes), {}};
        for (int64_t begin = kStatsRows; begin < params_.rows; begin += kStatsRows) {
            passing.touched.clear();
            block(begin, passing.partial.data(), &passing);
            for (const int64_t code : passing.touched) {
                const float* partial = passing.partial.data() + code * width_;
                for (int64_t c = 0; c < width_; ++c) sums_[code * width_ + c] += partial[c];
            }
        }
    }

  private:
    // Position of a row's code in (groups, codes) of this passage, or -1.
    int64_t code_of(int64_t row, int64_t group) const {
        const int64_t id = params_.ids[row * params_.ids_strides[0] + group * params_.ids_strides[1]];
        return id >= 0 && id < params_.codes ? (group - first_group_) * params_.codes + id : -1;
    }

    void block(int64_t begin, float* sums, Passing* passing) {
        constexpr int64_t kAhead = 4;  // codes lie anywhere: their sums are fetched some rows before
        const int64_t end = begin + kStatsRows < params_.rows ? begin + kStatsRows : params_.rows;
        for (int64_t row = begin; row < end; ++row) {
            for (int64_t group = first_group_; group < last_group_; ++group) {
                if (row + kAhead < end) __builtin_prefetch(sums + code_of(row + kAhead, group) * width_, 1);
                const int64_t code = code_of(row, group);
                if (code < 0) continue;
                float* sum = sums + code * width_;
                ++counts_[code];
                if (passing != nullptr && passing->block_of[code] != begin) {
                    passing->block_of[code] = begin;
                    passing->touched.push_back(code);
                    std::memset(sum, 0, static_cast<size_t>(width_) * sizeof *sum);
                }
                add(static_cast<const T*>(params_.x) + row * params_.x_strides[0] +
                        group * params_.x_strides[1],
                    sum);
            }
        }
    }

    void add(const T* x, float* sum) const {
        const int64_t stride = params_.x_strides[2];
        if (stride == 1) {
            for (int64_t c = 0; c < width_; ++c) sum[c] += static_cast<float>(to_double(x[c]));
        } else {
            for (int64_t c = 0; c < width_; ++c) sum[c] += static_cast<float>(to_double(x[c * stride]));
        }
    }

    const StatsParams& params_;
    const int64_t width_, first_group_, last_group_;
    int64_t* const counts_;  // (groups, codes) of this passage
    float* const sums_;      // (groups, codes, width) of this passage
};

template <class T>
void sum_in_passing(const StatsParams& params, int workers) {
    const int64_t shares = participants(params.groups, workers);
    parallel_for(shares, workers, [&](int, int64_t share) {
        const int64_t first = share * params.groups / shares, last = (share + 1) * params.groups / shares;
        params.width == 8 ? Passage<T, 8>(params, first, last).run()
                          : Passage<T, 0>(params, first, last).run();
    });
}

// The row of a code, from its smoothed count (l2) or its own length (cosine).
template <class T>
void update_code(const UpdateParams& params, int64_t group, int64_t code, double total) {
    const int64_t width = params.width;
    const int64_t* cs = params.codebook_strides;
    const int64_t* es = params.ema_sums_strides;
    T* out = static_cast<T*>(params.codebook) + group * cs[0] + code * cs[1];
    const float* sums = params.ema_sums + group * es[0] + code * es[1];
    double length = 0.0;
    if (params.metric == Metric::kCosine) {
        for (int64_t i = 0; i < width; ++i) {
            length += static_cast<double>(sums[i * es[2]]) * static_cast<double>(sums[i * es[2]]);
        }
        length = std::sqrt(length);
        if (!(length > 1e-12)) return;
    } else {
        const double count =
            params.ema_counts[group * params.ema_counts_strides[0] + code * params.ema_counts_strides[1]];
        length = (count + params.eps) / (total + static_cast<double>(params.codes) * params.eps) * total;
        if (!(length > 0.0)) return;
    }
    for (int64_t i = 0; i < width; ++i) from_double(sums[i * es[2]] / length, out[i * cs[2]]);
}

template <class T>
void update_group(const UpdateParams& params, int64_t group) {
    const float keep = static_cast<float>(params.decay), take = static_cast<float>(1.0 - params.decay);
    double total = 0.0;
    for (int64_t code = 0; code < params.codes; ++code) {
        float& count =
            params.ema_counts[group * params.ema_counts_strides[0] + code * params.ema_counts_strides[1]];
        count = count * keep +
                static_cast<float>(
                    params.counts[group * params.counts_strides[0] + code * params.counts_strides[1]]) *
                    take;
        total += count;
        const float* from = params.sums + group * params.sums_strides[0] + code * params.sums_strides[1];
        float* sums =
            params.ema_sums + group * params.ema_sums_strides[0] + code * params.ema_sums_strides[1];
        for (int64_t i = 0; i < params.width; ++i) {
            float& sum = sums[i * params.ema_sums_strides[2]];
            sum = sum * keep + from[i * params.sums_strides[2]] * take;
        }
    }
    for (int64_t code = 0; code < params.codes; ++code) update_code<T>(params, group, code, total);
}

}  // namespace

void vq_stats_cpu(const StatsParams& params, int threads) {
    const int64_t groups = params.groups, codes = params.codes, width = params.width;
    const int workers = worth_threads(static_cast<double>(params.rows * groups * (width + 1)), threads);
    if (width <= kSmallWidth && groups >= workers) {
        for_dtype(params.type, [&](auto element) { sum_in_passing<decltype(element)>(params, workers); });
        return;
    }
    const RowsByCode sorted(params.ids, params.ids_strides[0], params.ids_strides[1], nullptr, 0, params.rows,
                            groups, codes, workers);
    const int64_t chunks = (codes + kCodesAtOnce - 1) / kCodesAtOnce;
    const int hands = participants(groups * chunks, workers);
    std::vector<float> partial(static_cast<size_t>(hands * width));
    for_dtype(params.type, [&](auto element) {
        using T = decltype(element);
        parallel_for(groups * chunks, hands, [&](int participant, int64_t item) {
            const int64_t group = item / chunks, first = item % chunks * kCodesAtOnce;
            const int64_t last = first + kCodesAtOnce < codes ? first + kCodesAtOnce : codes;
            const T* x = static_cast<const T*>(params.x) + group * params.x_strides[1];
            for (int64_t code = first; code < last; ++code) {
                const int64_t count = sorted.count(group, code), at = group * codes + code;
                params.counts[at] = count;
                sum_code(params, sorted.begin(group, code), count, x, partial.data() + participant * width,
                         params.sums + at * width);
            }
        });
    });
}

void vq_update_cpu(const UpdateParams& params, int threads) {
    bool any = false;
    for (int64_t group = 0; group < params.groups; ++group) {
        for (int64_t code = 0; code < params.codes && !any; ++code) {
            any = params.counts[group * params.counts_strides[0] + code * params.counts_strides[1]] > 0;
        }
    }
    if (!any) return;
    const double elements = static_cast<double>(params.groups * params.codes * (params.width + 1));
    for_dtype(params.type, [&](auto element) {
        parallel_for(params.groups, worth_threads(elements, threads),
                     [&](int, int64_t group) { update_group<decltype(element)>(params, group); });
    });
}

}  // namespace meditok
