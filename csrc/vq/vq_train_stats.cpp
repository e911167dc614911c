// vq_stats and vq_update on CPU: loops over float32 in the order vq_train.h states, group by group, wide rows in
// slices of columns. A block's partial sums are kept for the codes it touches only: adding the zeros of the others
// would change nothing.

#include <cmath>
#include <cstring>
#include <vector>

#include "common/threads.h"
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

namespace {

constexpr int64_t kSliceColumns = 64;

template <class T>
void sum_slice(const StatsParams& params, int64_t group, int64_t first, int64_t count) {
    const int64_t width = params.width, codes = params.codes;
    float* sums = params.sums + group * codes * width + first;
    for (int64_t code = 0; code < codes; ++code) {
        std::memset(sums + code * width, 0, static_cast<size_t>(count) * sizeof(float));
    }
    std::vector<int32_t> slot(static_cast<size_t>(codes),
                              -1);  // of a code in `partial`, -1: not in this block
    std::vector<int64_t> touched;
    std::vector<float> partial;
    const T* x = static_cast<const T*>(params.x) + group * params.x_strides[1] + first * params.x_strides[2];
    for (int64_t begin = 0; begin < params.rows; begin += kStatsRows) {
        const int64_t end = begin + kStatsRows < params.rows ? begin + kStatsRows : params.rows;
        for (int64_t row = begin; row < end; ++row) {
            const int64_t id = params.ids[row * params.ids_strides[0] + group * params.ids_strides[1]];
            if (id < 0 || id >= codes) continue;
            if (slot[id] < 0) {
                slot[id] = static_cast<int32_t>(touched.size());
                touched.push_back(id);
                partial.resize(touched.size() * static_cast<size_t>(count), 0.0f);
            }
            float* sum = partial.data() + slot[id] * count;
            const T* from = x + row * params.x_strides[0];
            for (int64_t i = 0; i < count; ++i) {
                sum[i] += static_cast<float>(to_double(from[i * params.x_strides[2]]));
            }
        }
        for (size_t i = 0; i < touched.size(); ++i) {
            float* sum = sums + touched[i] * width;
            for (int64_t column = 0; column < count; ++column) sum[column] += partial[i * count + column];
            slot[touched[i]] = -1;
        }
        touched.clear();
        partial.clear();
    }
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
    const int workers =
        worth_threads(static_cast<double>(params.rows * params.groups * (params.width + 1)), threads);
    count_ids(params.ids, params.ids_strides[0], params.ids_strides[1], params.rows, params.groups,
              params.codes, params.counts, workers);
    const int64_t slices = (params.width + kSliceColumns - 1) / kSliceColumns;
    for_dtype(params.type, [&](auto element) {
        parallel_for(params.groups * slices, workers, [&](int, int64_t item) {
            const int64_t first = item % slices * kSliceColumns;
            const int64_t count = first + kSliceColumns < params.width ? kSliceColumns : params.width - first;
            sum_slice<decltype(element)>(params, item / slices, first, count);
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
