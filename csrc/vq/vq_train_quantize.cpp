// vq_quantize on CPU. Each block of rows is finished right after its ids are found, while it lies in the cache: the
// chosen rows, divided by the norms the packed codebook holds, and the squared error of every row. The errors are
// then added in an order that no thread count and no block size changes, the ids counted group by group.

#include <cstring>
#include <limits>
#include <vector>

#include "common/isa.h"
#include "common/threads.h"
#include "vq/vq_cpu.h"
#include "vq/vq_train_cpu.h"

namespace meditok {

TrainKernels train_kernels() {
    switch (current_isa()) {
#if defined(MEDITOK_HAVE_AVX2)
        case Isa::kAvx2: return train_rows_avx2();
#endif
#if defined(MEDITOK_HAVE_AVX512)
        case Isa::kAvx512:
        case Isa::kAvx512Vnni: return train_rows_avx512();
#endif
        default: return train_rows_scalar();
    }
}

namespace {

template <class T>
class Finish {
  public:
    using F = Wide<T>;

    Finish(const QuantizeParams& params, int threads)
        : params_(params),
          codebook_(params.assign.codebook),
          kernels_(train_kernels().of(F{})),
          layout_(packed_layout(codebook_.groups, codebook_.codes, codebook_.width)),
          at_once_(rows_at_once(codebook_.width)),
          scratch_elements_((3 * at_once_ + 2) * codebook_.width),
          errors_(static_cast<size_t>(params.assign.rows * codebook_.groups)),
          scratch_(static_cast<size_t>(participants(params.assign.rows * codebook_.groups, threads) *
                                       scratch_elements_)) {}

    static void after(void* context, int participant, int64_t group, int64_t begin, int64_t end) {
        Finish& self = *static_cast<Finish*>(context);
        for (int64_t row = begin; row < end; row += self.at_once_) {
            const int64_t last = row + self.at_once_ < end ? row + self.at_once_ : end;
            self.rows(participant, group, row, last);
        }
    }

    // Sum of all squared errors: blocks of kStatsRows rows, eight partial sums in each.
    double error(int threads) const {
        const int64_t groups = codebook_.groups, rows = params_.assign.rows;
        const int64_t blocks = (rows + kStatsRows - 1) / kStatsRows;
        std::vector<double> partial(static_cast<size_t>(blocks));
        parallel_for(blocks, threads, [&](int, int64_t block) {
            const int64_t end = (block + 1) * kStatsRows < rows ? (block + 1) * kStatsRows : rows;
            double sums[8] = {};
            for (int64_t i = block * kStatsRows * groups; i < end * groups; ++i) sums[i % 8] += errors_[i];
            partial[block] =
                ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
        });
        double total = 0.0;
        for (double part : partial) total += part;
        return total;
    }

  private:
    bool masked(int64_t row) const {
        return params_.mask != nullptr && params_.mask[row * params_.mask_stride] == 0;
    }

    void rows(int participant, int64_t group, int64_t begin, int64_t end) {
        const AssignParams& assign = params_.assign;
        const int64_t width = codebook_.width, groups = codebook_.groups, count = end - begin;
        const bool cosine = assign.metric == Metric::kCosine;
        F* x_scratch = scratch_.data() + participant * scratch_elements_;
        F* code_scratch = x_scratch + at_once_ * width;
        F* z_scratch = code_scratch + at_once_ * width;
        F* zeros = z_scratch + at_once_ * width;
        F* nans = zeros + width;
        for (int64_t i = 0; i < width; ++i) nans[i] = std::numeric_limits<F>::quiet_NaN();

        const T* codes = static_cast<const T*>(codebook_.data) + group * codebook_.group_stride;
        const double* norms = packed_view(assign.packed, layout_, group).norm;
        const F* code[64];
        double norm[64];
        for (int64_t r = 0; r < count; ++r) {
            const int64_t id = assign.ids[(begin + r) * groups + group];
            norm[r] = id < 0 ? 1.0 : norms[id];
            code[r] = id >= 0 ? contiguous_rows(codes + id * codebook_.code_stride, 0,
                                                codebook_.column_stride, 1, width, code_scratch + r * width)
                                    .data
                      : masked(begin + r) ? zeros
                                          : nans;
            __builtin_prefetch(code[r]);
        }
        T* z = static_cast<T*>(params_.z) + (begin * groups + group) * width;
        F* z_rows = z_scratch;
        int64_t z_stride = width;
        if constexpr (std::is_same<T, F>::value) {
            z_rows = z;
            z_stride = groups * width;
        }
        kernels_.divide(code, cosine ? norm : nullptr, count, width, z_rows, z_stride);
        if constexpr (!std::is_same<T, F>::value) {
            for (int64_t r = 0; r < count; ++r) {
                for (int64_t i = 0; i < width; ++i) {
                    T& element = z[r * groups * width + i];
                    from_double(z_rows[r * width + i], element);
                    z_rows[r * width + i] = widened(element);
                }
            }
        }
        const RowView<F> x = contiguous_rows(
            static_cast<const T*>(assign.x) + begin * assign.row_stride + group * assign.group_stride,
            assign.row_stride, assign.column_stride, count, width, x_scratch);
        double* errors = errors_.data() + begin * groups + group;
        kernels_.error(x.data, x.stride, z_rows, z_stride, count, width, cosine, errors, groups);
        if (params_.mask != nullptr) {
            for (int64_t r = 0; r < count; ++r)
                errors[r * groups] = masked(begin + r) ? 0.0 : errors[r * groups];
        }
    }

    const QuantizeParams& params_;
    const Codebook& codebook_;
    const RowKernels<F> kernels_;
    const PackedLayout layout_;
    const int64_t at_once_, scratch_elements_;
    std::vector<double> errors_;  // (rows, groups)
    std::vector<F> scratch_;      // for each participant: x, codes, z, a row of zeros, a row of NaN
};

}  // namespace

void vq_quantize_cpu(const QuantizeParams& params, int threads) {
    const AssignParams& assign = params.assign;
    const Codebook& codebook = assign.codebook;
    const int64_t groups = codebook.groups;
    for_dtype(assign.x_type, [&](auto element) {
        Finish<decltype(element)> finish(params, threads);
        assign_blocks(assign, AssignHook{params.mask, params.mask_stride, finish.after, &finish}, threads);
        const double elements = static_cast<double>(used_rows(params.mask, params.mask_stride, assign.rows)) *
                                static_cast<double>(groups * codebook.width);
        const int workers = worth_threads(static_cast<double>(assign.rows) * groups, threads);
        const double mean = finish.error(workers) / (elements > 1.0 ? elements : 1.0);
        *params.loss = static_cast<float>(mean * (params.commitment_weight + params.codebook_weight));
        count_ids(assign.ids, groups, 1, assign.rows, groups, codebook.codes, params.counts, workers);
    });
}

}  // namespace meditok
