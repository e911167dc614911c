// vq_quantize_backward on CPU, in three steps:
//   codes   those that have rows, as vq_lookup gives them, and their norms
//   rows    block of rows by block: the gradient to x
//   sums    e - x_hat of the rows of each code added up in their order, then taken through the normalisation
// Narrow rows are added while they pass by, each worker having groups of its own. Wide rows, and those of fewer groups
// than workers, are sorted by code first and then added code by code. Either way nobody adds to another's sum and the
// order is that of the rows, so no thread count changes a bit.

#include <cstring>
#include <limits>
#include <vector>

#include "common/threads.h"
#include "vq/vq_large_dim.h"
#include "vq/vq_train_cpu.h"

namespace meditok {

namespace {

constexpr int kBatch = kRowsAtOnce;  // rows or codes handed to a loop at once

template <class T>
class Backward {
  public:
    using F = Wide<T>;

    Backward(const QuantizeBackwardParams& params, int threads)
        : params_(params),
          codebook_(params.codebook),
          cosine_(params.metric == Metric::kCosine),
          kernels_(train_kernels().of(F{})),
          workers_(
              worth_threads(static_cast<double>(params.rows * codebook_.groups * codebook_.width), threads)),
          in_passing_(codebook_.width <= kSmallWidth && codebook_.groups >= workers_) {
        const double elements = static_cast<double>(used_rows(params.mask, params.mask_stride, params.rows)) *
                                static_cast<double>(codebook_.groups * codebook_.width);
        step_ = 2.0 * static_cast<double>(*params.grad_loss) / (elements > 1.0 ? elements : 1.0);
    }

    void run() {
        if (codebook_.groups == 0 || codebook_.width == 0) return;
        find_used_codes();
        prepare_codes();
        if (params_.grad_codebook != nullptr) clear_sums();
        prepare_rows();
        if (params_.grad_codebook == nullptr) return;
        if (!in_passing_) sum_codes();
        finish_codes();
    }

  private:
    int64_t id(int64_t row, int64_t group) const {
        if (params_.mask != nullptr && params_.mask[row * params_.mask_stride] == 0) return kMasked;
        const int64_t given = params_.ids[row * params_.ids_strides[0] + group * params_.ids_strides[1]];
        return given >= 0 && given < codebook_.codes ? given : kNowhere;
    }

    const F* unit(int64_t group, int64_t code) const {
        return units_ + group * unit_group_ + code * unit_code_;
    }

    F* sum(int64_t group, int64_t code) const {
        return sums_ + (group * codebook_.codes + code) * codebook_.width;
    }

    bool used(int64_t group, int64_t code) const { return used_[group * codebook_.codes + code] != 0; }

    void find_used_codes() {
        const int64_t groups = codebook_.groups, codes = codebook_.codes;
        used_.reset(new unsigned char[groups * codes]);
        if (!in_passing_) {
            sorted_.reset(new RowsByCode(params_.ids, params_.ids_strides[0], params_.ids_strides[1],
                                         params_.mask, params_.mask_stride, params_.rows, groups, codes,
                                         workers_));
            for (int64_t i = 0; i < groups * codes; ++i) used_[i] = sorted_->count(i / codes, i % codes) > 0;
            return;
        }
        std::memset(used_.get(), 0, static_cast<size_t>(groups * codes));
        for (int64_t row = 0; row < params_.rows; ++row) {
            for (int64_t group = 0; group < groups; ++group) {
                const int64_t code = id(row, group);
                if (code >= 0) used_[group * codes + code] = 1;
            }
        }
    }

    void prepare_codes() {
        const int64_t groups = codebook_.groups, codes = codebook_.codes, width = codebook_.width;
        const bool in_place =
            std::is_same<T, F>::value && !cosine_ && (codebook_.column_stride == 1 || width <= 1);
        if (in_place) {
            units_ = static_cast<const F*>(codebook_.data);
            unit_group_ = codebook_.group_stride;
            unit_code_ = codebook_.code_stride;
        } else {
            unit_copy_.reset(new F[groups * codes * width]);
            units_ = unit_copy_.get();
            unit_group_ = codes * width;
            unit_code_ = width;
        }
        if (cosine_) norms_.reset(new double[groups * codes]);
        if (in_place) return;
        for_codes([&](int, int64_t group, int64_t first, int64_t last) {
            Batch batch = used_of(group, first, last);
            copy_codes(group, batch);
        });
    }

