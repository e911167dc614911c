// Elementary functions on vectors of floats, written once against the primitives of vector_avx2.inl.h or
// vector_avx512.inl.h and included after one of them. Polynomials are least-squares fits reweighted until the largest
// error stopped falling; their errors below are before rounding to float.

// 2^t, to 2e-9 relative; t is clamped to [-126, 126].
MEDITOK_INLINE Vec exp2(Vec t) {
    t = min(max(t, fill(-126.0f)), fill(126.0f));
    const Vec whole = round(t), r = sub(t, whole);
    Vec p = fill(1.5478018e-4f);
    p = fma(p, r, fill(1.34004315e-3f));
    p = fma(p, r, fill(9.61799454e-3f));
    p = fma(p, r, fill(5.55032715e-2f));
    p = fma(p, r, fill(2.40226522e-1f));
    p = fma(p, r, fill(6.93147182e-1f));
    return scale(fma(p, r, fill(1.0f)), whole);
}

// erf(z): z p(z^2) inside |z| < 1, to 1e-9 of erf(z)/z; outside 1 - 2^-q(|z|), to 1e-9.
MEDITOK_INLINE Vec erf(Vec z) {
    const Vec a = min(abs(z), fill(4.0f)), t = mul(a, a);
    Vec p = fill(7.8891193e-5f);
    p = fma(p, t, fill(-8.02084105e-4f));
    p = fma(p, t, fill(5.18953521e-3f));
    p = fma(p, t, fill(-2.68544443e-2f));
    p = fma(p, t, fill(1.12836003e-1f));
    p = fma(p, t, fill(-3.7612626e-1f));
    p = mul(fma(p, t, fill(1.12837911f)), a);
    Vec q = fill(-2.67727970e-4f);
    q = fma(q, a, fill(4.24096920e-3f));
    q = fma(q, a, fill(-3.14584710e-2f));
    q = fma(q, a, fill(1.48651600e-1f));
    q = fma(q, a, fill(9.20764923e-1f));
    q = fma(q, a, fill(1.62597513f));
    q = fma(q, a, fill(5.10294107e-4f));
    const Vec tail = sub(fill(1.0f), exp2(sub(fill(0.0f), q)));
    return copy_sign(where_less(a, fill(1.0f), p, tail), z);
}

// x (1 + erf(x / sqrt(2))) / 2
MEDITOK_INLINE Vec gelu(Vec x) {
    return mul(mul(x, fill(0.5f)), add(fill(1.0f), erf(mul(x, fill(0.707106781f)))));
}

// x (1 + tanh(u)) / 2 = x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3); the constant is -2 sqrt(2 / pi) / ln 2.
MEDITOK_INLINE Vec gelu_tanh(Vec x) {
    const Vec u = mul(fma(mul(x, x), mul(x, fill(0.044715f)), x), fill(-2.30220819f));
    return div(x, add(fill(1.0f), exp2(u)));
}
