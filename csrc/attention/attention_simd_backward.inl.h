// Attention on vectors, backward; included after attention_simd.inl.h. Blocks of kKeys keys, and within them blocks of
// kQueries queries whose weights and their gradients stay in the second cache. The gradients of a block's keys and
// values add up over the queries in order, those of the queries over the blocks of keys.
//
// Where all keys are in one block, delta is the sum of p dp of the whole row. Otherwise it has to be known before: from
// the result of the forward, or, for the mean of heads, from a pass of its own.

constexpr int64_t kQueries = 48;  // a multiple of every kRows

struct BackwardScratch {
    float *k_panels, *v_panels, *k_rows, *grad_k, *grad_v;  // a block of keys
    float *q_rows, *g_rows, *p, *ds;                        // a block of queries
    float *bias, *grad_q, *delta, *sum;  // a row; all queries, where there are more blocks of keys
    int64_t padded;
    bool one_block;
    size_t bytes;

    BackwardScratch(const AttentionParams& params, unsigned char* base) {
        Arena arena{base};
        const int64_t width = params.width, keys = smaller(kKeys, whole(params.keys, kPanel));
        padded = whole(width, kWidth);
        one_block = params.keys <= kKeys;
        const int64_t rows = one_block ? kQueries : whole(params.queries, kRows);
        k_panels = arena.floats(keys * width);
        v_panels = arena.floats(keys * width);
        k_rows = arena.floats(keys * padded);
        grad_k = arena.floats((keys + kRows) * padded);
        grad_v = arena.floats((keys + kRows) * padded);
        q_rows = arena.floats(kQueries * padded);
        g_rows = arena.floats(kQueries * padded);
        p = arena.floats(kQueries * kScoreStride);
        ds = arena.floats(kQueries * kScoreStride);
        bias = arena.floats(kScoreStride);
        grad_q = arena.floats(rows * padded);
        delta = arena.floats(one_block ? 0 : params.queries);
        sum = arena.floats(one_block ? 0 : params.queries);
        bytes = arena.used;
    }
};

template <class T>
void write_rows(void* out, const AttentionStrides& strides, int64_t b, int64_t h, int64_t token,
                int64_t tokens, int64_t width, const float* rows, int64_t padded) {
    for (int64_t t = 0; t < tokens; ++t) {
        T* to = const_cast<T*>(at<T>(out, strides, b, h, token + t));
        for (int64_t c = 0; c < width; c += kWidth) {
            write(to + c * strides.column, strides.column, width - c, load(rows + t * padded + c));
        }
    }
}

template <class T>
class Backward {
  public:
    Backward(const AttentionBackwardParams& params, int64_t b, int64_t h, unsigned char* memory)
        : params_(params),
          f_(params.forward),
          b_(b),
          h_(h),
          scaling_(params.forward),
          scratch_(params.forward, memory),
          check_(fill(0.0f)) {}

    bool run() {
        if (!scratch_.one_block) {
            for (int64_t i = 0; i < f_.queries; ++i) {
                scratch_.delta[i] = f_.mean ? 0.0f : delta_from_out(i);
                scratch_.sum[i] = 0.0f;
            }
        }
        const bool extra = !scratch_.one_block && f_.mean;
        for (int pass = extra ? 0 : 1; pass < 2; ++pass) {
            for (int64_t first = 0; first < f_.keys; first += kKeys) {
                if (!block_of_keys(first, smaller(kKeys, f_.keys - first), pass == 0)) return false;
            }
            for (int64_t i = 0; pass == 0 && i < f_.queries; ++i) {
                if (scratch_.sum[i] != 0.0f) scratch_.delta[i] /= scratch_.sum[i];
            }
        }
        if (f_.keys > 0) return true;
        for (int64_t i = 0; i < f_.queries; ++i) {
            for (int64_t c = 0; c < scratch_.padded; ++c) scratch_.grad_q[c] = 0.0f;
            write_rows<T>(params_.grad_q, params_.grad_q_strides, b_, h_, i, 1, f_.width, scratch_.grad_q,
                          scratch_.padded);
        }
        return true;
    }

  private:
    float share() const { return f_.mean ? 1.0f / static_cast<float>(f_.heads) : 1.0f; }

    const T* grad(int64_t i) const {
        return at<T>(params_.grad_out, params_.grad_out_strides, b_, f_.mean ? 0 : h_, i);
    }