    // body(participant, group, first, last) for pieces of at most kCodesAtOnce codes.
    template <class Body>
    void for_codes(Body&& body) {
        const int64_t codes = codebook_.codes, chunks = (codes + kCodesAtOnce - 1) / kCodesAtOnce;
        parallel_for(codebook_.groups * chunks, workers_, [&](int participant, int64_t item) {
            const int64_t first = item % chunks * kCodesAtOnce;
            body(participant, item / chunks, first,
                 first + kCodesAtOnce < codes ? first + kCodesAtOnce : codes);
        });
    }

    struct Batch {
        int count = 0;
        int64_t code[kBatch];
    };

    Batch used_of(int64_t group, int64_t first, int64_t last) const {
        Batch batch;
        for (int64_t code = first; code < last; ++code) {
            batch.code[batch.count] = code;
            batch.count += used(group, code);
        }
        return batch;
    }

    // The rows of vq_lookup, up to the order in which the squares of the norm are added.
    void copy_codes(int64_t group, const Batch& batch) {
        const int64_t width = codebook_.width;
        const T* codes = static_cast<const T*>(codebook_.data) + group * codebook_.group_stride;
        const F* from[kBatch] = {};
        F* to[kBatch] = {};
        double norms[kBatch];
        for (int i = 0; i < batch.count; ++i) {
            to[i] = unit_copy_.get() + group * unit_group_ + batch.code[i] * unit_code_;
            from[i] = contiguous_rows(codes + batch.code[i] * codebook_.code_stride, 0,
                                      codebook_.column_stride, 1, width, to[i])
                          .data;
        }
        if (cosine_) {
            kernels_.normalise(from, batch.count, width, to, norms);
            for (int i = 0; i < batch.count; ++i) norms_[group * codebook_.codes + batch.code[i]] = norms[i];
        } else {
            for (int i = 0; i < batch.count; ++i) {
                std::memmove(to[i], from[i], static_cast<size_t>(width) * sizeof(F));
            }
        }
        if constexpr (!std::is_same<T, F>::value) {
            for (int i = 0; i < batch.count; ++i) {
                for (int64_t column = 0; column < width; ++column) {
                    T rounded;
                    from_double(to[i][column], rounded);
                    to[i][column] = widened(rounded);
                }
            }
        }
    }

    // The sums in F: the gradient itself, or a table of their own where that is of a half type.
    void clear_sums() {
        const int64_t elements = codebook_.groups * codebook_.codes * codebook_.width;
        if constexpr (std::is_same<T, F>::value) {
            sums_ = static_cast<F*>(params_.grad_codebook);
        } else {
            sums_copy_.reset(new F[elements]);
            sums_ = sums_copy_.get();
        }
        for_codes([&](int, int64_t group, int64_t first, int64_t last) {
            std::memset(static_cast<void*>(sum(group, first)), 0,
                        static_cast<size_t>((last - first) * codebook_.width) * sizeof(F));
        });
    }

