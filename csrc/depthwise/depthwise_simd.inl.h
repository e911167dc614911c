// The algorithm on vectors, written once; included inside an anonymous namespace after common/vector_*.inl.h and
// vector_math.inl.h. Channels run innermost: every stream is contiguous, and three rows of pixels stay in the cache
// from one row of outputs to the next, so that memory is read once and written once.

struct Taps {
    const float* x[9];     // pixels under the taps that lie inside, first channel
    const float* taps[9];  // their taps
    int count;
};

MEDITOK_INLINE Taps taps_of(const DepthwiseParams& params, int64_t image, int64_t y, int64_t x) {
    Taps found;
    found.count = 0;
    for (int64_t tap = 0; tap < 9; ++tap) {
        const int64_t from_y = y + tap / 3 - 1, from_x = x + tap % 3 - 1;
        if (from_y < 0 || from_y >= params.height || from_x < 0 || from_x >= params.width) continue;
        const int64_t pixel = (image * params.height + from_y) * params.width + from_x;
        found.x[found.count] = params.x + pixel * params.channels;
        found.taps[found.count++] = params.taps + tap * params.channels;
    }
    return found;
}

// kCount taps where it is not 0, else as many as there are.
template <int kCount>
MEDITOK_INLINE void convolve_pixel(const DepthwiseParams& params, const Taps& taps, float* out) {
    const int count = kCount == 0 ? taps.count : kCount;
    const int64_t whole = params.channels / kWidth * kWidth, rest = params.channels - whole;
    for (int64_t c = 0; c < whole; c += kWidth) {
        Vec sum = load(params.bias + c);
        for (int i = 0; i < count; ++i) sum = fma(load(taps.x[i] + c), load(taps.taps[i] + c), sum);
        store(out + c, gelu(sum));
    }
    if (rest != 0) {
        Vec sum = load_first(params.bias + whole, rest);
        for (int i = 0; i < count; ++i) {
            sum = fma(load_first(taps.x[i] + whole, rest), load_first(taps.taps[i] + whole, rest), sum);
        }
        store_first(out + whole, gelu(sum), rest);
    }
}

void convolve_row(const DepthwiseParams& params, int64_t row) {
    const int64_t out_height = (params.height + params.stride - 1) / params.stride;
    const int64_t out_width = (params.width + params.stride - 1) / params.stride;
    const int64_t image = row / out_height, y = row % out_height * params.stride;
    for (int64_t column = 0; column < out_width; ++column) {
        const Taps taps = taps_of(params, image, y, column * params.stride);
        float* out = params.out + (row * out_width + column) * params.channels;
        if (taps.count == 9) {
            convolve_pixel<9>(params, taps, out);
        } else {
            convolve_pixel<0>(params, taps, out);
        }
    }
}
