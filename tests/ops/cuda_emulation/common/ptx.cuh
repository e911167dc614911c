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

#define MEDITOK_ARCHITECTURE 100

namespace emulation {

inline int accumulator_bits = 24;

// 2^exponent, for exponents of doubles that are neither subnormal nor infinite.
inline double power(int exponent) {
    const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
    double value;
    return memcpy(&value, &bits, sizeof value), value;
}

inline int exponent_of(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return static_cast<int>(bits >> 52 & 2047) - 1023;
}

// Towards zero to a multiple of `unit`, a power of two.
inline double cut(double value, double unit, double per_unit) {
    return std::trunc(value * per_unit) * unit;
}

// a.b + c over one product's depth. Sums are exact in double: products have 22 bits at most.
inline float dot(const float* a, const float* b, int depth, float c) {
    if (std::isinf(c)) return c;
    double addend[17], largest = 0.0, sum = 0.0;
    bool finite = true;
    for (int i = 0; i <= depth; ++i) {
        addend[i] = i < depth ? static_cast<double>(a[i]) * b[i] : c;
        largest = std::fabs(addend[i]) > largest ? std::fabs(addend[i]) : largest;
        finite = finite && std::isfinite(addend[i]);
    }
    if (accumulator_bits == 0 || largest == 0.0 || !finite) {
        for (int i = 0; i <= depth; ++i) sum += addend[i];
        return static_cast<float>(sum);
    }
    const int last = exponent_of(largest) + 1 - accumulator_bits;
    const double unit = power(last), per_unit = power(-last);
    for (int i = 0; i <= depth; ++i) sum += cut(addend[i], unit, per_unit);
    if (sum == 0.0) return 0.0f;
    const int end = exponent_of(sum) + 1 - accumulator_bits;
    return static_cast<float>(cut(sum, power(end), power(-end)));
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

inline float bfloat_to_float(uint32_t bits) {
    return float_from_bits(bits << 16);
}

inline uint32_t pack_bfloat2(float low, float high) {
    bfloat16_bits bits[2];
    from_double(low, bits[0]);
    from_double(high, bits[1]);
    return static_cast<uint32_t>(bits[1].bits) << 16 | bits[0].bits;
}

inline uint32_t round_tf32(float value) {
    const uint32_t bits = bits_from_float(value);
    return std::isfinite(value) ? (bits + 0x1000u) & ~0x1fffu : bits;
}

inline float rough_exp2(float value) {
    const float power = exp2f(value) * (1.0f - 0x1p-22f);
    return power < 0x1p-126f ? 0.0f : power;
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

inline void load_matrices_transposed(uint32_t (&matrix)[4], const void* row) {
    emulation::require_aligned(row, 16);
    const int lane = thread_id() % 32;
    emulation::exchange(&row, sizeof row);
    for (int i = 0; i < 4; ++i) {
        uint16_t pair[2];
        for (int j = 0; j < 2; ++j) {
            const unsigned char* source;
            emulation::read(i * 8 + lane % 4 * 2 + j, &source, sizeof source);
            memcpy(&pair[j], source + lane / 4 * 2, 2);
        }
        matrix[i] = static_cast<uint32_t>(pair[1]) << 16 | pair[0];
    }
    emulation::release();
}

// Happens as late as it may: when the thread waits.
inline void copy_async(void* shared, const void* global, bool present) {
    emulation::require_aligned(shared, 16);
    if (present) emulation::require_aligned(global, 16);
    emulation::block->copies[emulation::block->current].push_back({shared, present ? global : nullptr});
}

inline void wait_copies() {
    auto& copies = emulation::block->copies[emulation::block->current];
    for (const auto& [shared, global] : copies) {
        if (global != nullptr) memcpy(shared, global, 16);
        if (global == nullptr) memset(shared, 0, 16);
    }
    copies.clear();
}

// d += a b from a lane's values of A's row `group`, of row group + 8, and of B's column `group`, kDepth / 4 each. Value k
// of a row or column is number index(k) of the lane 4 group + k / neighbours % 4.
template <int kDepth, class Index>
inline void emulated_mma(float (&d)[4], const float (&mine)[3 * kDepth / 4], int neighbours, Index index) {
    emulation::exchange(mine, sizeof mine);
    const int group = thread_id() % 32 / 4, pair = thread_id() % 4 * 2;
    float rows[2][kDepth], columns[2][kDepth];
    for (int k = 0; k < kDepth; ++k) {
        const int lane = k / neighbours % 4;
        const float* a = emulation::slot<float>(group * 4 + lane);
        for (int i = 0; i < 2; ++i) {
            rows[i][k] = a[i * (kDepth / 4) + index(k)];
            columns[i][k] = emulation::slot<float>((pair + i) * 4 + lane)[kDepth / 2 + index(k)];
        }
    }
    emulation::release();
    for (int i = 0; i < 4; ++i) d[i] = emulation::dot(rows[i / 2], columns[i % 2], kDepth, d[i]);
}

// Halves: register 2 (k / 8) + i of A, k / 8 of B, lane k % 8 / 2, half k % 2.
template <int kDepth>
inline void emulated_half_mma(float (&d)[4], const uint32_t* a, const uint32_t* b, float (*to_float)(uint32_t)) {
    float mine[3 * kDepth / 4];
    for (int half = 0; half < kDepth / 8; ++half) {
        for (int j = 0; j < 2; ++j) {
            for (int i = 0; i < 2; ++i) {
                mine[i * (kDepth / 4) + half * 2 + j] = to_float(a[2 * half + i] >> (j * 16) & 0xffffu);
            }
            mine[kDepth / 2 + half * 2 + j] = to_float(b[half] >> (j * 16) & 0xffffu);
        }
    }
    emulated_mma<kDepth>(d, mine, 2, [](int k) { return k / 8 * 2 + k % 2; });
}

inline void mma_k8(float (&d)[4], const uint32_t* a, uint32_t b, const float (&c)[4]) {
    float sum[4] = {c[0], c[1], c[2], c[3]};
    emulated_half_mma<8>(sum, a, &b, half_to_float);
    memcpy(d, sum, sizeof sum);
}

inline void mma_k16(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1, const float (&c)[4]) {
    const uint32_t b[2] = {b0, b1};
    float sum[4] = {c[0], c[1], c[2], c[3]};
    emulated_half_mma<16>(sum, a, b, half_to_float);
    memcpy(d, sum, sizeof sum);
}

inline void mma_bfloat16_k16(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
    const uint32_t b[2] = {b0, b1};
    emulated_half_mma<16>(d, a, b, bfloat_to_float);
}

// Floats: register 2 (k / 4) + i of A, k / 4 of B, lane k % 4. Eleven bits of each are read, the rest is dropped.
inline void mma_tf32_k8(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
    const uint32_t all[6] = {a[0], a[2], a[1], a[3], b0, b1};
    float mine[6];
    for (int i = 0; i < 6; ++i) mine[i] = float_from_bits(all[i] & ~0x1fffu);
    emulated_mma<8>(d, mine, 1, [](int k) { return k / 4; });
}

inline float max_nonnegative(float best, float a, float b) {
    const int x = __float_as_int(a), y = __float_as_int(b), z = __float_as_int(best);
    return __int_as_float(x > y ? (x > z ? x : z) : (y > z ? y : z));
}

}  // namespace meditok
