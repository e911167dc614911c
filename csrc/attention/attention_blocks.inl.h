// Memory, powers and products of attention on vectors; included by one file per instruction set inside an anonymous namespace, after it has
// defined what common/simd.h lists and
//   kRows                         rows of a register tile, a multiple of 3; its width is two vectors
//   load_as(p), store_as(p, v)    kWidth elements of any type, as floats; rounded to nearest even
//   times_power(v, n)             v 2^n for whole n from kLowestPower, where it is 0
//   first_lanes(v, count, rest)   the first `count` elements of v, then those of `rest`
//   where_equal(a, b, x, y)       x where a == b, else y

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

// to[t * padded + c] = factor * from[t, c], zero from c = width to padded - 1 and for the tokens that are missing to a
// multiple of Step. Returns 0 in all lanes as long as everything is finite.
template <int64_t Step, class T>
MEDITOK_INLINE Vec pack_rows(const T* from, const AttentionStrides strides, int64_t tokens, int64_t width,
                             float factor, float* to, int64_t padded) {
    const Vec times = fill(factor), zero = fill(0.0f);
    Vec check = zero;
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t c = 0; c < width; c += kWidth) {
            const T* row = from + t * strides.token + c * strides.column;
            __builtin_prefetch(row + 16 * strides.token, 0, 2);
            const Vec v = mul(read(row, strides.column, width - c), times);
            store(to + t * padded + c, v);
            check = fma(v, zero, check);
        }
    }
    for (int64_t t = tokens; t < whole(tokens, Step); ++t) {
        for (int64_t c = 0; c < width; c += kWidth) store(to + t * padded + c, zero);
    }
    return check;
}

// to[c * kPanel + t] = factor * rows[t, c] for kWidth rows, whose columns fill whole vectors. Returns what `pack_rows`
// does.
template <class T>
MEDITOK_INLINE Vec transpose_rows(const T* rows, int64_t stride, int64_t width, float factor, float* to) {
    const Vec times = fill(factor), zero = fill(0.0f);
    Vec check = zero;
    for (int64_t c0 = 0; c0 < width; c0 += kWidth) {
        Vec r[kWidth];
#pragma GCC unroll 16
        for (int64_t t = 0; t < kWidth; ++t) {
            __builtin_prefetch(rows + (kWidth + t) * stride + c0, 0, 2);
            r[t] = mul(load_as(rows + t * stride + c0), times);
            check = fma(r[t], zero, check);
        }
        transpose(r);
#pragma GCC unroll 16
        for (int64_t c = 0; c < kWidth; ++c) {
            if (c0 + c < width) store(to + (c0 + c) * kPanel, r[c]);
        }
    }
    return check;
}

// The keys (or values) of a block times `factor`, transposed, panel by panel: (panels, width, kPanel). Whole vectors of
// tokens are filled. `square`: room for kWidth packed rows. Returns what `pack_rows` does.
template <class T>
Vec pack_panels(const T* from, const AttentionStrides strides, int64_t tokens, int64_t width, float factor,
                float* square, float* to) {
    const int64_t padded = whole(width, kWidth);
    Vec check = fill(0.0f);
    for (int64_t t = 0; t < tokens; t += kWidth) {
        const T* rows = from + t * strides.token;
        float* panel = to + t / kPanel * kPanel * width + t % kPanel;
        if (tokens - t >= kWidth && width == padded && strides.column == 1) {
            check = add(check, transpose_rows(rows, strides.token, width, factor, panel));
        } else {
            pack_rows<kWidth>(rows, strides, smaller(kWidth, tokens - t), width, factor, square, padded);
            check = add(check, transpose_rows(square, padded, width, 1.0f, panel));
        }
    }
    return check;
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

// scores[r, j] = sum_c rows[r * padded + c] panels[j / kPanel, c, j % kPanel] for j < count, rounded up to whole vectors.
template <int R>
void multiply_panels(const float* rows, int64_t padded, const float* panels, int64_t width, int64_t count,
                     float* scores) {
    for (int64_t j = 0; j < count; j += kPanel) {
        const float* panel = panels + j * width;
        if (count - j > kWidth) {
            tile<R, 2>(rows, padded, 1, panel, kPanel, width, nullptr, scores + j, kScoreStride);
        } else {
            tile<R, 1>(rows, padded, 1, panel, kPanel, width, nullptr, scores + j, kScoreStride);
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
