// Attention on vectors, forward; included by one file per instruction set inside an anonymous namespace, after it has
// defined what common/simd.h lists and
//   kRows                         rows of a register tile, a multiple of 3; its width is two vectors
//   load_as(p), store_as(p, v)    kWidth elements of any type, as floats; rounded to nearest even
//   times_power(v, n)             v 2^n for whole n from kLowestPower, where it is 0
//   first_lanes(v, count, rest)   the first `count` elements of v, then those of `rest`
//   where_equal(a, b, x, y)       x where a == b, else y
//
// Keys come in blocks of kKeys, whose scores with kRows queries stay in the first cache. The keys are packed transposed,
// in panels of kPanel of them; queries too, in groups of kRows; values row by row, to whole vectors. Each row keeps its
// running maximum and sum and is rescaled where a new block raises the maximum (Milakov and Gimelshein 2018). What is done
// to a row, and in which order, depends on nothing but the row: any cut into items gives the same bits.

constexpr int64_t kPanel = 2 * kWidth;
constexpr int64_t kKeys = 256;
constexpr int64_t kScoreStride = kKeys + kPanel;  // a row of scores, and room for zeros after it
constexpr float kLog2E = 1.44269504088896341f;
constexpr double kLn2 = 0.693147180559945309;

template <int N>
struct Int {
    static constexpr int value = N;
};

MEDITOK_INLINE int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}
MEDITOK_INLINE int64_t whole(int64_t count, int64_t step) {
    return (count + step - 1) / step * step;
}
MEDITOK_INLINE Vec never() {
    return fill(-__builtin_inff());
}

// 2^t, within 1.1 units in the last place for t <= 1: a polynomial for the fraction (relative error 2^-29, fitted to the
// least largest one on [-1/2, 1/2]), then the exponent. 0 below 2^kLowestPower; NaN stays.
MEDITOK_INLINE Vec exp2(Vec t) {
    t = max(fill(kLowestPower), t);
    const Vec n = round(t), r = sub(t, n);
    Vec p = fma(fill(0.00015345812f), r, fill(0.0013399931f));
    p = fma(p, r, fill(0.009618489f));
    p = fma(p, r, fill(0.055503286f));
    p = fma(p, r, fill(0.24022646f));
    p = fma(p, r, fill(0.6931472f));
    return times_power(fma(p, r, fill(1.0f)), n);
}

// ---- memory -----------------------------------------------------------------------------------------------
// Rows of packed projections lie a page or more apart, where the machine foresees nothing: packing asks for the rows it
// reads next (an address past the end does no harm).

// `count` elements, at most kWidth of them, followed by zeros.
template <class T>
MEDITOK_INLINE Vec read(const T* p, int64_t stride, int64_t count) {
    if (stride == 1 && count >= kWidth) return load_as(p);
    T part[kWidth] = {};
    for (int64_t i = 0; i < smaller(count, kWidth); ++i) part[i] = p[i * stride];
    return load_as(part);
}
template <class T>
MEDITOK_INLINE void write(T* p, int64_t stride, int64_t count, Vec v) {
    if (stride == 1 && count >= kWidth) {
        store_as(p, v);
        return;
    }
    T part[kWidth];
    store_as(part, v);
    for (int64_t i = 0; i < smaller(count, kWidth); ++i) p[i * stride] = part[i];
}

template <class T>
MEDITOK_INLINE const T* at(const void* data, const AttentionStrides& strides, int64_t b, int64_t h,
                           int64_t token) {
    return static_cast<const T*>(data) + b * strides.batch + h * strides.head + token * strides.token;
}

