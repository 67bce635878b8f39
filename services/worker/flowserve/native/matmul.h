// Int8 products with exact sums: rows of activations times panels of 32 outputs.
//
// A tile is ROWS rows by COLUMNS x 16 outputs. For each group of 32 inputs it runs eight steps of four inputs, in which
// one instruction multiplies 16 outputs' weights by one row's four codes and adds into int32; then the group's sums
// become floats: y += float(sum) * weight scale * row scale, in the order of the groups and without fused operations,
// which is the arithmetic of the reference (quantise.py) bit for bit. Tiles only share work, never sums, so a row's
// result does not depend on its neighbours.
//
// Blocking: a panel of weights is streamed once for all the rows of a task, and stays in the first cache levels from
// one tile of rows to the next; the rows' codes come from the second level. With one row the product is bound by the
// memory's bandwidth, from about eight rows on by the multipliers.
#pragma once
#include "rows.h"

namespace ISA {

constexpr int PANEL = 32;
constexpr int AHEAD = 8192;  // bytes of weights, fetched before they are wanted; a quarter as many cost 4 % at one row

// acc + weights (code + 128) times four codes of one row, for 16 outputs.
#ifdef __AVX512VNNI__
constexpr int ROWS = 6, COLUMNS = 2;
INLINE Ints start_of(int32_t offset) { return all(offset); }
INLINE Ints load_weights(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
INLINE void multiply_add(Ints& acc, Ints weights, const int8_t* codes) {
  // By hand: with the intrinsic, GCC 12 copies accumulators around and spills them.
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc.v) : "v"(weights.v), "m"(*(const int32_t*)codes));
}
#else
constexpr int ROWS = 2, COLUMNS = 1;
// AVX2 multiplies unsigned by signed bytes into saturating words: magnitudes of the row times weights with the row's
// signs stay below 2 * 127 * 127. Weights are signed again here, so the sum starts from zero.
INLINE Ints start_of(int32_t) { return all(0); }
INLINE Ints load_weights(const uint8_t* p) {
  const __m256i sign = _mm256_set1_epi8(int8_t(0x80));
  return {_mm256_xor_si256(_mm256_loadu_si256((const __m256i*)p), sign),
          _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)(p + 32)), sign)};
}
INLINE void multiply_add(Ints& acc, Ints weights, const int8_t* codes) {
  int32_t four;
  std::memcpy(&four, codes, 4);
  const __m256i x = _mm256_set1_epi32(four), magnitude = _mm256_abs_epi8(x), ones = _mm256_set1_epi16(1);
  acc.a = _mm256_add_epi32(
      acc.a, _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(weights.a, x)), ones));
  acc.b = _mm256_add_epi32(
      acc.b, _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(weights.b, x)), ones));
}
#endif

// y[R][PANEL at stride `stride`] of rows `row`.. and the outputs of `panel` from 16 * `column` on.
template <int R>
INLINE void tile(const Rows& rows, int64_t row, const fs_linear& linear, int64_t panel, int column, float* y,
                 int64_t stride) {
  const int64_t num_groups = rows.num_groups();
  const Group* x = rows.row(row);
  const uint8_t* weights = linear.codes + panel * PANEL * linear.num_inputs + column * LANES * 4;
  const uint16_t* weight_scales = linear.scales + panel * PANEL * num_groups + column * LANES;
  Floats total[R][COLUMNS];
  for (int c = 0; c < COLUMNS; ++c)
    for (int r = 0; r < R; ++r)
      total[r][c] = linear.bias ? load(linear.bias + panel * PANEL + (column + c) * LANES) : all(0.0f);
  for (int64_t group = 0; group < num_groups; ++group, ++x) {
    Ints acc[R][COLUMNS];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < COLUMNS; ++c) acc[r][c] = start_of(x[r * num_groups].offset);
#pragma GCC unroll 8
    for (int k = 0; k < GROUP; k += 4) {
      Ints w[COLUMNS];
      for (int c = 0; c < COLUMNS; ++c) w[c] = load_weights(weights + c * LANES * 4);
      if (R <= 2) {  // few rows: bound by memory
        for (int c = 0; c < COLUMNS; ++c) _mm_prefetch((const char*)weights + AHEAD + c * LANES * 4, _MM_HINT_T0);
      }
      weights += PANEL * 4;
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < COLUMNS; ++c) multiply_add(acc[r][c], w[c], x[r * num_groups].codes + k);
    }
    for (int c = 0; c < COLUMNS; ++c) {
      const Floats s = load_bf16(weight_scales + c * LANES);
      for (int r = 0; r < R; ++r)
        total[r][c] = total[r][c] + to_floats(acc[r][c]) * s * all(x[r * num_groups].scale);
    }
    weight_scales += PANEL;
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < COLUMNS; ++c) store(y + r * stride + (column + c) * LANES, total[r][c]);
}

template <int R>
APART void panel_tile(const Rows& rows, int64_t row, const fs_linear& linear, int64_t panel, float* y,
                       int64_t stride) {
  for (int column = 0; column < PANEL / LANES; column += COLUMNS) tile<R>(rows, row, linear, panel, column, y, stride);
}

// y[num_rows][PANEL], num_rows <= ROWS.
inline void multiply(const Rows& rows, int64_t row, int num_rows, const fs_linear& linear, int64_t panel, float* y,
                     int64_t stride) {
  switch (num_rows) {
    case 1: return panel_tile<1>(rows, row, linear, panel, y, stride);
    case 2: return panel_tile<2>(rows, row, linear, panel, y, stride);
#ifdef __AVX512VNNI__
    case 3: return panel_tile<3>(rows, row, linear, panel, y, stride);
    case 4: return panel_tile<4>(rows, row, linear, panel, y, stride);
    case 5: return panel_tile<5>(rows, row, linear, panel, y, stride);
    case 6: return panel_tile<6>(rows, row, linear, panel, y, stride);
#endif
  }
}

// Cuts `num_rows` rows into tiles of like size and calls `each(first row, number of rows)`.
template <class Each>
INLINE void for_tiles(int64_t first, int64_t num_rows, Each each) {
  const int64_t num_tiles = (num_rows + ROWS - 1) / ROWS;
  for (int64_t i = 0; i < num_tiles; ++i) {
    const int64_t begin = first + i * num_rows / num_tiles, end = first + (i + 1) * num_rows / num_tiles;
    each(begin, int(end - begin));
  }
}

}  // namespace ISA
