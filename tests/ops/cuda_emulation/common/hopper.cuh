// Stands in for csrc/common/hopper.cuh: the same functions on fibers. Copies happen as late as they may, when a thread waits
// for their barrier. Boxes and descriptors are read as the PTX ISA states for the 128-byte swizzle.
#pragma once

#include <cuda.h>

#include <map>
#include <vector>

#include "common/ptx.cuh"

#define MEDITOK_HOPPER 1

namespace emulation {

struct Copy {
    unsigned char* box;
    const CUtensorMap* map;
    int at[4];
};

struct CopyBarrier {
    int expected = -1, phase = 0;
    std::vector<Copy> copies;
};
inline std::map<uint64_t*, CopyBarrier> copy_barriers;
inline long barriers = 0;  // made so far

// Where shared addresses count from.
inline unsigned char* shared_window() {
    return shared - reinterpret_cast<uintptr_t>(shared) % 1024;
}

// Bits 4 to 6 of an address, xor its bits 7 to 9.
inline uint32_t swizzled(uint32_t address) {
    return address ^ (address >> 7 & 7) << 4;
}

inline int box_bytes(const CUtensorMap& map) {
    return static_cast<int>(map.box[0] * map.box[1] * map.box[2] * map.box[3] * 2);
}

inline void run(const Copy& copy) {
    const CUtensorMap& map = *copy.map;
    uint32_t address = static_cast<uint32_t>(copy.box - shared_window());
    for (uint32_t i3 = 0; i3 < map.box[3]; ++i3) {
        for (uint32_t i2 = 0; i2 < map.box[2]; ++i2) {
            for (uint32_t i1 = 0; i1 < map.box[1]; ++i1) {
                for (uint32_t i0 = 0; i0 < map.box[0]; ++i0, address += 2) {
                    const uint64_t at[4] = {copy.at[0] + i0, copy.at[1] + i1, copy.at[2] + i2, copy.at[3] + i3};
                    uint16_t value = 0;
                    const unsigned char* source = map.start;
                    bool inside = true;
                    for (int i = 0; i < 4; ++i) {
                        inside = inside && at[i] < map.size[i];
                        source += at[i] * map.stride[i];
                    }
                    if (inside) memcpy(&value, source, 2);
                    memcpy(shared_window() + swizzled(address), &value, 2);
                }
            }
        }
    }
}

// Element of a row of 128 bytes, rows in groups of eight.
inline uint16_t box_element(uint64_t descriptor, int row, int element) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) throw std::runtime_error("not a 128-byte swizzle");
    const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
    const uint32_t group = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
    uint16_t value;
    memcpy(&value, shared_window() + swizzled(start + row / 8 * group + row % 8 * 128 + element * 2), 2);
    return value;
}

}  // namespace emulation

namespace meditok {

constexpr int kBoxRows = 64, kBoxBytes = kBoxRows * 128, kBoxAlignment = 1024;

inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - emulation::shared_window());
}

inline void init_barrier(uint64_t* barrier) {
    emulation::require_aligned(barrier, 8);
    emulation::copy_barriers[barrier] = {};
    ++emulation::barriers;
}

inline void fence_barriers() {}

inline void expect_bytes(uint64_t* barrier, int bytes) {
    emulation::CopyBarrier& state = emulation::copy_barriers.at(barrier);
    if (state.expected >= 0) throw std::runtime_error("a second arrival in one phase");
    state.expected = bytes;
}

inline void copy_box(void* box, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
    emulation::require_aligned(box, 1024);
    emulation::copy_barriers.at(barrier).copies.push_back(
        {static_cast<unsigned char*>(box), map, {c0, c1, c2, c3}});
}

inline void wait_barrier(uint64_t* barrier, int parity) {
    while (true) {
        emulation::CopyBarrier& state = emulation::copy_barriers.at(barrier);
        if (state.phase % 2 != parity) return;
        int bytes = 0;
        for (const auto& copy : state.copies) bytes += emulation::box_bytes(*copy.map);
        if (state.expected >= 0 && bytes == state.expected) {
            for (const auto& copy : state.copies) emulation::run(copy);
            state.copies.clear();
            state.expected = -1;
            ++state.phase;
            continue;
        }
        emulation::yield();
    }
}

inline void meet_warpgroup(int group) {
    emulation::wait(emulation::block->warpgroups.at(static_cast<size_t>(group)));
}

inline uint64_t box_descriptor(const void* box, int byte) {
    const uint64_t address = shared_address(box) + static_cast<uint32_t>(byte);
    return (address & 0x3ffff) >> 4 | uint64_t{64} << 32 | uint64_t{1} << 62;
}

inline void begin_products(float (&)[8][4]) {}

template <int kSteps>
inline void begin_products(float (&)[8][4], uint32_t (&)[kSteps][4]) {}

inline void end_products(float (&)[8][4]) {}

// rows: A's row `group` of the warp and row group + 8; B K-major, or MN-major if transposed.
template <bool kBfloat16>
inline void emulated_wgmma(float (&d)[8][4], const float (&rows)[2][16], uint64_t b, bool transposed) {
    const int pair = thread_id() % 4 * 2;
    for (int n = 0; n < 8; ++n) {
        float columns[2][16];
        for (int i = 0; i < 2; ++i) {
            for (int k = 0; k < 16; ++k) {
                const int column = n * 8 + pair + i;
                const uint16_t bits = transposed ? emulation::box_element(b, k, column)
                                                 : emulation::box_element(b, column, k);
                columns[i][k] = kBfloat16 ? bfloat_to_float(bits) : half_to_float(bits);
            }
        }
        for (int i = 0; i < 4; ++i) d[n][i] = emulation::dot(rows[i / 2], columns[i % 2], 16, d[n][i]);
    }
}

template <bool kBfloat16>
inline void wgmma(float (&d)[8][4], uint64_t a, uint64_t b, bool add) {
    float rows[2][16];
    for (int i = 0; i < 2; ++i) {
        for (int k = 0; k < 16; ++k) {
            const int row = thread_id() / 32 % 4 * 16 + thread_id() % 32 / 4 + 8 * i;
            const uint16_t bits = emulation::box_element(a, row, k);
            rows[i][k] = kBfloat16 ? bfloat_to_float(bits) : half_to_float(bits);
        }
    }
    for (int n = 0; n < 8 && !add; ++n) d[n][0] = d[n][1] = d[n][2] = d[n][3] = 0.0f;
    emulated_wgmma<kBfloat16>(d, rows, b, false);
}

template <bool kBfloat16>
inline void wgmma_transposed(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
    emulation::exchange(a, sizeof a);
    float rows[2][16];
    for (int k = 0; k < 16; ++k) {
        for (int i = 0; i < 2; ++i) {
            const uint32_t* other = emulation::slot<uint32_t>(thread_id() % 32 / 4 * 4 + k % 8 / 2);
            const uint32_t bits = other[k / 8 * 2 + i] >> (k % 2 * 16) & 0xffffu;
            rows[i][k] = kBfloat16 ? bfloat_to_float(bits) : half_to_float(bits);
        }
    }
    emulation::release();
    emulated_wgmma<kBfloat16>(d, rows, b, true);
}

}  // namespace meditok
