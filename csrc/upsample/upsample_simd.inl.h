// The two passes on vectors, written once; included inside an anonymous namespace after common/vector_*.inl.h and
// vector_math.inl.h. Both are bound by memory: every stream is contiguous, and a pixel stays in the first cache between
// its sum, its norm and its GELU.

MEDITOK_INLINE Vec load_some(const float* p, int64_t left) {
    return left < kWidth ? load_first(p, left) : load(p);
}
MEDITOK_INLINE void store_some(float* p, Vec v, int64_t left) {
    if (left < kWidth) {
        store_first(p, v, left);
    } else {
        store(p, v);
    }
}

void subtract(const float* a, const float* b, int64_t count, float* out) {
    const Vec zero = fill(0.0f);
    for (int64_t i = 0; i < count; i += kWidth) {
        const int64_t left = count - i;
        store_some(
            out + i,
            sub(a == nullptr ? zero : load_some(a + i, left), b == nullptr ? zero : load_some(b + i, left)),
            left);
    }
}

void pixel(const GatherParams& params, const float* const* parts, float* out) {
    const int64_t channels = params.channels;
    Vec total = fill(0.0f);
    for (int64_t c = 0; c < channels; c += kWidth) {
        const int64_t left = channels - c;
        Vec value = add(load_some(parts[0] + c, left), load_some(parts[1] + c, left));
        value = add(add(value, load_some(parts[2] + c, left)), load_some(parts[3] + c, left));
        total = add(total, value);  // zeros after the last
        store_some(out + c, value, left);
    }
    if (params.gain == nullptr) return;
    const float average = sum_of(total) / static_cast<float>(channels);
    const Vec mean = fill(average);
    const int64_t whole = channels / kWidth * kWidth;
    Vec squares = fill(0.0f);
    for (int64_t c = 0; c < whole; c += kWidth) {
        const Vec centred = sub(load(out + c), mean);
        squares = fma(centred, centred, squares);
    }
    float variance = sum_of(squares);
    for (int64_t c = whole; c < channels; ++c) {
        const float centred = out[c] - average;
        variance += centred * centred;
    }
    const Vec factor = fill(1.0f / __builtin_sqrtf(variance / static_cast<float>(channels) + params.eps));
    for (int64_t c = 0; c < channels; c += kWidth) {
        const int64_t left = channels - c;
        const Vec centred = mul(sub(load_some(out + c, left), mean), factor);
        const Vec value = fma(centred, load_some(params.gain + c, left), load_some(params.bias + c, left));
        store_some(out + c, gelu(value), left);
    }
}