    void prepare_rows() {
        const int64_t groups = codebook_.groups, width = codebook_.width, rows = params_.rows;
        const bool adds = in_passing_ && params_.grad_codebook != nullptr;
        const int64_t at_once = rows_at_once(width);
        const int64_t blocks = (rows + at_once - 1) / at_once;
        // Where rows lie one behind the other, the groups of each are taken in the order of memory.
        const bool flat = groups > 1 && params_.x_strides[0] == groups * params_.x_strides[1] &&
                          params_.grad_z_strides[0] == groups * params_.grad_z_strides[1];
        // Of groups, or blocks of rows.
        const int64_t shares = adds ? participants(groups, workers_) : blocks;
        const int workers = participants(shares, workers_);
        const int64_t scratch_elements = (3 * at_once + 1) * width;
        std::vector<F> scratch(static_cast<size_t>(workers * scratch_elements));
        if (cosine_ && !in_passing_) inverse_.reset(new double[rows * groups]);
        parallel_for(shares, workers, [&](int participant, int64_t share) {
            F* at = scratch.data() + participant * scratch_elements;
            const int64_t first_group = adds ? share * groups / shares : 0;
            const int64_t last_group = adds ? (share + 1) * groups / shares : groups;
            const int64_t last_block = adds ? blocks : share + 1;
            for (int64_t block = adds ? 0 : share; block < last_block; ++block) {
                const int64_t begin = block * at_once;
                const int64_t end = begin + at_once < rows ? begin + at_once : rows;
                if (flat && last_group - first_group == groups) {
                    const int64_t pairs = end * groups;
                    for (int64_t pair = begin * groups; pair < pairs; pair += at_once) {
                        const int64_t count = pair + at_once < pairs ? at_once : pairs - pair;
                        strip({pair / groups, pair % groups, count, true}, at_once, at);
                    }
                    continue;
                }
                for (int64_t group = first_group; group < last_group; ++group) {
                    strip({begin, group, end - begin, false}, at_once, at);
                }
            }
        });
    }

    // Vectors handed to a loop at once, from x[row, group] on: of one group, or, if flat, of one group after the other.
    struct Strip {
        int64_t row, group, count;
        bool flat;
    };

    void strip(const Strip& strip, int64_t at_once, F* scratch) {
        const int64_t groups = codebook_.groups, width = codebook_.width, count = strip.count;
        const int axis = strip.flat ? 1 : 0;
        const int64_t first = strip.row * groups + strip.group, step = strip.flat ? 1 : groups;
        F* nans = scratch + 3 * at_once * width;
        for (int64_t i = 0; i < width; ++i) nans[i] = std::numeric_limits<F>::quiet_NaN();
        const auto view = [&](const void* data, const int64_t* strides, F* copy) {
            const T* from = static_cast<const T*>(data) + strip.row * strides[0] + strip.group * strides[1];
            return contiguous_rows(from, strides[axis], strides[2], count, width, copy);
        };
        const RowView<F> x = view(params_.x, params_.x_strides, scratch);
        const RowView<F> grad = view(params_.grad_z, params_.grad_z_strides, scratch + at_once * width);
        const bool adds = in_passing_ && params_.grad_codebook != nullptr;
        const F* code[kBatch];
        F* to[kBatch];
        int64_t row = strip.row, group = strip.group;
        for (int64_t r = 0; r < count; ++r) {  // codes lie anywhere: all are fetched before one is used
            const int64_t k = id(row, group);
            code[r] = k >= 0 ? unit(group, k) : k == kMasked ? nullptr : nans;
            to[r] = adds && k >= 0 ? sum(group, k) : nullptr;
            __builtin_prefetch(code[r]);
            __builtin_prefetch(to[r], 1);
            if (!strip.flat || ++group == groups) {
                group = strip.group * !strip.flat;
                ++row;
            }
        }
        T* out = static_cast<T*>(params_.grad_x) + first * width;
        F* wide = scratch + 2 * at_once * width;
        int64_t stride = width;
        if constexpr (std::is_same<T, F>::value) {
            wide = out;
            stride = step * width;
        }
        kernels_.backward({count, width, x.data, x.stride, grad.data, grad.stride, code,
                           params_.commitment_weight * step_, cosine_, params_.rotation, wide, stride,
                           inverse_ ? inverse_.get() + first : nullptr, step, adds ? to : nullptr});
        if constexpr (!std::is_same<T, F>::value) {
            for (int64_t r = 0; r < count; ++r) {
                for (int64_t i = 0; i < width; ++i)
                    from_double(wide[r * width + i], out[r * step * width + i]);
            }
        }
    }

    void sum_codes() {
        const int64_t at_once = rows_at_once(codebook_.width), elements = at_once * codebook_.width;
        std::vector<F> scratch(
            static_cast<size_t>(participants(codebook_.groups * codebook_.codes, workers_) * elements));
        for_codes([&](int participant, int64_t group, int64_t first, int64_t last) {
            fetch(group, first, last);
            for (int64_t code = first; code < last; ++code) {
                if (used(group, code))
                    sum_code(group, code, at_once, scratch.data() + participant * elements);
            }
        });
    }