// to[c * Size + t] = factor * from[t, c], zero from t = tokens to Size - 1; up to kWidth floats after it are spoilt.
// `check` stays 0 as long as everything is finite.
template <int64_t Size, class T>
MEDITOK_INLINE void pack_transposed(const T* from, const AttentionStrides& strides, int64_t tokens,
                                    int64_t width, float factor, float* to, Vec& check) {
    for (int64_t t0 = 0; t0 < Size; t0 += kWidth) {
        for (int64_t c0 = 0; c0 < width; c0 += kWidth) {
            Vec r[kWidth];
#pragma GCC unroll 16
            for (int64_t i = 0; i < kWidth; ++i) {
                r[i] = fill(0.0f);
                if (t0 + i >= tokens) continue;
                const T* row = from + (t0 + i) * strides.token + c0 * strides.column;
                __builtin_prefetch(row + smaller(Size, kWidth) * strides.token);
                r[i] = mul(read(row, strides.column, width - c0), fill(factor));
                check = fma(r[i], fill(0.0f), check);
            }
            transpose(r);
            const int64_t count = smaller(kWidth, width - c0);
#pragma GCC unroll 16
            for (int64_t c = 0; c < kWidth; ++c) {
                if (c < count) store(to + (c0 + c) * Size + t0, r[c]);
            }
        }
    }
}

// to[t * padded + c] = factor * from[t, c], zero from c = width to padded - 1.
template <class T>
MEDITOK_INLINE void pack_rows(const T* from, const AttentionStrides& strides, int64_t tokens, int64_t width,
                              int64_t padded, float factor, float* to, Vec& check) {
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t c = 0; c < padded; c += kWidth) {
            const T* row = from + t * strides.token + c * strides.column;
            __builtin_prefetch(row + 8 * strides.token);
            const Vec v = mul(read(row, strides.column, width - c), fill(factor));
            store(to + t * padded + c, v);
            check = fma(v, fill(0.0f), check);
        }
    }
}

// The packed keys (or values) of a block, panel by panel: (panels, width, kPanel).
template <class T>
void pack_panels(const T* from, const AttentionStrides& strides, int64_t tokens, int64_t width, float* to,
                 Vec& check) {
    for (int64_t t = 0; t < tokens; t += kPanel) {
        pack_transposed<kPanel>(from + t * strides.token, strides, smaller(kPanel, tokens - t), width, 1.0f,
                                to + t * width, check);
    }
}

// Queries (or gradients) in groups of kRows: (groups, width, kRows).
template <class T>
void pack_groups(const T* from, const AttentionStrides& strides, int64_t tokens, int64_t width, float factor,
                 float* to, Vec& check) {
    for (int64_t t = 0; t < tokens; t += kRows) {
        pack_transposed<kRows>(from + t * strides.token, strides, smaller(kRows, tokens - t), width, factor,
                               to + t * width, check);
    }
}

// Memory handed out in order, each part aligned to 64 bytes; with base null it only measures.
struct Arena {
    unsigned char* base;
    size_t used = 0;

    float* floats(int64_t count) {
        float* part = base == nullptr ? nullptr : reinterpret_cast<float*>(base + used);
        used += static_cast<size_t>(whole(count, 16)) * sizeof(float);
        return part;
    }
};

// ---- products ---------------------------------------------------------------------------------------------

// sum[r, v] += sum over k < depth of a[r * a_row + k * a_step] * b[k * b_step + v * kWidth ...], k in order.
template <int R, int V>
MEDITOK_INLINE void product(Vec (&sum)[R][V], const float* a, int64_t a_row, int64_t a_step, const float* b,
                            int64_t b_step, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k) {
        Vec column[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) column[v] = load(b + v * kWidth);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const Vec x = fill(a[r * a_row]);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) sum[r][v] = fma(x, column[v], sum[r][v]);
        }
        a += a_step;
        b += b_step;
    }
}

// out[r, c] = the product + out[r, c] * scale[r] (scale null: 0), for V vectors from column 0. What is there comes last:
// sums of short sums round less.
template <int R, int V>
MEDITOK_INLINE void tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step,
                         int64_t depth, const float* scale, float* out, int64_t out_stride) {
    Vec sum[R][V];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[r][v] = fill(0.0f);
    }
    product<R, V>(sum, a, a_row, a_step, b, b_step, depth);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            float* to = out + r * out_stride + v * kWidth;
            store(to, scale == nullptr ? sum[r][v] : fma(load(to), fill(scale[r]), sum[r][v]));
        }
    }
}

