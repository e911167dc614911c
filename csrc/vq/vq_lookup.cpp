// vq_lookup on CPU: a strip of vectors at a time, so that the codes, which lie anywhere, are on their way into the cache
// before the first is read, and the norms of several share a vector. Right because the norm is summed in the canonical
// order, one lane a code, and the division is that of vq.h.

#include <limits>
#include <vector>

#include "common/threads.h"
#include "vq/vq_train_cpu.h"

namespace meditok {

namespace {

template <class T>
class Lookup {
  public:
    using F = Wide<T>;

    explicit Lookup(const LookupParams& params)
        : params_(params),
          codebook_(params.codebook),
          kernels_(train_kernels().of(F{})),
          at_once_(rows_at_once(codebook_.width)),
          nans_(static_cast<size_t>(codebook_.width), std::numeric_limits<F>::quiet_NaN()) {}

    // Vectors begin..end of the (rows * groups) of the result; `scratch` holds scratch_elements().
    void run(int64_t begin, int64_t end, F* scratch) const {
        for (int64_t first = begin; first < end; first += at_once_) {
            strip(first, end - first < at_once_ ? end - first : at_once_, scratch);
        }
    }

    int64_t scratch_elements() const { return 2 * at_once_ * codebook_.width; }

  private:
    void strip(int64_t first, int64_t count, F* scratch) const {
        const int64_t width = codebook_.width, groups = codebook_.groups;
        const F* code[kRowsAtOnce];
        int64_t row = first / groups, group = first % groups;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t id = params_.ids[row * params_.row_stride + group * params_.group_stride];
            code[i] = nans_.data();
            if (id >= 0 && id < codebook_.codes) {
                const T* from = static_cast<const T*>(codebook_.data) + group * codebook_.group_stride +
                                id * codebook_.code_stride;
                code[i] =
                    contiguous_rows(from, 0, codebook_.column_stride, 1, width, scratch + i * width).data;
                __builtin_prefetch(code[i]);
            }
            if (++group == groups) {
                group = 0;
                ++row;
            }
        }
        double norm[kRowsAtOnce];
        const bool cosine = params_.metric == Metric::kCosine;
        if (cosine) kernels_.canonical_norm(code, count, width, norm);
        T* out = static_cast<T*>(params_.out) + first * width;
        if constexpr (std::is_same<T, F>::value) {
            kernels_.divide(code, cosine ? norm : nullptr, count, width, out, width);
        } else {
            F* wide = scratch + at_once_ * width;
            kernels_.divide(code, cosine ? norm : nullptr, count, width, wide, width);
            for (int64_t i = 0; i < count * width; ++i) from_double(wide[i], out[i]);
        }
    }

    const LookupParams& params_;
    const Codebook& codebook_;
    const RowKernels<F> kernels_;
    const int64_t at_once_;
    const std::vector<F> nans_;  // what an id outside 0..codes-1 gets
};

}  // namespace

void vq_lookup_cpu(const LookupParams& params, int threads) {
    const int64_t vectors = params.rows * params.codebook.groups, width = params.codebook.width;
    if (vectors == 0 || width == 0) return;
    const int64_t block = 1 + 16384 / width;  // vectors to an item: enough to be worth a claim
    const int64_t items = (vectors + block - 1) / block;
    for_dtype(params.codebook.type, [&](auto element) {
        using T = decltype(element);
        const Lookup<T> lookup(params);
        const int workers = participants(items, threads);
        std::vector<Wide<T>> scratch(static_cast<size_t>(workers * lookup.scratch_elements()));
        parallel_for(items, workers, [&](int participant, int64_t item) {
            const int64_t begin = item * block;
            lookup.run(begin, begin + block < vectors ? begin + block : vectors,
                       scratch.data() + participant * lookup.scratch_elements());
        });
    });
}

}  // namespace meditok
