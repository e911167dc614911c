// Attention on vectors, forward; included after attention_blocks.inl.h.
//
// Keys come in blocks of kKeys, whose scores with kRows queries stay in the first cache. The keys are packed transposed,
// in panels of kPanel of them; queries and values row by row, to whole vectors. Each row keeps its running maximum and sum
// and is rescaled where a new block raises the maximum (Milakov and Gimelshein 2018). What is done to a row, and in which
// order, depends on nothing but the row: any cut into items gives the same bits.

// ---- masks ------------------------------------------------------------------------------------------------

struct Scaling {
    float sign, magnitude;  // of the scale; the sign, 0 for 0, goes into the packed keys
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
        q = arena.floats(rows * padded);
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

// The natural logarithm of x >= 1 within 2^-39 of itself, NaN of NaN: 2 artanh((m - 1) / (m + 1)) and the exponent.
MEDITOK_INLINE double log_of(double x) {
    int64_t bits;
    __builtin_memcpy(&bits, &x, sizeof(bits));
    const int64_t below = bits - 0x3fe6a09e667f3bcd;  // the bits of sqrt(1/2): m is from there to sqrt(2)
    const int64_t exponent = below >> 52;
    bits -= exponent * (int64_t{1} << 52);
    double m;
    __builtin_memcpy(&m, &bits, sizeof(m));
    const double s = (m - 1.0) / (m + 1.0), z = s * s;
    double sum = 1.0 / 13.0;
    for (int n = 11; n > 0; n -= 2) sum = sum * z + 1.0 / n;
    return 2.0 * s * sum + static_cast<double>(exponent) * kLn2 + (x - x);
}

// The row is complete: writes it, or adds it to the mean, and its lse.
template <class T>
MEDITOK_INLINE void finish_row(const AttentionParams& params, int64_t b, int64_t h, int64_t i,
                               const RowState& state, const float* sums, int64_t padded, float* mean) {
    const bool empty = state.sum == 0.0f;
    if (params.lse != nullptr) {
        const double lse = static_cast<double>(state.shift) * kLn2 + log_of(state.sum);
        params.lse[(b * params.heads + h) * params.queries + i] =
            empty ? __builtin_inff() : static_cast<float>(lse);
    }
    const float share = params.mean ? 1.0f / static_cast<float>(params.heads) : 1.0f;
    const Vec weight = fill(empty ? 0.0f : share / state.sum);
    if (params.mean) {
        for (int64_t c = 0; c < padded; c += kWidth) {
            const Vec value = empty ? fill(0.0f) : mul(load(sums + c), weight);
            store(mean + c, add(load(mean + c), value));
        }
        return;
    }
    T* out = const_cast<T*>(at<T>(params.out, params.out_strides, b, h, i));
    const int64_t stride = params.out_strides.column, width = params.width;
    for (int64_t c = 0; c < width; c += kWidth) {
        const Vec value = empty ? fill(0.0f) : mul(load(sums + c), weight);
        write(out + c * stride, stride, width - c, value);
    }
}

// Rows of the result lie a page or more apart; asked for while their weights are mixed, they are there to be written.
template <class T>
MEDITOK_INLINE void prefetch_out(const AttentionParams& params, int64_t b, int64_t h, int64_t i,
                                 int64_t rows) {
    constexpr int64_t kLine = 64 / sizeof(T);
    if (params.mean) return;
    for (int64_t r = 0; r < rows; ++r) {
        const T* out = at<T>(params.out, params.out_strides, b, h, i + r);
        for (int64_t c = 0; c < params.width; c += kLine)
            __builtin_prefetch(out + c * params.out_strides.column, 1);
    }
}

template <class T>
bool attend(const AttentionParams& params, int64_t b, int64_t h, int64_t begin, int64_t end,
            ForwardScratch& scratch) {
    const Scaling scaling(params);
    const bool causal = params.mask_kind == MaskKind::kCausal;
    const int64_t width = params.width, padded = scratch.padded;
    const int64_t keys = causal ? smaller(params.keys, end) : params.keys;
    pack_rows<kRows>(at<T>(params.q, params.q_strides, b, h, begin), params.q_strides, end - begin, width,
                     1.0f, scratch.q, padded);
    for (int64_t i = 0; i < end - begin; ++i) scratch.state[i] = RowState{-__builtin_inff(), 0.0f, 0.0f};
    for (int64_t first = 0; first < keys; first += kKeys) {
        const int64_t count = smaller(kKeys, keys - first);
        pack_panels(at<T>(params.k, params.k_strides, b, h, first), params.k_strides, count, width,
                    scaling.sign, scratch.v, scratch.k);
        const Vec check = pack_rows<1>(at<T>(params.v, params.v_strides, b, h, first), params.v_strides,
                                       count, width, 1.0f, scratch.v, padded);
        if (params.mask_kind != MaskKind::kNone && !(sum_of(check) == 0.0f)) return false;
        for (int64_t row = 0; row < end - begin; row += kRows) {
            const int64_t rows = smaller(kRows, end - begin - row);
            const int64_t last = begin + row + rows - 1, reach = attended(params, last, first, count);
            if (reach == 0) continue;
            float scale[kRows] = {};
            float* sums = scratch.sums + row * padded;
            with_rows(rows, [&](auto number) __attribute__((always_inline)) {
                constexpr int R = decltype(number)::value;
                multiply_panels<R>(scratch.q + row * padded, padded, scratch.k, width, reach, scratch.scores);
                for (int64_t r = 0; r < rows; ++r) {
                    float* scores = scratch.scores + r * kScoreStride;
                    const int64_t i = begin + row + r, valid = attended(params, i, first, count);
                    if (scaling.biased) {
                        add_bias<T>(params, b, h, i, first, count, scaling.magnitude, scratch.bias, scores);
                    }
                    scale[r] = soften(scores, valid, reach, scaling.factor, scratch.state[row + r]);
                }
                prefetch_out<T>(params, b, h, begin + row, rows);
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