// scores[r, j] = sum_c rows[c, r] panels[j / kPanel, c, j % kPanel] for j < count, rounded up to whole vectors.
template <int R>
void multiply_panels(const float* rows, const float* panels, int64_t width, int64_t count, float* scores) {
    for (int64_t j = 0; j < count; j += kPanel) {
        const float* panel = panels + j * width;
        if (count - j > kWidth) {
            tile<R, 2>(rows, 1, kRows, panel, kPanel, width, nullptr, scores + j, kScoreStride);
        } else {
            tile<R, 1>(rows, 1, kRows, panel, kPanel, width, nullptr, scores + j, kScoreStride);
        }
    }
}

// out[r, c] = out[r, c] scale[r] + sum over k of a[r, k] rows[k, c] for all `padded` columns; see `tile`.
template <int R>
MEDITOK_INLINE void multiply_rows(const float* a, int64_t a_row, int64_t a_step, const float* rows,
                                  int64_t padded, int64_t depth, const float* scale, float* out) {
    int64_t c = 0;
    for (; c + kPanel <= padded; c += kPanel) {
        tile<R, 2>(a, a_row, a_step, rows + c, padded, depth, scale, out + c, padded);
    }
    if (c < padded) tile<R, 1>(a, a_row, a_step, rows + c, padded, depth, scale, out + c, padded);
}
template <int R>
void mix(const float* weights, const float* rows, int64_t padded, int64_t depth, const float* scale,
         float* out) {
    multiply_rows<R>(weights, kScoreStride, 1, rows, padded, depth, scale, out);
}

// Calls body with a row count that has a register tile: kRows, or the third of it that is enough.
template <class Body>
MEDITOK_INLINE void with_rows(int64_t rows, Body body) {
    if (rows > kRows / 3 * 2) {
        body(Int<kRows>{});
    } else if (rows > kRows / 3) {
        body(Int<kRows / 3 * 2>{});
    } else {
        body(Int<kRows / 3>{});
    }
}

// ---- masks ------------------------------------------------------------------------------------------------

struct Scaling {
    float sign, magnitude;  // of the scale; the sign, 0 for 0, goes into the packed queries
    float factor;           // what takes a finished score to a power of two
    bool biased;            // scores are finished by add_bias

    explicit Scaling(const AttentionParams& params) {
        sign = params.scale > 0 ? 1.0f : params.scale < 0 ? -1.0f : 0.0f;
        magnitude = params.scale == 0 ? 1.0f : static_cast<float>(params.scale * sign);
        biased = params.mask_kind == MaskKind::kBool || params.mask_kind == MaskKind::kAdditive;
        factor = biased ? kLog2E : static_cast<float>(magnitude * 1.44269504088896341);
    }
};

// scores[j] = magnitude * scores[j] + mask[i, first + j]; -inf where not attended, whatever the score.
template <class T>
void add_bias(const AttentionParams& params, int64_t b, int64_t h, int64_t i, int64_t first, int64_t count,
              float magnitude, float* bias, float* scores) {
    const int64_t stride = params.mask_strides.column;
    if (params.mask_kind == MaskKind::kBool) {
        const unsigned char* mask =
            at<unsigned char>(params.mask, params.mask_strides, b, h, i) + first * stride;
        for (int64_t j = 0; j < count; ++j) bias[j] = mask[j * stride] != 0 ? 0.0f : -__builtin_inff();
    } else {
        const T* mask = at<T>(params.mask, params.mask_strides, b, h, i) + first * stride;
        for (int64_t j = 0; j < count; j += kWidth)
            store(bias + j, read(mask + j * stride, stride, count - j));
    }
    for (int64_t j = 0; j < count; j += kWidth) {
        const Vec added = load(bias + j), score = fma(load(scores + j), fill(magnitude), added);
        store(scores + j, where_equal(added, never(), added, score));
    }
}

// How many keys of the block from `first` query i may attend to.
MEDITOK_INLINE int64_t attended(const AttentionParams& params, int64_t i, int64_t first, int64_t count) {
    if (params.mask_kind != MaskKind::kCausal) return count;
    const int64_t reach = i + 1 - first;
    return reach < 0 ? 0 : smaller(reach, count);
}

