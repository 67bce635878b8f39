// Keys and values moved to other positions, in plain C++: it waits for memory on any processor.
#pragma once
#include <algorithm>
#include <bit>

#include "abi.h"

namespace {

class Splicer {
 public:
  Splicer(const fs_model& model, const fs_cache& cache)
      : model_(model), cache_(cache), dims_((model.head_dim + LANE_COUNT - 1) / LANE_COUNT * LANE_COUNT) {}

  void run(const fs_splice& splice) const {
    for (int64_t done = 0; done < splice.length;) {
      const int64_t source = splice.source_start + done, target = splice.start + done;
      // As many as lie together in both places.
      const int64_t lane = std::max(source % LANE_COUNT, target % LANE_COUNT);
      const int64_t count = std::min(splice.length - done, LANE_COUNT - lane);
      for (int64_t layer = 0; layer < model_.num_layers; ++layer)
        for (int64_t head = 0; head < model_.num_kv_heads; ++head) {
          const uint16_t* from = place(splice.source, layer, 0, head, source);
          move_keys(from + 2 * (source % LANE_COUNT),
                    place(splice.table, layer, 0, head, target) + 2 * (target % LANE_COUNT), splice, done, count);
          from = place(splice.source, layer, 1, head, source);
          uint16_t* to = place(splice.table, layer, 1, head, target);
          for (int64_t i = 0; i < count; ++i) move_value(from, source + i, to, target + i);
        }
      done += count;
    }
  }

 private:
  static constexpr int64_t LANE_COUNT = 16;

  // See abi.h.
  uint16_t* place(const int32_t* table, int64_t layer, int value, int64_t head, int64_t position) const {
    const int64_t per_head = cache_.page * dims_, per_layer = 2 * model_.num_kv_heads * per_head;
    return cache_.blocks + (table[position / cache_.page] * model_.num_layers + layer) * per_layer +
           (value * model_.num_kv_heads + head) * per_head + position % cache_.page / LANE_COUNT * LANE_COUNT * dims_;
  }

  // Dimension i of the first of some positions; the next position's is two elements further.
  static int64_t dimension(int64_t i) { return i / 2 * 2 * LANE_COUNT + i % 2; }

  void move_keys(const uint16_t* from, uint16_t* to, const fs_splice& splice, int64_t done, int64_t count) const {
    const int64_t half = model_.head_dim / 2;
    for (int64_t i = 0; i < half; ++i) {
      const uint16_t *from_a = from + dimension(i), *from_b = from + dimension(half + i);
      uint16_t *to_a = to + dimension(i), *to_b = to + dimension(half + i);
      if (!splice.cos) {
        for (int64_t l = 0; l < 2 * count; l += 2) to_a[l] = from_a[l], to_b[l] = from_b[l];
        continue;
      }
      const float *cos = splice.cos + i * splice.length + done, *sin = splice.sin + i * splice.length + done;
      for (int64_t l = 0; l < count; ++l) {
        const float a = widened(from_a[2 * l]), b = widened(from_b[2 * l]);
        to_a[2 * l] = rounded(a * cos[l] - b * sin[l]);
        to_b[2 * l] = rounded(b * cos[l] + a * sin[l]);
      }
    }
  }

  void move_value(const uint16_t* from, int64_t source, uint16_t* to, int64_t target) const {
    from += source % LANE_COUNT / 2 * 2 * dims_ + source % 2;
    to += target % LANE_COUNT / 2 * 2 * dims_ + target % 2;
    for (int64_t i = 0; i < model_.head_dim; ++i) to[2 * i] = from[2 * i];
  }

  static float widened(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }

  // To the nearest, ties to even.
  static uint16_t rounded(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }

  const fs_model& model_;
  const fs_cache& cache_;
  const int64_t dims_;
};

}  // namespace
