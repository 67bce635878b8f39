// Sixteen lanes of float or int32, on AVX-512 (one register) or AVX2 (two).
//
// Kernels are written once over these lanes and compiled once for each instruction set. Every operation rounds alike on
// all, and reductions over lanes go in one fixed order, so all give the same bits. The factors of attention (`Term`) are
// bfloat16 everywhere, because some processors multiply pairs of those.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))
// One copy: where GCC inlined a tile into its callers, one of the copies ran at half the speed.
#define APART __attribute__((noinline, noclone))

namespace ISA {

constexpr int LANES = 16;

#ifdef __AVX512VNNI__

struct Floats { __m512 v; };
struct Ints { __m512i v; };

INLINE Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
INLINE void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
INLINE Floats all(float x) { return {_mm512_set1_ps(x)}; }
INLINE Ints all(int32_t x) { return {_mm512_set1_epi32(x)}; }
INLINE Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
INLINE Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
INLINE Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
INLINE Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
INLINE Floats abs(Floats a) { return {_mm512_abs_ps(a.v)}; }
INLINE Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
INLINE Ints round(Floats a) { return {_mm512_cvtps_epi32(a.v)}; }
INLINE Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
INLINE Floats power_of_two(Ints n) {  // 2^n for -127 <= n <= 127; 2^-127 is 0
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n.v, _mm512_set1_epi32(127)), 23))};
}
// Sixteen bfloat16, and the first or second of each of sixteen pairs.
INLINE Floats load_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
INLINE void store_bf16(uint16_t* p, Floats a) {  // rounds to nearest even; what is not a number stays none
  const __m512i bits = _mm512_castps_si512(a.v), one = _mm512_set1_epi32(1);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i rounded = _mm512_srli_epi32(
      _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 none = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_mov_epi32(rounded, none, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(kept));
}
struct Pairs { __m512i v; };
INLINE Pairs load_pairs(const uint16_t* p) { return {_mm512_loadu_si512(p)}; }
INLINE Floats first(Pairs a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))}; }
INLINE Floats second(Pairs a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(int32_t(0xffff0000))))};
}
// Two terms of a sum next to each other. Of a pair the second is added first, small numbers are zeros: that is what the
// instruction does.
#ifdef __AVX512BF16__
using Term = uint16_t;
INLINE void store_terms(Term* p, Floats a) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a.v)); }
INLINE Floats load_terms(const Term* p) { return load_bf16(p); }
struct Two { __m512i v; };
INLINE Two both(const Term* p) {
  int32_t two;
  std::memcpy(&two, p, 4);
  return {_mm512_set1_epi32(two)};
}
INLINE Floats dot(Two x, Pairs y, Floats acc) { return {_mm512_dpbf16_ps(acc.v, (__m512bh)y.v, (__m512bh)x.v)}; }
#endif
INLINE Pairs without_second(Pairs a) { return {_mm512_and_si512(a.v, _mm512_set1_epi32(0xffff))}; }
INLINE void store_codes(int8_t* p, Ints a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(a.v)); }
INLINE Floats keep_first(Floats a, int n, float other) {  // lanes n and up become `other`; any n
  const __mmask16 kept = n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1;
  return {_mm512_mask_blend_ps(kept, _mm512_set1_ps(other), a.v)};
}
INLINE Floats drop_first(Floats a, int n, float other) {  // lanes before n become `other`; any n
  const __mmask16 dropped = n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1;
  return {_mm512_mask_blend_ps(dropped, a.v, _mm512_set1_ps(other))};
}
INLINE __m256 low(Floats a) { return _mm512_castps512_ps256(a.v); }
INLINE __m256 high(Floats a) { return _mm512_extractf32x8_ps(a.v, 1); }
INLINE __m256i low(Ints a) { return _mm512_castsi512_si256(a.v); }
INLINE __m256i high(Ints a) { return _mm512_extracti32x8_epi32(a.v, 1); }

#else

struct Floats { __m256 a, b; };
struct Ints { __m256i a, b; };

