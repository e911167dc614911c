// Stands in for csrc/common/ptx.cuh: the same functions on fibers, with fragments laid out as the PTX ISA states for
// mma.m16n8k8 / m16n8k16 (.f16 operands, .f32 accumulators) and ldmatrix.m8n8.x4.
//
// Accumulation cuts, it does not round: every product and the accumulator are aligned to the largest exponent among them
// and lose what lies below emulation::accumulator_bits, then the sum is cut to as many. 24 is the least that hardware is
// known to keep; 23 is what the bounds of vq/vq_filter_half.h allow for; 0 means no loss but one rounding to float32.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtype.h"

namespace emulation {

inline int accumulator_bits = 24;

// Towards zero to a multiple of 2^(exponent + 1 - bits).
inline double cut(double value, int exponent) {
    const int shift = accumulator_bits - 1 - exponent;
    return std::ldexp(std::trunc(std::ldexp(value, shift)), -shift);
}

// a.b + c over one product's depth. Sums are exact in double: products have 22 bits.
inline float dot(const float* a, const float* b, int depth, float c) {
    if (std::isinf(c)) return c;
    double addend[17], largest = 0.0, sum = 0.0;
    for (int i = 0; i <= depth; ++i) {
        addend[i] = i < depth ? static_cast<double>(a[i]) * b[i] : c;
        largest = std::fmax(largest, std::fabs(addend[i]));
    }
    if (accumulator_bits == 0 || largest == 0.0) {
        for (int i = 0; i <= depth; ++i) sum += addend[i];
        return static_cast<float>(sum);
    }
    const int exponent = std::ilogb(largest);
    for (int i = 0; i <= depth; ++i) sum += cut(addend[i], exponent);
    return sum == 0.0 ? 0.0f : static_cast<float>(cut(sum, std::ilogb(sum)));
}

}  // namespace emulation

namespace meditok {

inline int thread_id() {
    return static_cast<int>(threadIdx.x);
}

inline float half_to_float(uint32_t bits) {
    return static_cast<float>(to_double(half_bits{static_cast<uint16_t>(bits)}));
}

inline uint32_t pack_half2(float low, float high) {
    half_bits bits[2];
    from_double(low, bits[0]);
    from_double(high, bits[1]);
    return static_cast<uint32_t>(bits[1].bits) << 16 | bits[0].bits;
}

inline float rough_sqrt(float value) {
    return sqrtf(value) * (1.0f - 0x1p-22f);
}

inline void load_matrices(uint32_t (&matrix)[4], const void* row) {
    emulation::require_aligned(row, 16);
    const int lane = thread_id() % 32;
    emulation::exchange(&row, sizeof row);
    for (int i = 0; i < 4; ++i) {
        const unsigned char* source;
        emulation::read(i * 8 + lane / 4, &source, sizeof source);
        memcpy(&matrix[i], source + lane % 4 * 4, 4);
    }
    emulation::release();
}

// d = a b + c; a_count registers of A and b_count of B: 2 and 1 for a depth of 8, 4 and 2 for 16.
inline void emulated_mma(float (&d)[4], const uint32_t* a, int a_count, const uint32_t* b,
                         const float (&c)[4]) {
    struct Fragments {
        uint32_t a[4], b[2];
    } mine{}, other;
    for (int i = 0; i < a_count; ++i) mine.a[i] = a[i];
    for (int i = 0; i < a_count / 2; ++i) mine.b[i] = b[i];
    emulation::exchange(&mine, sizeof mine);
    const int group = thread_id() % 32 / 4, pair = thread_id() % 4 * 2, depth = a_count * 4;
    float rows[2][16], columns[2][16];
    for (int k = 0; k < depth; ++k) {
        for (int i = 0; i < 2; ++i) {
            // A: row group (+ 8), column k lies with lane 4 group + k % 8 / 2, register 2 (k / 8) + i, half k % 2.
            emulation::read(group * 4 + k % 8 / 2, &other, sizeof other);
            rows[i][k] = half_to_float(other.a[k / 8 * 2 + i] >> (k % 2 * 16));
            // B: row k, column n lies with lane 4 n + k % 8 / 2, register k / 8, half k % 2.
            emulation::read((pair + i) * 4 + k % 8 / 2, &other, sizeof other);
            columns[i][k] = half_to_float(other.b[k / 8] >> (k % 2 * 16));
        }
    }
    emulation::release();
    for (int i = 0; i < 4; ++i) d[i] = emulation::dot(rows[i / 2], columns[i % 2], depth, c[i]);
}

inline void mma_k8(float (&d)[4], const uint32_t* a, uint32_t b, const float (&c)[4]) {
    emulated_mma(d, a, 2, &b, c);
}

inline void mma_k16(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1, const float (&c)[4]) {
    const uint32_t b[2] = {b0, b1};
    emulated_mma(d, a, 4, b, c);
}

inline float max_nonnegative(float best, float a, float b) {
    const int x = __float_as_int(a), y = __float_as_int(b), z = __float_as_int(best);
    return __int_as_float(x > y ? (x > z ? x : z) : (y > z ? y : z));
}

}  // namespace meditok
