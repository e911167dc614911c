// The algorithm on vectors, written once; included inside an anonymous namespace after the vector type of
// common/vector_*.inl.h, with kTileRows set.
//
// A tile of kTileRows rows meets a panel of 32 columns, 2 kWidth columns at a time, with all sums in registers over the
// whole width: per k two loads of weights and one broadcast a row feed 2 kTileRows multiply-adds, so that both ports
// multiply every cycle. Tiles lie as (width / 16, rows, 16): addresses inside are constants, and a row is written in
// vectors without a transposition.

constexpr int64_t kBlock = 16;  // floats of a row that lie together in a tile
constexpr int64_t kSpan = 256;  // values of k added up in one chain; chains are then added, which rounds less
constexpr int64_t kAhead = 16;  // values of k whose weights are asked for before they are needed
constexpr int64_t kPasses = kPanel / (2 * kWidth);
static_assert(kPanel % (2 * kWidth) == 0, "whole passes over a panel");
static_assert(kBlock % kWidth == 0, "whole vectors in a block");
static_assert(kSpan % kBlock == 0, "whole blocks in a chain");

MEDITOK_INLINE int64_t padded(int64_t width) {
    return (width + kBlock - 1) / kBlock * kBlock;
}

// ---- weights ----------------------------------------------------------------------------------------------

// kWidth rows of a (rows, width) matrix from `row` on -> columns `to` to `to` + kWidth of the panel.
void pack_rows(const float* weight, int64_t row, int64_t rows, int64_t width, float* packed, int64_t to) {
    const int64_t whole = width / kWidth * kWidth;
    for (int64_t k = 0; k < padded(width); k += kWidth) {
        Vec block[kWidth];
        for (int64_t i = 0; i < kWidth; ++i) {
            const float* from = weight + (row + i) * width + k;
            if (row + i >= rows || k >= width) {
                block[i] = fill(0.0f);
            } else {
                block[i] = k < whole ? load(from) : load_first(from, width - whole);
            }
        }
        transpose(block);
        for (int64_t i = 0; i < kWidth; ++i) store(packed + (k + i) * kPanel + to, block[i]);
    }
}

void pack_panel(const LinearParams& params, int64_t panel, float* packed) {
    const bool gated = params.activation == Activation::kGeglu;
    const int64_t half = kPanel / 2;
    for (int64_t to = 0; to < kPanel; to += kWidth) {
        const float* weight = gated && to >= half ? params.gate_weight : params.weight;
        const int64_t row = gated ? panel * half + to % half : panel * kPanel + to;
        pack_rows(weight, row, params.columns, params.width, packed, to);
    }
}

// ---- rows -------------------------------------------------------------------------------------------------

// One row of a tile, padded with zeros: floats k to k + kWidth lie at `row` + k / 16 * 16 kTileRows + k % 16.
MEDITOK_INLINE float* at(float* row, int64_t k) {
    return row + k / kBlock * (kBlock * kTileRows) + k % kBlock;
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

void prepare_tile(const LinearParams& params, int64_t row, int64_t count, float* tile) {
    const int64_t width = params.width, whole = width / kWidth * kWidth;
    for (int64_t r = 0; r < kTileRows; ++r) {
        float* to = tile + r * kBlock;
        if (r >= count) continue;  // never read
        const float* x = params.x + (row + r) * params.x_stride;
        for (int64_t k = 0; k < whole; k += kWidth) store(at(to, k), load(x + k));
        for (int64_t k = whole; k < padded(width); k += kWidth) {
            store(at(to, k), k < width ? load_first(x + k, width - whole) : fill(0.0f));
        }
        for (int i = 0; i < params.norms; ++i) normalise(to, width, params.norm[i]);
    }
}

// ---- products ---------------------------------------------------------------------------------------------

// Products of kRows rows and 2 kWidth columns over `width` values of k, added to sums (kRows, kPanel). On the way 32
// floats a block are fetched from `later` on into the second cache: weights that are packed next, whose way from memory
// hides behind this.
template <int kRows>
void multiply(const float* tile, const float* packed, int64_t width, const float* later, float* sums) {
    Vec left[kRows], right[kRows];
    for (int r = 0; r < kRows; ++r) left[r] = right[r] = fill(0.0f);
    for (int64_t block = 0; block < width; block += kBlock) {
        __builtin_prefetch(later + 2 * block, 0, 2);
        __builtin_prefetch(later + 2 * block + kBlock, 0, 2);
        for (int64_t k = 0; k < kBlock; ++k) {
            const Vec a = load(packed), b = load(packed + kWidth);
            __builtin_prefetch(packed + kAhead * kPanel);
            __builtin_prefetch(packed + kAhead * kPanel + kWidth);
            __builtin_prefetch(tile + kBlock * (kTileRows + k));
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
                const Vec x = fill(tile[r * kBlock + k]);
                left[r] = fma(x, a, left[r]);
                right[r] = fma(x, b, right[r]);
            }
            packed += kPanel;
        }
        tile += kBlock * kTileRows;
    }
    for (int r = 0; r < kRows; ++r) {
        float* to = sums + r * kPanel;
        store(to, add(load(to), left[r]));
        store(to + kWidth, add(load(to + kWidth), right[r]));
    }
}

using Multiply = void (*)(const float* tile, const float* packed, int64_t width, const float* later,
                          float* sums);

template <int... kRows>
struct Counts {};
template <int kCount, int... kRows>
struct UpTo : UpTo<kCount - 1, kCount, kRows...> {};
template <int... kRows>
struct UpTo<0, kRows...> {
    using Type = Counts<kRows...>;
};

template <int... kRows>
MEDITOK_INLINE Multiply choose(int64_t count, Counts<kRows...>) {
    constexpr Multiply table[] = {multiply<kRows>...};
    return table[count - 1];
}

// ---- what follows the sums --------------------------------------------------------------------------------

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

void run_tile(const LinearParams& params, int64_t row, int64_t count, const float* tile, int64_t panel,
              const float* packed, const float* later) {
    alignas(64) float sums[kTileRows * kPanel] = {};
    const int64_t width = padded(params.width);
    const Multiply multiply_rows = choose(count, typename UpTo<kTileRows>::Type{});
    for (int64_t k = 0; k < width; k += kSpan) {
        const int64_t span = k + kSpan < width ? kSpan : width - k;
        for (int64_t pass = 0; pass < kPasses; ++pass) {
            multiply_rows(tile + k * kTileRows, packed + k * kPanel + pass * 2 * kWidth, span, later + 2 * k,
                          sums + pass * 2 * kWidth);
        }
    }
    for (int64_t r = 0; r < count; ++r) finish(params, row + r, panel, sums + r * kPanel);
}