INLINE Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float* p, Floats x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
INLINE Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE Ints all(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE Floats operator+(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE Floats operator-(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE Floats operator*(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE Floats operator/(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE Floats fma(Floats x, Floats y, Floats z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
INLINE Floats max(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INLINE Floats min(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
INLINE Floats abs(Floats x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
INLINE Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
INLINE Ints round(Floats x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
INLINE Ints operator+(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
INLINE Floats power_of_two(Ints n) {  // 2^n for -127 <= n <= 127; 2^-127 is 0
  const __m256i bias = _mm256_set1_epi32(127);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.a, bias), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.b, bias), 23))};
}
// Sixteen bfloat16, and the first or second of each of sixteen pairs.
INLINE __m256 half_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
INLINE Floats load_bf16(const uint16_t* p) { return {half_bf16(p), half_bf16(p + 8)}; }
INLINE __m256i rounded_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x), one = _mm256_set1_epi32(1);
  const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  const __m256i rounded = _mm256_srli_epi32(
      _mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff))), 16);
  const __m256 none = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(none));
}
INLINE void store_bf16(uint16_t* p, Floats x) {  // rounds to nearest even; what is not a number stays none
  const __m256i words = _mm256_packus_epi32(rounded_bf16(x.a), rounded_bf16(x.b));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(words, 0xd8));
}
struct Pairs { __m256i a, b; };
INLINE Pairs load_pairs(const uint16_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 16))};
}
INLINE Floats first(Pairs x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(x.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(x.b, 16))};
}
INLINE Floats second(Pairs x) {
  const __m256i mask = _mm256_set1_epi32(int32_t(0xffff0000));
  return {_mm256_castsi256_ps(_mm256_and_si256(x.a, mask)), _mm256_castsi256_ps(_mm256_and_si256(x.b, mask))};
}
INLINE Pairs without_second(Pairs x) {
  const __m256i mask = _mm256_set1_epi32(0xffff);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
INLINE void store_codes(int8_t* p, Ints x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
INLINE __m256 kept(int n) {  // all ones in the lanes before n
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), index));
}
INLINE Floats keep_first(Floats x, int n, float other) {  // lanes n and up become `other`; any n
  const __m256 o = _mm256_set1_ps(other);
  return {_mm256_blendv_ps(o, x.a, kept(n)), _mm256_blendv_ps(o, x.b, kept(n - 8))};
}
INLINE Floats drop_first(Floats x, int n, float other) {  // lanes before n become `other`; any n
  const __m256 o = _mm256_set1_ps(other);
  return {_mm256_blendv_ps(x.a, o, kept(n)), _mm256_blendv_ps(x.b, o, kept(n - 8))};
}
INLINE __m256 low(Floats x) { return x.a; }
INLINE __m256 high(Floats x) { return x.b; }
INLINE __m256i low(Ints x) { return x.a; }
INLINE __m256i high(Ints x) { return x.b; }

#endif

#ifndef __AVX512BF16__
using Term = float;
INLINE void store_terms(Term* p, Floats a) {
  uint16_t rounded[LANES];
  store_bf16(rounded, a + all(0.0f));  // a small number becomes zero before it is rounded
  store(p, load_bf16(rounded));
}
INLINE Floats load_terms(const Term* p) { return load(p); }
struct Two { Floats even, odd; };
INLINE Two both(const Term* p) { return {all(p[0]), all(p[1])}; }
INLINE Floats dot(Two x, Pairs y, Floats acc) { return fma(first(y), x.even, fma(second(y), x.odd, acc)); }
#endif

// Over all lanes, as a tree: halves, quarters, pairs.
INLINE float sum(Floats a) {
  const __m256 x = _mm256_add_ps(low(a), high(a));
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
INLINE float largest(Floats a) {
  const __m256 x = _mm256_max_ps(low(a), high(a));
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
INLINE int32_t sum(Ints a) {
  const __m256i x = _mm256_add_epi32(low(a), high(a));
  __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}

// 2^x to about one unit in the last place; 0 for x < -126.5, for x > 126 that of 126. The fraction, in -1/2 to 1/2, goes
// through the Taylor polynomial of degree 7, the whole part into the exponent.
INLINE Floats exp2(Floats x) {
  x = max(min(x, all(126.0f)), all(-127.0f));
  const Ints n = round(x);
  const Floats f = x - to_floats(n);
  Floats p = all(1.5252734e-5f);
  p = fma(p, f, all(1.5403530e-4f));
  p = fma(p, f, all(1.3333558e-3f));
  p = fma(p, f, all(9.6181291e-3f));
  p = fma(p, f, all(5.5504109e-2f));
  p = fma(p, f, all(2.4022651e-1f));
  p = fma(p, f, all(6.9314718e-1f));
  p = fma(p, f, all(1.0f));
  return p * power_of_two(n);
}

}  // namespace ISA