    float delta_from_out(int64_t i) const {
        const T *g = grad(i), *out = at<T>(f_.out, f_.out_strides, b_, h_, i);
        const int64_t g_stride = params_.grad_out_strides.column, stride = f_.out_strides.column;
        Vec sum = fill(0.0f);
        for (int64_t c = 0; c < f_.width; c += kWidth) {
            sum = fma(read(g + c * g_stride, g_stride, f_.width - c),
                      read(out + c * stride, stride, f_.width - c), sum);
        }
        return sum_of(sum);
    }

    void note(Vec check) { check_ = add(check_, check); }

    bool finite() const { return f_.mask_kind == MaskKind::kNone || sum_of(check_) == 0.0f; }

    bool block_of_keys(int64_t first, int64_t count, bool only_delta) {
        const int64_t width = f_.width, padded = scratch_.padded;
        const T *k = at<T>(f_.k, f_.k_strides, b_, h_, first), *v = at<T>(f_.v, f_.v_strides, b_, h_, first);
        note(pack_rows<1>(k, f_.k_strides, count, width, 1.0f, scratch_.k_rows, padded));
        pack_panels(scratch_.k_rows, AttentionStrides{0, 0, padded, 1}, count, width, scaling_.sign,
                    scratch_.grad_k, scratch_.k_panels);
        note(pack_panels(v, f_.v_strides, count, width, 1.0f, scratch_.grad_k, scratch_.v_panels));
        for (int64_t n = 0; n < whole(count, kRows) * padded; ++n)
            scratch_.grad_k[n] = scratch_.grad_v[n] = 0.0f;
        const bool causal = f_.mask_kind == MaskKind::kCausal;
        for (int64_t i = causal ? first / kQueries * kQueries : 0; i < f_.queries; i += kQueries) {
            const int64_t rows = smaller(kQueries, f_.queries - i);
            pack_queries(i, rows);
            if (!finite()) return false;
            for (int64_t row = 0; row < rows; row += kRows)
                group_of_rows(i, row, rows, first, count, only_delta);
            if (!only_delta) add_to_keys(i, rows, first, count);
        }
        if (only_delta) return true;
        write_rows<T>(params_.grad_k, params_.grad_k_strides, b_, h_, first, count, width, scratch_.grad_k,
                      padded);
        write_rows<T>(params_.grad_v, params_.grad_v_strides, b_, h_, first, count, width, scratch_.grad_v,
                      padded);
        return true;
    }

    void pack_queries(int64_t i, int64_t rows) {
        const T* q = at<T>(f_.q, f_.q_strides, b_, h_, i);
        const int64_t width = f_.width, padded = scratch_.padded;
        note(pack_rows<kRows>(q, f_.q_strides, rows, width, 1.0f, scratch_.q_rows, padded));
        note(pack_rows<kRows>(grad(i), params_.grad_out_strides, rows, width, share(), scratch_.g_rows,
                              padded));
    }

    // Weights and their gradients of a register tile's rows, and what they add to the queries' gradients.
    void group_of_rows(int64_t block, int64_t row, int64_t block_rows, int64_t first, int64_t count,
                       bool only_delta) {
        const int64_t rows = smaller(kRows, block_rows - row), begin = block + row, width = f_.width;
        const int64_t last = begin + rows - 1, reach = attended(f_, last, first, count),
                      padded = scratch_.padded;
        if (reach == 0) return;
        float *p = scratch_.p + row * kScoreStride, *ds = scratch_.ds + row * kScoreStride;
        float* grad_q = scratch_.grad_q + (scratch_.one_block ? row : begin) * padded;
        with_rows(rows, [&](auto number) __attribute__((always_inline)) {
            constexpr int R = decltype(number)::value;
            multiply_panels<R>(scratch_.q_rows + row * padded, padded, scratch_.k_panels, width, reach, p);
            multiply_panels<R>(scratch_.g_rows + row * padded, padded, scratch_.v_panels, width, reach, ds);
            for (int64_t r = 0; r < rows; ++r) {
                differentiate(begin + r, first, count, only_delta, p + r * kScoreStride,
                              ds + r * kScoreStride);
            }
            if (only_delta) return;
            float keep[kRows];
            for (float& factor : keep) factor = 1.0f;
            mix<R>(ds, scratch_.k_rows, padded, reach, first == 0 ? nullptr : keep, grad_q);
        });
        if (only_delta || first + count < attended(f_, last, 0, f_.keys)) return;
        write_rows<T>(params_.grad_q, params_.grad_q_strides, b_, h_, begin, rows, width, grad_q, padded);
    }

