// The AMX kernel of csrc/linear with its tile registers in plain memory, behind one C function; built by test_tiles.py.

#include <immintrin.h>

#include <cstring>

namespace {

struct Tiles {
    unsigned char data[8][16][64];
};
thread_local Tiles tiles;
thread_local unsigned char configuration[64];

float as_float(const unsigned char* half) {
    const unsigned bits = (half[0] | half[1] << 8) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

void load_tile(int tile, const void* from, long stride) {
    for (int row = 0; row < 16; ++row) {
        std::memcpy(tiles.data[tile][row], static_cast<const char*>(from) + row * stride, 64);
    }
}
void store_tile(int tile, void* to, long stride) {
    for (int row = 0; row < 16; ++row) {
        std::memcpy(static_cast<char*>(to) + row * stride, tiles.data[tile][row], 64);
    }
}
// sums[m][n] += a[m][2k] b[k][2n] + a[m][2k + 1] b[k][2n + 1], rounded once: the unit itself errs about as little.
void multiply_tiles(int sums, int a, int b) {
    for (int m = 0; m < 16; ++m) {
        for (int n = 0; n < 16; ++n) {
            float before;
            std::memcpy(&before, &tiles.data[sums][m][4 * n], 4);
            double sum = before;
            for (int k = 0; k < 32; ++k) {
                sum += static_cast<double>(as_float(&tiles.data[a][m][2 * k])) *
                       as_float(&tiles.data[b][k / 2][4 * n + 2 * (k % 2)]);
            }
            before = static_cast<float>(sum);
            std::memcpy(&tiles.data[sums][m][4 * n], &before, 4);
        }
    }
}

}  // namespace

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_release
#define _tile_loadd(tile, from, stride) load_tile(tile, from, stride)
#define _tile_stored(tile, to, stride) store_tile(tile, to, stride)
#define _tile_zero(tile) std::memset(tiles.data[tile], 0, 1024)
#define _tile_dpbf16ps(sums, a, b) multiply_tiles(sums, a, b)
#define _tile_loadconfig(from) std::memcpy(configuration, from, 64)
#define _tile_storeconfig(to) std::memcpy(to, configuration, 64)
#define _tile_release() std::memset(configuration, 0, 64)

#include "linear/linear_amx.cpp"
//
#include "common/isa.h"

namespace meditok {

Isa current_isa() {
    return Isa::kAvx512Vnni;
}
bool has_tiles() {
    return true;
}
LinearKernel linear_avx512() {
    return linear_amx();
}

// x (rows, width), one norm, weight and gate (columns, width) -> out (rows, columns): GeGLU, or without a gate GELU.
extern "C" void linear_on_tiles(const float* x, long rows, long width, const float* gain, const float* shift,
                                const float* weight, const float* gate, const float* bias, long columns,
                                float* out) {
    LinearParams params{};
    params.x = x;
    params.rows = rows;
    params.width = params.x_stride = width;
    params.norm[0] = {gain, shift, 1e-6f};
    params.norms = gain == nullptr ? 0 : 1;
    params.weight = weight;
    params.bias = bias;
    params.gate_weight = gate;
    params.gate_bias = bias;
    params.columns = columns;
    params.activation = gate == nullptr ? Activation::kGelu : Activation::kGeglu;
    params.out = out;
    linear_cpu(params, 2);
}

}  // namespace meditok
