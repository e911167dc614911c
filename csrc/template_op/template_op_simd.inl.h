// The algorithm on vectors, written once; included by one file per instruction set inside an anonymous
// namespace, after it has defined Vec, kWidth, load and store. The tail is done element by element.

void copy_vectors(const float* x, float* out, int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + kWidth <= end; i += kWidth) store(out + i, load(x + i));
    for (; i < end; ++i) out[i] = x[i];
}