// ---- forward ----------------------------------------------------------------------------------------------

struct RowState {
    float largest;  // score so far
    float shift;    // its power of two, or 0 where there is none
    float sum;      // of 2^(power - shift)
};

// Turns `valid` scores into weights, followed by zeros up to `count`; returns what earlier sums are to be scaled by.
MEDITOK_INLINE float soften(float* scores, int64_t valid, int64_t count, float factor, RowState& state) {
    Vec top = never();
    int64_t j = 0;
    for (; j + kWidth <= valid; j += kWidth) top = max(top, load(scores + j));
    if (j < valid) {
        const Vec tail = first_lanes(load(scores + j), valid - j, never());
        store(scores + j, tail);
        top = max(top, tail);
    }
    const float before = state.largest, found = largest(top);
    state.largest = before > found ? before : found;
    state.shift = state.largest == -__builtin_inff() ? 0.0f : state.largest * factor;
    float scale[kWidth] = {0.0f};
    if (before != -__builtin_inff()) store(scale, exp2(fill(before * factor - state.shift)));
    const Vec slope = fill(factor), shift = fill(-state.shift);
    Vec sum = fill(0.0f);
    for (j = 0; j < valid; j += kWidth) {
        const Vec weight = exp2(fma(load(scores + j), slope, shift));
        store(scores + j, weight);
        sum = add(sum, weight);
    }
    for (; j < count; j += kWidth) store(scores + j, fill(0.0f));
    state.sum = state.sum * scale[0] + sum_of(sum);
    return scale[0];
}

struct ForwardScratch {
    float *q, *k, *v, *scores, *bias, *sums, *mean;
    RowState* state;
    int64_t padded;
    size_t bytes;

    ForwardScratch(const AttentionParams& params, int64_t rows, unsigned char* base) {
        Arena arena{base};
        padded = whole(params.width, kWidth);
        const int64_t keys = smaller(kKeys, whole(params.keys, kPanel));
        rows = whole(rows, kRows);
        q = arena.floats(rows * params.width + kWidth);
        k = arena.floats(keys * params.width);
        v = arena.floats(keys * padded);
        scores = arena.floats(kRows * kScoreStride);
        bias = arena.floats(kScoreStride);
        sums = arena.floats(rows * padded);
        mean = arena.floats(params.mean ? rows * padded : 0);
        state = reinterpret_cast<RowState*>(arena.floats(rows * static_cast<int64_t>(sizeof(RowState) / 4)));
        bytes = arena.used;
    }
};

// The row is complete: writes it, or adds it to the mean, and its lse.
template <class T>
void finish_row(const AttentionParams& params, int64_t b, int64_t h, int64_t i, const RowState& state,
                const float* sums, int64_t padded, float* mean) {
    const bool empty = state.sum == 0.0f;
    if (params.lse != nullptr) {
        const double lse =
            static_cast<double>(state.shift) * kLn2 + __builtin_log(static_cast<double>(state.sum));
        params.lse[(b * params.heads + h) * params.queries + i] =
            empty ? __builtin_inff() : static_cast<float>(lse);
    }
    const float share = params.mean ? 1.0f / static_cast<float>(params.heads) : 1.0f;
    const Vec weight = fill(share / state.sum);
    T* out = const_cast<T*>(at<T>(params.out, params.out_strides, b, params.mean ? 0 : h, i));
    for (int64_t c = 0; c < padded; c += kWidth) {
        const Vec value = empty ? fill(0.0f) : mul(load(sums + c), weight);
        if (params.mean) {
            store(mean + c, add(load(mean + c), value));
        } else {
            write(out + c * params.out_strides.column, params.out_strides.column, params.width - c, value);
        }
    }
}

