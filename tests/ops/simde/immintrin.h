// Stands before the compiler's header in the SIMDe build: 512-bit intrinsics become portable code.
#include_next <immintrin.h>
#ifndef MEDITOK_SIMDE_IMMINTRIN
#define MEDITOK_SIMDE_IMMINTRIN
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#undef _mm512_madd_epi16  // the alias of SIMDe 0.7.4 wants two arguments too many
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
#endif