    // The rows of these codes lie anywhere: the first of them start their way into the cache.
    void fetch(int64_t group, int64_t first, int64_t last) const {
        const T* x = static_cast<const T*>(params_.x) + group * params_.x_strides[1];
        const uint32_t* row = sorted_->begin(group, first);
        const uint32_t* end = sorted_->begin(group, last - 1) + sorted_->count(group, last - 1);
        if (end - row > 2 * kBatch) end = row + 2 * kBatch;
        for (; row < end; ++row) {
            __builtin_prefetch(x + *row * params_.x_strides[0]);
            if (cosine_) __builtin_prefetch(inverse_.get() + *row * codebook_.groups + group);
        }
    }

    void sum_code(int64_t group, int64_t code, int64_t at_once, F* scratch) {
        const int64_t width = codebook_.width, count = sorted_->count(group, code);
        const int64_t* xs = params_.x_strides;
        const T* x = static_cast<const T*>(params_.x) + group * xs[1];
        const uint32_t* rows = sorted_->begin(group, code);
        const F* from[kBatch];
        double scale[kBatch];
        for (int64_t done = 0; done < count; done += at_once) {
            const int64_t held = count - done < at_once ? count - done : at_once;
            for (int64_t i = 0; i < held; ++i) {
                const int64_t row = rows[done + i];
                from[i] = contiguous_rows(x + row * xs[0], 0, xs[2], 1, width, scratch + i * width).data;
                if (cosine_) scale[i] = inverse_[row * codebook_.groups + group];
            }
            kernels_.add(from, cosine_ ? scale : nullptr, held, width, unit(group, code), sum(group, code));
        }
    }

    void finish_codes() {
        const int64_t codes = codebook_.codes, width = codebook_.width;
        const double factor = params_.codebook_weight * step_;
        for_codes([&](int, int64_t group, int64_t first, int64_t last) {
            const Batch batch = used_of(group, first, last);
            F* sums[kBatch];
            const F* units[kBatch];
            double norms[kBatch];
            for (int i = 0; i < batch.count; ++i) {
                sums[i] = sum(group, batch.code[i]);
                units[i] = unit(group, batch.code[i]);
                norms[i] = cosine_ ? norms_[group * codes + batch.code[i]] : 1.0;
            }
            kernels_.scale(sums, factor, cosine_ ? units : nullptr, norms, batch.count, width);
            if constexpr (!std::is_same<T, F>::value) {
                T* out = static_cast<T*>(params_.grad_codebook) + (group * codes + first) * width;
                const F* from = sum(group, first);
                for (int64_t i = 0; i < (last - first) * width; ++i) from_double(from[i], out[i]);
            }
        });
    }

    static constexpr int64_t kNowhere = -1, kMasked = -2;
    const QuantizeBackwardParams& params_;
    const Codebook& codebook_;
    const bool cosine_;
    const RowKernels<F> kernels_;
    const int workers_;
    const bool in_passing_;                  // rows are added to their codes' sums while they pass by
    std::unique_ptr<RowsByCode> sorted_;     // where they are not
    std::unique_ptr<unsigned char[]> used_;  // (groups, codes) whether a code has rows
    double step_;                            // 2 grad_loss / elements
    std::unique_ptr<F[]> unit_copy_;         // (groups, codes, width) rows of vq_lookup, of used codes only
    const F* units_ = nullptr;               // those, or the codebook itself
    int64_t unit_group_ = 0, unit_code_ = 0;
    std::unique_ptr<F[]> sums_copy_;     // (groups, codes, width) for half types
    F* sums_ = nullptr;                  // that, or the gradient itself
    std::unique_ptr<double[]> norms_;    // (groups, codes) of used codes, cosine only
    std::unique_ptr<double[]> inverse_;  // (rows, groups) 1 / max(|x|, 1e-12), cosine and sorted rows only
};

}  // namespace

void vq_quantize_backward_cpu(const QuantizeBackwardParams& params, int threads) {
    for_dtype(params.type, [&](auto element) { Backward<decltype(element)>(params, threads).run(); });
}

}  // namespace meditok