    // Scores and dp of query i in, p and scale p (dp - delta) out, followed by zeros as far as add_to_keys looks.
    void differentiate(int64_t i, int64_t first, int64_t count, bool only_delta, float* p, float* ds) {
        const int64_t valid = attended(f_, i, first, count);
        if (scaling_.biased) {
            add_bias<T>(f_, b_, h_, i, first, count, scaling_.magnitude, scratch_.bias, p);
        }
        const float lse = f_.lse[(b_ * f_.heads + h_) * f_.queries + i];
        const Vec slope = fill(scaling_.factor), shift = fill(-lse * kLog2E), zero = fill(0.0f);
        Vec sum = zero, products = zero;
        int64_t j = 0;
        for (; j < valid; j += kWidth) {
            Vec weight = exp2(fma(load(p + j), slope, shift)), dp = load(ds + j);
            if (valid - j < kWidth) {
                weight = first_lanes(weight, valid - j, zero);
                dp = first_lanes(dp, valid - j, zero);
            }
            store(p + j, weight);
            store(ds + j, dp);
            sum = add(sum, weight);
            products = fma(weight, dp, products);
        }
        float norm = 1.0f, delta = 0.0f;
        if (only_delta) {
            scratch_.delta[i] += sum_of(products);
            scratch_.sum[i] += sum_of(sum);
            return;
        }
        if (scratch_
                .one_block) {  // the row's own sum undoes the rounding of lse, which is coarse for large scores
            const float weights = sum_of(sum);
            norm = weights == 0.0f ? 0.0f : 1.0f / weights;
            delta = sum_of(products) * norm;
        } else {
            delta = scratch_.delta[i];
        }
        const Vec scale = fill(static_cast<float>(f_.scale));
        for (j = 0; j < valid; j += kWidth) {
            const Vec weight = mul(load(p + j), fill(norm));
            store(p + j, weight);
            store(ds + j, mul(mul(weight, sub(load(ds + j), fill(delta))), scale));
        }
        for (; j < smaller(valid + kRows, kScoreStride); j += kWidth) {
            store(p + j, zero);
            store(ds + j, zero);
        }
    }

    void add_to_keys(int64_t block, int64_t rows, int64_t first, int64_t count) {
        const bool causal = f_.mask_kind == MaskKind::kCausal;
        const int64_t padded = scratch_.padded;
        float keep[kRows];
        for (float& factor : keep) factor = 1.0f;
        for (int64_t j = 0; j < count; j += kRows) {
            const int64_t skipped = first + j - block;  // queries before the first of these keys
            const int64_t start = causal && skipped > 0 ? skipped : 0;
            if (start >= rows) break;
            const float *p = scratch_.p + start * kScoreStride + j,
                        *ds = scratch_.ds + start * kScoreStride + j;
            multiply_rows<kRows>(p, 1, kScoreStride, scratch_.g_rows + start * padded, padded, rows - start,
                                 keep, scratch_.grad_v + j * padded);
            multiply_rows<kRows>(ds, 1, kScoreStride, scratch_.q_rows + start * padded, padded, rows - start,
                                 keep, scratch_.grad_k + j * padded);
        }
    }

    const AttentionBackwardParams& params_;
    const AttentionParams& f_;
    const int64_t b_, h_;
    const Scaling scaling_;
    BackwardScratch scratch_;
    Vec check_;
};

bool backward(const AttentionBackwardParams& params, int64_t b, int64_t h, unsigned char* scratch) {
    switch (params.forward.type) {
        case Dtype::kFloat32: return Backward<float>(params, b, h, scratch).run();
        case Dtype::kFloat16: return Backward<half_bits>(params, b, h, scratch).run();
        case Dtype::kBfloat16: return Backward<bfloat16_bits>(params, b, h, scratch).run();
        default: return false;
    }
}

AttentionKernel simd_kernel() {
    return AttentionKernel{
        [](const AttentionParams& params, int64_t rows) {
            return ForwardScratch(params, rows, nullptr).bytes;
        },
        forward,
        [](const AttentionBackwardParams& params) { return BackwardScratch(params.forward, nullptr).bytes; },
        backward};
}