template <class T>
bool attend(const AttentionParams& params, int64_t b, int64_t h, int64_t begin, int64_t end,
            ForwardScratch& scratch) {
    const Scaling scaling(params);
    const bool causal = params.mask_kind == MaskKind::kCausal;
    const int64_t width = params.width, padded = scratch.padded;
    const int64_t keys = causal ? smaller(params.keys, end) : params.keys;
    Vec ignored = fill(0.0f), check = fill(0.0f);
    pack_groups(at<T>(params.q, params.q_strides, b, h, begin), params.q_strides, end - begin, width,
                scaling.sign, scratch.q, ignored);
    for (int64_t i = 0; i < end - begin; ++i) scratch.state[i] = RowState{-__builtin_inff(), 0.0f, 0.0f};
    for (int64_t first = 0; first < keys; first += kKeys) {
        const int64_t count = smaller(kKeys, keys - first);
        pack_panels(at<T>(params.k, params.k_strides, b, h, first), params.k_strides, count, width, scratch.k,
                    ignored);
        pack_rows(at<T>(params.v, params.v_strides, b, h, first), params.v_strides, count, width, padded,
                  1.0f, scratch.v, check);
        if (params.mask_kind != MaskKind::kNone && !(sum_of(check) == 0.0f)) return false;
        for (int64_t row = 0; row < end - begin; row += kRows) {
            const int64_t rows = smaller(kRows, end - begin - row);
            const int64_t last = begin + row + rows - 1, reach = attended(params, last, first, count);
            if (reach == 0) continue;
            float scale[kRows] = {};
            float* sums = scratch.sums + row * padded;
            with_rows(rows, [&](auto number) __attribute__((always_inline)) {
                constexpr int R = decltype(number)::value;
                multiply_panels<R>(scratch.q + row * width, scratch.k, width, reach, scratch.scores);
                for (int64_t r = 0; r < rows; ++r) {
                    float* scores = scratch.scores + r * kScoreStride;
                    const int64_t i = begin + row + r, valid = attended(params, i, first, count);
                    if (scaling.biased) {
                        add_bias<T>(params, b, h, i, first, count, scaling.magnitude, scratch.bias, scores);
                    }
                    scale[r] = soften(scores, valid, reach, scaling.factor, scratch.state[row + r]);
                }
                mix<R>(scratch.scores, scratch.v, padded, reach, first == 0 ? nullptr : scale, sums);
            });
            if (first + count < attended(params, last, 0, keys)) continue;
            for (int64_t r = 0; r < rows; ++r) {
                finish_row<T>(params, b, h, begin + row + r, scratch.state[row + r], sums + r * padded,
                              padded, params.mean ? scratch.mean + (row + r) * padded : nullptr);
            }
        }
    }
    if (keys > 0) return true;
    for (int64_t i = 0; i < end - begin; ++i) {
        finish_row<T>(params, b, h, begin + i, scratch.state[i], scratch.sums, padded,
                      params.mean ? scratch.mean + i * padded : nullptr);
    }
    return true;
}

template <class T>
bool forward_as(const AttentionParams& params, int64_t b, int64_t h, int64_t begin, int64_t end,
                unsigned char* memory) {
    ForwardScratch scratch(params, end - begin, memory);
    if (!params.mean) return attend<T>(params, b, h, begin, end, scratch);
    for (int64_t n = 0; n < (end - begin) * scratch.padded; ++n) scratch.mean[n] = 0.0f;
    for (int64_t head = 0; head < params.heads; ++head) {
        if (!attend<T>(params, b, head, begin, end, scratch)) return false;
    }
    for (int64_t i = begin; i < end; ++i) {
        T* out = const_cast<T*>(at<T>(params.out, params.out_strides, b, 0, i));
        const int64_t stride = params.out_strides.column;
        for (int64_t c = 0; c < params.width; c += kWidth) {
            const Vec value = load(scratch.mean + (i - begin) * scratch.padded + c);
            write(out + c * stride, stride, params.width - c, value);
        }
    }
    return true;
}

bool forward(const AttentionParams& params, int64_t b, int64_t h, int64_t begin, int64_t end,
             unsigned char* scratch) {
    switch (params.type) {
        case Dtype::kFloat32: return forward_as<float>(params, b, h, begin, end, scratch);
        case Dtype::kFloat16: return forward_as<half_bits>(params, b, h, begin, end, scratch);
        case Dtype::kBfloat16: return forward_as<bfloat16_bits>(params, b, h, begin, end, scratch);
        default: return false;
    }
}
