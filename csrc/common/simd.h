// Rules for files named *_avx2.cpp, *_avx512.cpp, *_neon.cpp, and the few helpers they share.
//
// Such a file is the only one compiled with its instruction set. Everything in it, the vector type included,
// lives in an anonymous namespace, and it calls no inline function or template with external linkage (no
// std::max, no std::vector): the linker keeps one copy of those, and if it kept the AVX one, machines without
// AVX would crash. It includes vector_avx2.inl.h, vector_avx512.inl.h or vector_neon.inl.h of this folder, which define Vec,
// and an x_simd.inl.h that is written against that type:
//   kWidth                        floats in a vector
//   load(p), store(p, v)          unaligned access
//   fill(a)                       the same float everywhere
//   add(a, b), mul(a, b), max(a, b)
//   fma(a, b, c)                  a * b + c, rounded once
//   at_least(a, b)                bit i set where a[i] >= b[i]; false for NaN
//   largest(a)                    the largest element
// and on x86 what the other kernels need: sub, div, min, abs, round, scale, copy_sign, where_less, sum_of, transpose.
// A file with an integer kernel defines IVec, kWidth words of 32 bits, each an int32, two int16 or four int8:
//   load_int(p), store_int(p, v)  unaligned access
//   fill_int(a)                   the same word everywhere
//   max_int(a, b), largest_int(a) of int32
//   above(a, b)                   bit i set where a[i] > b[i], of int32
//   Pairs                         first(a, b): a[2i] b[2i] + a[2i+1] b[2i+1] of int16; add(sum, a, b): added to `sum`
//   Quads                         the same of four int8 in a and four uint8 in b, where there is an instruction
#pragma once

#include <cstdint>

#define MEDITOK_INLINE inline __attribute__((always_inline))
