// The loops of vq_train_rows.h on vectors of four doubles, which the compiler maps to what the instruction set has;
// included by one file per instruction set inside an anonymous namespace (see common/simd.h).

constexpr double kNormFloor = 1e-12;

typedef double Four __attribute__((vector_size(32)));
typedef float FourFloats __attribute__((vector_size(16)));
typedef int64_t Lanes __attribute__((vector_size(32)));

MEDITOK_INLINE Four load(const double* p) {
    Four v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
MEDITOK_INLINE Four widen(FourFloats v) {
#if defined(__AVX__)  // GCC makes five instructions of the other line
    return (Four)_mm256_cvtps_pd((__m128)v);
#else
    return __builtin_convertvector(v, Four);
#endif
}
MEDITOK_INLINE Four load(const float* p) {
    FourFloats v;
    __builtin_memcpy(&v, p, sizeof v);
    return widen(v);
}
MEDITOK_INLINE void store(double* p, Four v) {
    __builtin_memcpy(p, &v, sizeof v);
}
MEDITOK_INLINE void store(float* p, Four v) {
    const FourFloats narrow = __builtin_convertvector(v, FourFloats);
    __builtin_memcpy(p, &narrow, sizeof narrow);
}
// The last 1 to 3 elements of a row, followed by zeros.
template <class F>
MEDITOK_INLINE Four load_part(const F* p, int64_t count) {
    Four v = {0.0, 0.0, 0.0, 0.0};
    for (int64_t i = 0; i < count; ++i) v[i] = static_cast<double>(p[i]);
    return v;
}
template <class F>
MEDITOK_INLINE void store_part(F* p, Four v, int64_t count) {
    for (int64_t i = 0; i < count; ++i) p[i] = static_cast<F>(v[i]);
}
MEDITOK_INLINE Four fill(double a) {
    return Four{a, a, a, a};
}

// v rounded to F.
template <class F>
MEDITOK_INLINE Four rounded(Four v) {
    return sizeof(F) == sizeof(double) ? v : widen(__builtin_convertvector(v, FourFloats));
}

// Eight partial sums.
struct Sum {
    Four low = {0.0, 0.0, 0.0, 0.0}, high = {0.0, 0.0, 0.0, 0.0};

    MEDITOK_INLINE void add(int64_t i, Four v) {
        if ((i & 4) == 0) {
            low += v;
        } else {
            high += v;
        }
    }
    MEDITOK_INLINE double total() const {
        const Four v = low + high;
        const Four pairs = v + __builtin_shuffle(v, Lanes{2, 3, 0, 1});
        return pairs[0] + pairs[1];
    }
};

// Calls body(i, at) for i = 0, 4, ...: at(p) loads p[i .. i + 3], zeros past the width; at.put(p, v) stores.
template <class F>
struct Whole {
    int64_t i;
    MEDITOK_INLINE Four operator()(const F* p) const { return load(p + i); }
    MEDITOK_INLINE void put(F* p, Four v) const { store(p + i, v); }
};
template <class F>
struct Part {
    int64_t i, count;
    MEDITOK_INLINE Four operator()(const F* p) const { return load_part(p + i, count); }
    MEDITOK_INLINE void put(F* p, Four v) const { store_part(p + i, v, count); }
};
template <class F, class Body>
MEDITOK_INLINE void columns(int64_t width, Body body) {
    int64_t i = 0;
    for (; i + 8 <= width; i += 8) {
        body(0, Whole<F>{i});
        body(4, Whole<F>{i + 4});
    }
    if (i + 4 <= width) {
        body(0, Whole<F>{i});
        if (i + 4 < width) body(4, Part<F>{i + 4, width - i - 4});
    } else if (i < width) {
        body(0, Part<F>{i, width - i});
    }
}

template <class F>
MEDITOK_INLINE double square_sum(const F* x, int64_t width) {
    Sum sum;
    columns<F>(width, [&](int64_t i, auto at) __attribute__((always_inline)) {
        const Four v = at(x);
        sum.add(i, v * v);
    });
    return sum.total();
}

template <class F>
double dot(const F* a, const F* b, int64_t width) {
    Sum sum;
    columns<F>(width, [&](int64_t i, auto at) __attribute__((always_inline)) { sum.add(i, at(a) * at(b)); });
    return sum.total();
}

template <class F>
double distance(const F* a, const F* b, int64_t width) {
    Sum sum;
    columns<F>(width, [&](int64_t i, auto at) __attribute__((always_inline)) {
        const Four difference = at(a) - at(b);
        sum.add(i, difference * difference);
    });
    return sum.total();
}

MEDITOK_INLINE double floored(double norm) {
    return norm < kNormFloor ? kNormFloor : norm;  // NaN stays
}

// W: the width where it is known at compile time, else 0. Four rows share a vector.
template <class F, int W>
void canonical_norm(const F* const* code, int64_t rows, int64_t given, double* norms) {
    const int64_t width = W > 0 ? W : given;
    for (int64_t row = 0; row < rows; row += 4) {
        const F* of[4];
        for (int64_t i = 0; i < 4; ++i) of[i] = code[row + i < rows ? row + i : row];
        Four sum = {0.0, 0.0, 0.0, 0.0};
        for (int64_t i = 0; i < width; ++i) {
            const F column[4] = {of[0][i], of[1][i], of[2][i], of[3][i]};
            const Four v = load(column);
            sum += v * v;
        }
        for (int64_t i = 0; i < 4 && row + i < rows; ++i) norms[row + i] = floored(__builtin_sqrt(sum[i]));
    }
}

template <class F, int W>
void divide(const F* const* code, const double* norm, int64_t rows, int64_t given, F* out,
            int64_t out_stride) {
    const int64_t width = W > 0 ? W : given;
    for (int64_t row = 0; row < rows; ++row) {
        const F* from = code[row];
        F* to = out + row * out_stride;
        if (norm == nullptr) {
            columns<F>(width, [&](int64_t, auto at) __attribute__((always_inline)) { at.put(to, at(from)); });
            continue;
        }
        const Four length = fill(norm[row]);
        columns<F>(width,
                   [&](int64_t, auto at) __attribute__((always_inline)) { at.put(to, at(from) / length); });
    }
}

template <class F, int W>
void error(const F* x, int64_t x_stride, const F* z, int64_t z_stride, int64_t rows, int64_t given,
           bool cosine, double* errors, int64_t errors_stride) {
    const int64_t width = W > 0 ? W : given;
    double scales[kRowsAtOnce];  // of all rows first, as in `backward`
    for (int64_t row = 0; row < rows; ++row) {
        scales[row] = cosine ? square_sum<F>(x + row * x_stride, width) : 1.0;
    }
    for (int64_t row = 0; row < rows; ++row) scales[row] = 1.0 / floored(__builtin_sqrt(scales[row]));
    for (int64_t row = 0; row < rows; ++row) {
        const F* from = x + row * x_stride;
        const F* code = z + row * z_stride;
        const Four scale = fill(scales[row]);
        Sum sum;
        columns<F>(width, [&](int64_t i, auto at) __attribute__((always_inline)) {
            const Four difference = at(from) * scale - at(code);
            sum.add(i, difference * difference);
        });
        errors[row * errors_stride] = sum.total();
    }
}

// The rotation trick turns the gradient g into s (g - 2 r (r.g) + 2 p (q.g)) with p, q the unit vectors of x_hat
// and e, r that of p + q, and s = |e| / |x_hat|: a combination of g, x_hat and e with these factors.
struct Turn {
    double grad, hat, code;
};

template <class F>
MEDITOK_INLINE Turn turn_of(const F* x, Four scale, const F* code, const F* grad, int64_t width) {
    Sum hat_square, code_square, hat_grad, code_grad;
    columns<F>(width, [&](int64_t i, auto at) __attribute__((always_inline)) {
        const Four hat = at(x) * scale, e = at(code), g = at(grad);
        hat_square.add(i, hat * hat);
        code_square.add(i, e * e);
        hat_grad.add(i, hat * g);
        code_grad.add(i, e * g);
    });
    const double hat_norm = floored(__builtin_sqrt(hat_square.total()));
    const double code_norm = floored(__builtin_sqrt(code_square.total()));
    const Four hat_unit = fill(1.0 / hat_norm), code_unit = fill(1.0 / code_norm);
    Sum middle;
    columns<F>(width, [&](int64_t i, auto at) __attribute__((always_inline)) {
        const Four r = at(x) * scale * hat_unit + at(code) * code_unit;
        middle.add(i, r * r);
    });
    const double middle_norm = floored(__builtin_sqrt(middle.total()));
    const double p_g = hat_grad.total() / hat_norm, q_g = code_grad.total() / code_norm;
    const double stretch = code_norm / hat_norm;
    const double mirror = 2.0 * (p_g + q_g) / middle_norm / middle_norm;  // 2 (r.g) / |p + q|
    return Turn{stretch, stretch * (2.0 * q_g - mirror) / hat_norm, -stretch * mirror / code_norm};
}

// sum += code - x scale, the difference and the sum rounded to F.
template <class F>
MEDITOK_INLINE void add_difference(F* sum, const F* x, Four scale, const F* code, int64_t width) {
    columns<F>(width, [&](int64_t, auto at) __attribute__((always_inline)) {
        at.put(sum, at(sum) + rounded<F>(at(code) - at(x) * scale));
    });
}

// The same without a scale: then the difference is that of two F, and arithmetic in F rounds it alike.
template <class F>
MEDITOK_INLINE void add_difference(F* sum, const F* x, const F* code, int64_t width) {
    for (int64_t i = 0; i < width; ++i) sum[i] += code[i] - x[i];
}

template <class F, int W>
void backward(const BackwardRows<F>& block) {
    const int64_t width = W > 0 ? W : block.width;
    // Norms first: so the square root and the division of one row need not wait for those of the row before.
    double norms[kRowsAtOnce], inverses[kRowsAtOnce];
    for (int64_t row = 0; row < block.rows; ++row) {
        norms[row] = block.cosine ? square_sum<F>(block.x + row * block.x_stride, width) : 1.0;
    }
    for (int64_t row = 0; row < block.rows; ++row) {
        norms[row] = __builtin_sqrt(norms[row]);
        inverses[row] = 1.0 / floored(norms[row]);
    }
    for (int64_t row = 0; row < block.rows; ++row) {
        const F* x = block.x + row * block.x_stride;
        const F* code = block.code[row];
        const F* grad = block.grad + row * block.grad_stride;
        F* out = block.out + row * block.out_stride;
        if (code == nullptr) {  // its inverse is never read
            for (int64_t i = 0; i < width; ++i) out[i] = F(0);
            continue;
        }
        if (block.inverse != nullptr) block.inverse[row * block.inverse_stride] = inverses[row];
        const Four scale = fill(inverses[row]);
        if (block.sums != nullptr && block.sums[row] != nullptr) {
            if (block.cosine) {
                add_difference<F>(block.sums[row], x, scale, code, width);
            } else {
                add_difference<F>(block.sums[row], x, code, width);
            }
        }
        Turn turn{1.0, 0.0, 0.0};
        if (block.rotation) turn = turn_of<F>(x, scale, code, grad, width);
        const Four of_grad = fill(turn.grad), of_hat = fill(turn.hat + block.step),
                   of_code = fill(turn.code - block.step);
        if (!block.cosine) {
            columns<F>(width, [&](int64_t, auto at) __attribute__((always_inline)) {
                at.put(out, of_grad * at(grad) + (of_hat * at(x) + of_code * at(code)));
            });
            continue;
        }
        Sum along;
        columns<F>(width, [&](int64_t i, auto at) __attribute__((always_inline)) {
            const Four hat = at(x) * scale;
            along.add(i, hat * (of_grad * at(grad) + (of_hat * hat + of_code * at(code))));
        });
        const Four shift = fill(norms[row] < kNormFloor ? 0.0 : along.total());
        columns<F>(width, [&](int64_t, auto at) __attribute__((always_inline)) {
            const Four hat = at(x) * scale;
            const Four g = of_grad * at(grad) + (of_hat * hat + of_code * at(code));
            at.put(out, (g - hat * shift) * scale);
        });
    }
}

template <class F, int W>
void normalise(const F* const* from, int64_t rows, int64_t given, F* const* to, double* norms) {
    const int64_t width = W > 0 ? W : given;
    for (int64_t row = 0; row < rows; ++row) {
        norms[row] = floored(__builtin_sqrt(square_sum<F>(from[row], width)));
        const Four length = fill(norms[row]);
        columns<F>(width, [&](int64_t, auto at)
                              __attribute__((always_inline)) { at.put(to[row], at(from[row]) / length); });
    }
}

template <class F, int W>
void add(const F* const* x, const double* scale, int64_t rows, int64_t given, const F* code, F* sum) {
    const int64_t width = W > 0 ? W : given;
    for (int64_t row = 0; row < rows; ++row) {
        if (scale == nullptr) {
            add_difference<F>(sum, x[row], code, width);
        } else {
            add_difference<F>(sum, x[row], fill(scale[row]), code, width);
        }
    }
}

template <class F, int W>
void scale(F* const* sums, double factor, const F* const* units, const double* norms, int64_t rows,
           int64_t given) {
    const int64_t width = W > 0 ? W : given;
    for (int64_t row = 0; row < rows; ++row) {
        F* sum = sums[row];
        if (units == nullptr) {
            columns<F>(width, [&](int64_t, auto at)
                                  __attribute__((always_inline)) { at.put(sum, at(sum) * fill(factor)); });
            continue;
        }
        const F* unit = units[row];
        const Four length = fill(factor / norms[row]);
        Sum along;
        columns<F>(width, [&](int64_t i, auto at)
                              __attribute__((always_inline)) { along.add(i, at(sum) * at(unit)); });
        const Four shift = fill(norms[row] > kNormFloor ? along.total() : 0.0);
        columns<F>(width, [&](int64_t, auto at) __attribute__((always_inline)) {
            at.put(sum, (at(sum) - at(unit) * shift) * length);
        });
    }
}

// A width of 8 is worth a loop without counters.
template <class F>
RowKernels<F> row_kernels() {
    return RowKernels<F>{
        [](const F* x, int64_t width) { return square_sum<F>(x, width); },
        dot<F>,
        distance<F>,
        [](const F* const* code, int64_t rows, int64_t width, double* norms) {
            width == 8 ? canonical_norm<F, 8>(code, rows, width, norms)
                       : canonical_norm<F, 0>(code, rows, width, norms);
        },
        [](const F* const* code, const double* norm, int64_t rows, int64_t width, F* out,
           int64_t out_stride) {
            width == 8 ? divide<F, 8>(code, norm, rows, width, out, out_stride)
                       : divide<F, 0>(code, norm, rows, width, out, out_stride);
        },
        [](const F* x, int64_t x_stride, const F* z, int64_t z_stride, int64_t rows, int64_t width,
           bool cosine, double* errors, int64_t errors_stride) {
            width == 8 ? error<F, 8>(x, x_stride, z, z_stride, rows, width, cosine, errors, errors_stride)
                       : error<F, 0>(x, x_stride, z, z_stride, rows, width, cosine, errors, errors_stride);
        },
        [](const BackwardRows<F>& block) {
            block.width == 8 ? backward<F, 8>(block) : backward<F, 0>(block);
        },
        [](const F* const* from, int64_t rows, int64_t width, F* const* to, double* norms) {
            width == 8 ? normalise<F, 8>(from, rows, width, to, norms)
                       : normalise<F, 0>(from, rows, width, to, norms);
        },
        [](const F* const* x, const double* scale, int64_t rows, int64_t width, const F* code, F* sum) {
            width == 8 ? add<F, 8>(x, scale, rows, width, code, sum)
                       : add<F, 0>(x, scale, rows, width, code, sum);
        },
        [](F* const* sum, double factor, const F* const* unit, const double* norm, int64_t rows,
           int64_t width) {
            width == 8 ? scale<F, 8>(sum, factor, unit, norm, rows, width)
                       : scale<F, 0>(sum, factor, unit, norm, rows, width);
        }};
}
