// Element types, and their exact conversion to double. The half types travel as raw 16-bit patterns, so that
// no compiler extension or vendor header is needed on either side.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MEDITOK_HD __host__ __device__
#else
#define MEDITOK_HD
#endif

namespace meditok {

// Codes shared with meditok/ops/_library.py.
enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2, kFloat64 = 3 };

struct half_bits {
    uint16_t bits;
};
struct bfloat16_bits {
    uint16_t bits;
};

MEDITOK_HD inline float float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

MEDITOK_HD inline uint32_t bits_from_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

MEDITOK_HD inline double to_double(double value) {
    return value;
}
MEDITOK_HD inline double to_double(float value) {
    return static_cast<double>(value);
}
MEDITOK_HD inline double to_double(bfloat16_bits value) {
    return static_cast<double>(float_from_bits(static_cast<uint32_t>(value.bits) << 16));
}
MEDITOK_HD inline double to_double(half_bits value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t exponent = (value.bits >> 10) & 31u;
    const uint32_t fraction = value.bits & 1023u;
    if (exponent == 0) {  // zero and subnormals: fraction * 2^-24, exact in double
        const double magnitude = static_cast<double>(fraction) * 5.9604644775390625e-8;
        return sign ? -magnitude : magnitude;
    }
    const uint32_t widened =
        exponent == 31 ? 255u : exponent + 112u;  // infinities and NaNs stay what they are
    return static_cast<double>(float_from_bits(sign | (widened << 23) | (fraction << 13)));
}

// Rounding of a double to each type: to float first, then to the 16-bit type, both to nearest even, as
// torch's own conversions do.
MEDITOK_HD inline void from_double(double value, double& out) {
    out = value;
}
MEDITOK_HD inline void from_double(double value, float& out) {
    out = static_cast<float>(value);
}
MEDITOK_HD inline void from_double(double value, bfloat16_bits& out) {
    const uint32_t bits = bits_from_float(static_cast<float>(value));
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    out.bits = is_nan ? 0x7fc0u : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
MEDITOK_HD inline void from_double(double value, half_bits& out) {
    const uint32_t bits = bits_from_float(static_cast<float>(value));
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
        half = 0x7c00u;
    } else if (magnitude >= 0x38800000u) {  // normal: rebias the exponent, round 13 bits away
        const uint32_t rebiased = magnitude - 0x38000000u;
        half = (rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13;
    } else if (magnitude < 0x33000000u) {  // under half of the smallest subnormal
        half = 0;
    } else {
        const uint32_t exponent = magnitude >> 23;
        const uint32_t fraction = (magnitude & 0x7fffffu) | 0x800000u;
        const uint32_t shift = 126u - exponent;  // 14 .. 24
        const uint32_t kept = fraction >> shift;
        const uint32_t dropped = fraction & ((1u << shift) - 1u);
        const uint32_t middle = 1u << (shift - 1u);
        half = kept + (dropped > middle || (dropped == middle && (kept & 1u)) ? 1u : 0u);
    }
    out.bits = static_cast<uint16_t>(sign | half);
}

// Calls body(T{}) with the C++ type of `dtype`; the one place that lists the types.
template <class Body>
inline void for_dtype(Dtype dtype, Body&& body) {
    switch (dtype) {
        case Dtype::kFloat32: body(float{}); break;
        case Dtype::kFloat16: body(half_bits{}); break;
        case Dtype::kBfloat16: body(bfloat16_bits{}); break;
        case Dtype::kFloat64: body(double{}); break;
    }
}

// NaN and infinity have an exponent of all ones; x - x is NaN for them and 0 for everything else.
MEDITOK_HD inline bool is_finite(double value) {
    return value - value == 0.0;
}

}  // namespace meditok
