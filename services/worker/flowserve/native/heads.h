// What happens to a head between its projection and attention: norm (Qwen3), rotary embedding, and the cache.
//
// Queries are scaled so that a softmax over powers of two is the softmax wanted (by log2(e) / sqrt(head_dim)) and wait in
// fp32 or bfloat16 (`Term`); keys and values are rounded to bfloat16 into their block.
#pragma once
#include "kernels.h"
#include "rows.h"

namespace ISA {

// Sizes of the heads and of their places in the cache.
struct Heads {
  int64_t num_heads, num_kv_heads, head_dim, dims, num_layers, page;  // dims: head_dim padded to LANES
  int64_t group() const { return num_heads / num_kv_heads; }

  // 16 positions of keys (value = 0) or values (value = 1) of one kv head, see abi.h.
  uint16_t* place(uint16_t* blocks, int64_t layer, int64_t block, int value, int64_t head, int64_t position) const {
    const int64_t per_head = page * dims, per_layer = 2 * num_kv_heads * per_head;
    return blocks + (block * num_layers + layer) * per_layer + (value * num_kv_heads + head) * per_head +
           position % page / LANES * LANES * dims;
  }
};

inline void norm_head(float* x, const float* weight, int64_t head_dim, float eps) {
  float total = 0.0f;
  for (int64_t i = 0; i < head_dim; ++i) total += x[i] * x[i];
  const float r = 1.0f / std::sqrt(total / float(head_dim) + eps);
  for (int64_t i = 0; i < head_dim; ++i) x[i] = x[i] * r * weight[i];
}

// In the pairs (i, i + head_dim / 2); cos and sin [head_dim / 2] of the row's position.
inline void rotate(float* x, const float* cos, const float* sin, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  int64_t i = 0;
  for (; i + LANES <= half; i += LANES) {
    const Floats a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(x + i, a * c - b * s);
    store(x + half + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

// x [head_dim padded to a panel], zero beyond head_dim -> q [dims].
inline void store_query(const float* x, Term* q, const Heads& heads) {
  const Floats scale = all(1.44269504f / std::sqrt(float(heads.head_dim)));
  for (int64_t i = 0; i < heads.dims; i += LANES) store_terms(q + i, load(x + i) * scale);
}

inline void store_key(const float* x, uint16_t* keys, int64_t position, const Heads& heads) {
  alignas(64) uint16_t rounded[MAX_HEAD_DIM];
  for (int64_t i = 0; i < heads.dims; i += LANES) store_bf16(rounded + i, load(x + i));
  uint16_t* lane = keys + 2 * (position % LANES);
  for (int64_t i = 0; i < heads.dims; i += 2) std::memcpy(lane + i * LANES, rounded + i, 4);
}

inline void store_value(const float* x, uint16_t* values, int64_t position, const Heads& heads) {
  alignas(64) uint16_t rounded[MAX_HEAD_DIM];
  for (int64_t i = 0; i < heads.dims; i += LANES) store_bf16(rounded + i, load(x + i));
  uint16_t* row = values + position % LANES / 2 * 2 * heads.dims + position % 2;
  for (int64_t i = 0; i < heads.dims; ++i) row[2 * i] = rounded[i];
}

}  // namespace ISA
