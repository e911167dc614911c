// What every vector kernel does to a row before and after its products, written once; included inside an anonymous
// namespace after common/vector_*.inl.h and vector_math.inl.h, with kTileRows set: rows of a tile lie interleaved, 16
// floats of one after 16 of the other.

constexpr int64_t kBlock = 16;  // floats of a row that lie together in a tile
static_assert(kBlock % kWidth == 0 && kPad % kBlock == 0, "whole vectors in a block, whole blocks in a row");

// Floats k to k + kWidth of a row of a tile lie at `row` + k / 16 * 16 kTileRows + k % 16.
MEDITOK_INLINE float* at(float* row, int64_t k) {
    return row + k / kBlock * (kBlock * kTileRows) + k % kBlock;
}

MEDITOK_INLINE int64_t padded_width(const LinearParams& params) {
    return (params.width + kPad - 1) / kPad * kPad;
}

void normalise(float* row, int64_t width, const Norm& norm) {
    const int64_t whole = width / kWidth * kWidth, rest = width - whole;
    Vec total = fill(0.0f);
    for (int64_t k = 0; k < width; k += kWidth) total = add(total, load(at(row, k)));  // zeros after the last
    const Vec mean = fill(sum_of(total) / static_cast<float>(width));
    Vec squares = fill(0.0f);
    for (int64_t k = 0; k < whole; k += kWidth) {
        const Vec centred = sub(load(at(row, k)), mean);
        squares = fma(centred, centred, squares);
    }
    if (rest != 0) {
        float* last = at(row, whole);
        store_first(last, sub(load(last), mean), rest);
        const Vec centred = load(last);  // still zeros after the last
        squares = fma(centred, centred, squares);
        store_first(last, add(centred, mean), rest);
    }
    const float variance = sum_of(squares) / static_cast<float>(width);
    const Vec factor = fill(1.0f / __builtin_sqrtf(variance + norm.eps));
    for (int64_t k = 0; k < whole; k += kWidth) {
        const Vec centred = mul(sub(load(at(row, k)), mean), factor);
        store(at(row, k), fma(centred, load(norm.gain + k), load(norm.bias + k)));
    }
    if (rest != 0) {
        const Vec centred = mul(sub(load(at(row, whole)), mean), factor);
        const Vec gain = load_first(norm.gain + whole, rest), bias = load_first(norm.bias + whole, rest);
        store_first(at(row, whole), fma(centred, gain, bias), rest);
    }
}

// Row `row` of x, normalised, -> `to`, padded with zeros.
MEDITOK_INLINE void prepare_row(const LinearParams& params, int64_t row, float* to) {
    const int64_t width = params.width, whole = width / kWidth * kWidth;
    const float* x = params.x + row * params.x_stride;
    for (int64_t k = 0; k < whole; k += kWidth) store(at(to, k), load(x + k));
    for (int64_t k = whole; k < padded_width(params); k += kWidth) {
        store(at(to, k), k < width ? load_first(x + k, width - whole) : fill(0.0f));
    }
    for (int i = 0; i < params.norms; ++i) normalise(to, width, params.norm[i]);
}

// Where row i < kPanel of panel `panel` begins in the weights: rows 0 to 15 are outputs and 16 to 31 their gates for
// geglu. Null past the last one.
MEDITOK_INLINE const float* weight_row(const LinearParams& params, int64_t panel, int64_t i) {
    const bool gated = params.activation == Activation::kGeglu;
    const int64_t half = kPanel / 2, row = gated ? panel * half + i % half : panel * kPanel + i;
    if (row >= params.columns) return nullptr;
    return (gated && i >= half ? params.gate_weight : params.weight) + row * params.width;
}

MEDITOK_INLINE Vec load_up_to(const float* p, int64_t count) {
    return count < kWidth ? load_first(p, count) : load(p);
}

MEDITOK_INLINE void finish(const LinearParams& params, int64_t row, int64_t panel, const float* sums) {
    const bool gated = params.activation == Activation::kGeglu;
    const int64_t step = gated ? kPanel / 2 : kPanel, begin = panel * step;
    const int64_t end = begin + step < params.columns ? begin + step : params.columns;
    const float* residual =
        params.residual == nullptr ? nullptr : params.residual + row * params.residual_stride;
    for (int64_t column = begin; column < end; column += kWidth, sums += kWidth) {
        const int64_t left = end - column;
        Vec value = load(sums);
        if (params.bias != nullptr) value = add(value, load_up_to(params.bias + column, left));
        if (params.activation == Activation::kGelu) value = gelu(value);
        if (gated) {
            Vec gate = load(sums + kPanel / 2);
            if (params.gate_bias != nullptr) gate = add(gate, load_up_to(params.gate_bias + column, left));
            value = mul(gelu_tanh(value), gate);
        }
        if (residual != nullptr) value = add(value, load_up_to(residual + column, left));
        float* out = params.out + row * params.columns + column;
        if (left < kWidth) {
            store_first(out, value, left);
        } else {
            store(out, value);
        }
    }
}
