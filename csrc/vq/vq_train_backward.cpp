// vq_quantize_backward on CPU, in three steps:
//   codes   rows sorted by code; the codes that have rows as vq_lookup gives them, and their norms
//   rows    block of rows by block: the gradient to x, and 1 / |x| of each row
//   sums    code by code: e - x_hat of its rows added up in their order, then taken through the normalisation
// Nobody adds to another's sum, so no thread count changes a bit.

#include <cstring>
#include <limits>
#include <vector>

#include "common/threads.h"
#include "vq/vq_train_cpu.h"

namespace meditok {

namespace {

constexpr int kBatch = 64;  // rows or codes handed to a loop at once

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
          sorted_(params.ids, params.ids_strides[0], params.ids_strides[1], params.mask, params.mask_stride,
                  params.rows, codebook_.groups, codebook_.codes, workers_) {
        const double elements = static_cast<double>(used_rows(params.mask, params.mask_stride, params.rows)) *
                                static_cast<double>(codebook_.groups * codebook_.width);
        step_ = 2.0 * static_cast<double>(*params.grad_loss) / (elements > 1.0 ? elements : 1.0);
    }

    void run() {
        if (codebook_.groups == 0 || codebook_.width == 0) return;
        prepare_codes();
        prepare_rows();
        if (params_.grad_codebook != nullptr) sum_codes();
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
            Batch batch;
            for (int64_t code = first; code < last; ++code) {
                if (sorted_.count(group, code) > 0) batch.code[batch.count++] = code;
            }
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

    // The rows of vq_lookup, up to the order in which the squares of the norm are added.
    void copy_codes(int64_t group, Batch& batch) {
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
        batch.count = 0;
    }

    void prepare_rows() {
        const int64_t groups = codebook_.groups, width = codebook_.width, rows = params_.rows;
        const int64_t at_once = rows_at_once(width);
        const int64_t blocks = (rows + at_once - 1) / at_once;
        const int workers = participants(blocks, workers_);
        const int64_t scratch_elements = (3 * at_once + 1) * width;
        std::vector<F> scratch(static_cast<size_t>(workers * scratch_elements));
        if (cosine_) inverse_.reset(new double[rows * groups]);
        parallel_for(blocks, workers, [&](int participant, int64_t block) {
            const int64_t begin = block * at_once;
            const int64_t end = begin + at_once < rows ? begin + at_once : rows;
            F* at = scratch.data() + participant * scratch_elements;
            for (int64_t group = 0; group < groups; ++group) rows_of(group, begin, end, at_once, at);
        });
    }

    void rows_of(int64_t group, int64_t begin, int64_t end, int64_t at_once, F* scratch) {
        const int64_t groups = codebook_.groups, width = codebook_.width, count = end - begin;
        F* nans = scratch + 3 * at_once * width;
        for (int64_t i = 0; i < width; ++i) nans[i] = std::numeric_limits<F>::quiet_NaN();
        const int64_t* xs = params_.x_strides;
        const int64_t* gs = params_.grad_z_strides;
        const RowView<F> x = contiguous_rows(static_cast<const T*>(params_.x) + begin * xs[0] + group * xs[1],
                                             xs[0], xs[2], count, width, scratch);
        const RowView<F> grad =
            contiguous_rows(static_cast<const T*>(params_.grad_z) + begin * gs[0] + group * gs[1], gs[0],
                            gs[2], count, width, scratch + at_once * width);
        const F* code[kBatch];
        for (int64_t r = 0; r < count; ++r) {
            const int64_t k = id(begin + r, group);
            code[r] = k >= 0 ? unit(group, k) : k == kMasked ? nullptr : nans;
            __builtin_prefetch(
                code[r]);  // rows of codes lie anywhere: all of a block are fetched before one is used
        }
        T* out = static_cast<T*>(params_.grad_x) + (begin * groups + group) * width;
        F* wide = scratch + 2 * at_once * width;
        int64_t stride = width;
        if constexpr (std::is_same<T, F>::value) {
            wide = out;
            stride = groups * width;
        }
        kernels_.backward({count, width, x.data, x.stride, grad.data, grad.stride, code,
                           params_.commitment_weight * step_, cosine_, params_.rotation, wide, stride,
                           cosine_ ? inverse_.get() + begin * groups + group : nullptr, groups});
        if constexpr (!std::is_same<T, F>::value) {
            for (int64_t r = 0; r < count; ++r) {
                for (int64_t i = 0; i < width; ++i)
                    from_double(wide[r * width + i], out[r * groups * width + i]);
            }
        }
    }

    void sum_codes() {
        const int64_t width = codebook_.width;
        // Rows to copy where they cannot be read in place, and the sum of one code.
        const int64_t at_once = rows_at_once(width), elements = (at_once + 1) * width;
        std::vector<F> scratch(
            static_cast<size_t>(participants(codebook_.groups * codebook_.codes, workers_) * elements));
        for_codes([&](int participant, int64_t group, int64_t first, int64_t last) {
            F* rows = scratch.data() + participant * elements;
            T* out = static_cast<T*>(params_.grad_codebook) + (group * codebook_.codes + first) * width;
            std::memset(static_cast<void*>(out), 0, static_cast<size_t>((last - first) * width) * sizeof(T));
            fetch(group, first, last);
            for (int64_t code = first; code < last; ++code, out += width) {
                if (sorted_.count(group, code) == 0) continue;
                F* sum = rows + at_once * width;
                if constexpr (std::is_same<T, F>::value) sum = out;
                sum_code(group, code, at_once, rows, sum);
                if constexpr (!std::is_same<T, F>::value) {
                    for (int64_t i = 0; i < width; ++i) from_double(sum[i], out[i]);
                }
            }
        });
    }

    // The rows of these codes lie anywhere: the first of them start their way into the cache.
    void fetch(int64_t group, int64_t first, int64_t last) const {
        const T* x = static_cast<const T*>(params_.x) + group * params_.x_strides[1];
        const uint32_t* row = sorted_.begin(group, first);
        const uint32_t* end = sorted_.begin(group, last - 1) + sorted_.count(group, last - 1);
        if (end - row > 2 * kBatch) end = row + 2 * kBatch;
        for (; row < end; ++row) {
            __builtin_prefetch(x + *row * params_.x_strides[0]);
            if (cosine_) __builtin_prefetch(inverse_.get() + *row * codebook_.groups + group);
        }
    }

    void sum_code(int64_t group, int64_t code, int64_t at_once, F* scratch, F* sum) {
        const int64_t width = codebook_.width, count = sorted_.count(group, code);
        const int64_t* xs = params_.x_strides;
        const T* x = static_cast<const T*>(params_.x) + group * xs[1];
        const uint32_t* rows = sorted_.begin(group, code);
        const F* from[kBatch];
        double scale[kBatch];
        for (int64_t done = 0; done < count; done += at_once) {
            const int64_t held = count - done < at_once ? count - done : at_once;
            for (int64_t i = 0; i < held; ++i) {
                const int64_t row = rows[done + i];
                from[i] = contiguous_rows(x + row * xs[0], 0, xs[2], 1, width, scratch + i * width).data;
                scale[i] = cosine_ ? inverse_[row * codebook_.groups + group] : 1.0;
            }
            kernels_.add(from, scale, held, width, unit(group, code), done == 0, sum);
        }
        const double factor = params_.codebook_weight * step_;
        if (cosine_) {
            kernels_.through_norm(sum, factor, unit(group, code), norms_[group * codebook_.codes + code],
                                  width, sum);
        } else {
            for (int64_t i = 0; i < width; ++i) sum[i] = static_cast<F>(sum[i] * factor);
        }
    }

    static constexpr int64_t kNowhere = -1, kMasked = -2;
    const QuantizeBackwardParams& params_;
    const Codebook& codebook_;
    const bool cosine_;
    const RowKernels<F> kernels_;
    const int workers_;
    const RowsByCode sorted_;
    double step_;                     // 2 grad_loss / elements
    std::unique_ptr<F[]> unit_copy_;  // (groups, codes, width) rows of vq_lookup, of used codes only
    const F* units_ = nullptr;        // those, or the codebook itself
    int64_t unit_group_ = 0, unit_code_ = 0;
    std::unique_ptr<double[]> norms_;    // (groups, codes) of used codes, cosine only
    std::unique_ptr<double[]> inverse_;  // (rows, groups) 1 / max(|x|, 1e-12), cosine only
};

}  // namespace

void vq_quantize_backward_cpu(const QuantizeBackwardParams& params, int threads) {
    for_dtype(params.type, [&](auto element) { Backward<decltype(element)>(params, threads).run(); });
}

}  // namespace meditok
