// Stands before the compiler's header in the SIMDe build: 512-bit intrinsics become portable code.
#include_next <immintrin.h>
#ifndef MEDITOK_SIMDE_IMMINTRIN
#define MEDITOK_SIMDE_IMMINTRIN
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#undef _mm512_madd_epi16  // the alias of SIMDe 0.7.4 wants two arguments too many
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)

// SIMDe 0.7.4 lacks these two: floats under the mask, zeros elsewhere.
static inline simde__m512 meditok_maskz_loadu_ps(unsigned mask, const void* from) {
    float to[16] = {};
    for (int i = 0; i < 16; ++i) {
        if ((mask >> i & 1) != 0) to[i] = static_cast<const float*>(from)[i];
    }
    return simde_mm512_loadu_ps(to);
}
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps(mask, from) meditok_maskz_loadu_ps(mask, from)

static inline void meditok_mask_storeu_ps(void* to, unsigned mask, simde__m512 v) {
    float from[16];
    simde_mm512_storeu_ps(from, v);
    for (int i = 0; i < 16; ++i) {
        if ((mask >> i & 1) != 0) static_cast<float*>(to)[i] = from[i];
    }
}
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps(to, mask, v) meditok_mask_storeu_ps(to, mask, v)

// Nor this: 128-bit lanes, two of a and two of b, picked by two bits each.
static inline simde__m512 meditok_shuffle_f32x4(simde__m512 a, simde__m512 b, int picks) {
    float from[2][16], to[16];
    simde_mm512_storeu_ps(from[0], a);
    simde_mm512_storeu_ps(from[1], b);
    for (int i = 0; i < 16; ++i) to[i] = from[i / 8][4 * ((picks >> (2 * (i / 4))) & 3) + i % 4];
    return simde_mm512_loadu_ps(to);
}
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4(a, b, picks) meditok_shuffle_f32x4(a, b, picks)
#endif
