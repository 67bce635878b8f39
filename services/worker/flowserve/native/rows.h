// Activations in int8: rows in groups of 32 inputs, and what makes them: RMSNorm, embedding.
//
// A group's scale is its largest magnitude / 127, found anew for each row (dynamic W8A8). Beside the codes a group keeps
// -128 times their sum: the products multiply by weight + 128, which is unsigned as VNNI wants it, and
// start from that number, so the offset costs nothing in the inner loop and no memory beside the weights.
#pragma once
#include <cmath>

#include "abi.h"
#include "lanes.h"

namespace ISA {

constexpr int GROUP = 32;

INLINE int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A group of one row: all that the products want of it lies together, so that they keep one pointer for each row.
struct Group {
  int8_t codes[GROUP];
  float scale;
  int32_t offset;  // -128 times the sum of the codes
};

// Rows of `width` inputs, a multiple of GROUP: [rows][width / GROUP].
struct Rows {
  Group* groups;
  int64_t width;
  int64_t num_groups() const { return width / GROUP; }
  Group* row(int64_t i) const { return groups + i * num_groups(); }
};

INLINE void quantise_group(Floats a, Floats b, Group& group) {
  const float top = largest(max(abs(a), abs(b)));
  const float scale = (top > 1e-20f ? top : 1e-20f) / 127.0f;
  const Floats inverse = all(1.0f / scale);
  const Ints x = round(a * inverse), y = round(b * inverse);
  store_codes(group.codes, x);
  store_codes(group.codes + LANES, y);
  group.scale = scale;
  group.offset = int32_t(-128u * uint32_t(sum(x + y)));
}

INLINE float inverse_rms(const float* x, int64_t padded_width, int64_t width, float eps) {
  Floats a = all(0.0f), b = all(0.0f);
  for (int64_t i = 0; i < padded_width; i += 2 * LANES) {
    const Floats u = load(x + i), v = load(x + i + LANES);
    a = fma(u, u, a);
    b = fma(v, v, b);
  }
  return 1.0f / std::sqrt(sum(a + b) / float(width) + eps);
}

// x [padded width], zero beyond `width`; weight alike. One pass to find the scale, one to normalise and quantise.
INLINE void norm_and_quantise(const float* x, const float* weight, int64_t width, float eps, int64_t num_groups,
                              Group* groups) {
  const Floats r = all(inverse_rms(x, num_groups * GROUP, width, eps));
  for (int64_t i = 0; i < num_groups * GROUP; i += GROUP)
    quantise_group(load(x + i) * r * load(weight + i), load(x + i + LANES) * r * load(weight + i + LANES),
                   groups[i / GROUP]);
}

// The embedding of `token`, zero from `width` to `padded_width`.
inline void embed(const fs_model& model, int64_t token, float* x, int64_t padded_width) {
  std::memcpy(x, model.embed + token * model.width, model.width * sizeof(float));
  for (int64_t i = model.width; i < padded_width; ++i) x[i] = 0.0f;
}

}  // namespace ISA
