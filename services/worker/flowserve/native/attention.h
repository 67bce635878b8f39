// Attention over the paged cache, decode and prompt chunks alike, with a result that no batch mate can change.
//
// A query row reads the keys of its kv head in tiles of TILE positions counted from position 0, and keeps a running
// maximum, sum and weighted values (online softmax, arXiv 2205.14135). After each PARTITION of positions it starts anew
// and merges what it has into its total (arXiv 2311.01282), so that a single long sequence can be spread over threads.
// Both sizes are fixed and partitions are merged in order: a row goes through the same operations whether it is alone,
// in a chunk, or split over threads. A tile that a row does not see multiplies by one and adds zeros (times
// values that are finite).
//
// Blocking: rows are (position, query head) pairs of one kv head, so that a group's heads, and up to QUERY_ROWS rows of
// a chunk, share each tile of keys and values while it is in the first cache level. Scores are up to
// TOGETHER rows by WIDE blocks of 16 positions, in registers; the weighted values as many rows by WIDE vectors of 16
// dimensions.
#pragma once
#include <limits>

#include "heads.h"

namespace ISA {

constexpr int TILE = 64, PARTITION = 512, QUERY_ROWS = 48;
constexpr float NEVER = -1e30f;  // a maximum over nothing: finite, so that differences are numbers
#ifdef __AVX512VNNI__
constexpr int TOGETHER = 6, WIDE = 4;
#else
constexpr int TOGETHER = 3, WIDE = 1;
#endif

// Running softmax of one row: its maximum, its sum in LANES parts, and its values [dims].
struct Running {
  float* memory;
  int64_t dims;
  static int64_t size(int64_t dims) { return 2 * LANES + dims; }
  Running at(int64_t i) const { return {memory + i * size(dims), dims}; }
  float& top() const { return memory[0]; }
  float* sums() const { return memory + LANES; }
  float* values() const { return memory + 2 * LANES; }
  void reset() const {
    std::memset(memory, 0, size(dims) * sizeof(float));
    top() = NEVER;
  }
  void merge(const Running& part) const {
    const float highest = top() > part.top() ? top() : part.top();
    const Floats a = exp2(all(top() - highest)), b = exp2(all(part.top() - highest));
    top() = highest;
    for (int64_t i = LANES; i < size(dims); i += LANES)
      store(memory + i, load(memory + i) * a + load(part.memory + i) * b);
  }
};

// Where a tile begins, and its blocks.
struct Tile {
  int64_t start;
  const uint16_t* keys[TILE / LANES];
  const uint16_t* values[TILE / LANES];
};

// s[R][16 * NB] = q . keys, for NB blocks from `block` on.
template <int R, int NB>
INLINE void score(const Term* const* q, const Tile& tile, int block, int64_t dims, float (*s)[TILE]) {
  Floats acc[R][NB];
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < NB; ++b) acc[r][b] = all(0.0f);
  for (int64_t d = 0; d < dims; d += 2) {
    Pairs k[NB];
    for (int b = 0; b < NB; ++b) k[b] = load_pairs(tile.keys[block + b] + d * LANES);
    for (int r = 0; r < R; ++r) {
      const Two x = both(q[r] + d);
      for (int b = 0; b < NB; ++b) acc[r][b] = dot(x, k[b], acc[r][b]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < NB; ++b) store(s[r] + (block + b) * LANES, acc[r][b]);
}

// values[R][16 * NV from d on] = values * scale + p . values of the tile's first `count` positions; p is zero beyond.
template <int R, int NV>
INLINE void add_values(const Term (*p)[TILE], const float* scale, const Tile& tile, int count, int64_t d,
                       int64_t dims, const Running* running) {
  Floats acc[R][NV];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) acc[r][v] = load(running[r].values() + d + v * LANES) * all(scale[r]);
  for (int i = 0; i < count; i += 2) {
    const uint16_t* row = tile.values[i / LANES] + i % LANES * dims + 2 * d;
    Pairs y[NV];
    for (int v = 0; v < NV; ++v) y[v] = load_pairs(row + v * 2 * LANES);
    if (i + 1 == count)  // the pair's second position was never written: whatever is there stays out
      for (int v = 0; v < NV; ++v) y[v] = without_second(y[v]);
    for (int r = 0; r < R; ++r) {
      const Two x = both(p[r] + i);
      for (int v = 0; v < NV; ++v) acc[r][v] = dot(x, y[v], acc[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) store(running[r].values() + d + v * LANES, acc[r][v]);
}

// One tile for R rows; `positions` ascend.
template <int R>
APART void attend_tile(const Term* const* q, const int64_t* positions, int64_t window, const Tile& tile,
                        int64_t dims, const Running* running) {
  const int64_t last = positions[R - 1] - tile.start + 1;
  if (last <= 0) return;
  const int count = int(last < TILE ? last : TILE), num_blocks = (count + LANES - 1) / LANES;
  alignas(64) float s[R][TILE];
  alignas(64) Term p[R][TILE];
  float scale[R];
  if (num_blocks == TILE / LANES) {
    for (int b = 0; b < TILE / LANES; b += WIDE) score<R, WIDE>(q, tile, b, dims, s);
  } else {
    for (int b = 0; b < num_blocks; ++b) score<R, 1>(q, tile, b, dims, s);
  }
  const float hidden = -std::numeric_limits<float>::infinity();
  for (int r = 0; r < R; ++r) {
    const int64_t end = positions[r] - tile.start + 1, begin = window ? end - window : 0;
    Floats x[TILE / LANES];
    Floats highest = all(NEVER);
    for (int b = 0; b < TILE / LANES; ++b) {
      x[b] = b < num_blocks ? load(s[r] + b * LANES) : all(hidden);
      if (end < TILE) x[b] = keep_first(x[b], int(end > 0 ? end : 0) - b * LANES, hidden);
      if (begin > 0) x[b] = drop_first(x[b], int(begin < TILE ? begin : TILE) - b * LANES, hidden);
      highest = max(highest, x[b]);
    }
    float& top = running[r].top();
    const float found = largest(highest), next = found > top ? found : top;
    const Floats fade = exp2(all(top - next));
    top = next;
    for (int b = 0; b < TILE / LANES; ++b) {
      store_terms(p[r] + b * LANES, exp2(x[b] - all(next)));
      x[b] = load_terms(p[r] + b * LANES);  // the sum is of what the values are multiplied by
    }
    float* sums = running[r].sums();
    store(sums, load(sums) * fade + ((x[0] + x[1]) + (x[2] + x[3])));
    alignas(64) float lanes[LANES];
    store(lanes, fade);
    scale[r] = lanes[0];
  }
  int64_t d = 0;
  for (; d + WIDE * LANES <= dims; d += WIDE * LANES)
    add_values<R, WIDE>(p, scale, tile, count, d, dims, running);
  for (; d < dims; d += LANES) add_values<R, 1>(p, scale, tile, count, d, dims, running);
}

// The rows (position, head of the group) of `count` positions of a sequence from `position` on, for one kv head. They are
// rows `row`.. of the queries; results go to rows `to`.. Only partitions `first_part` to `end_part`: all of them, or one,
// to be kept at `partial` (in units of Running) until the row's other parts are done.
struct Item {
  int64_t table, position, count, head, row, to, first_part, end_part, partial;
  int64_t cost() const { return count * (end_part - first_part); }
};

// One thread's memory for the rows of an item.
struct Scratch {
  Running part, total;
};

inline int64_t rows_at_once(const Heads& heads) { return heads.group() > QUERY_ROWS ? heads.group() : QUERY_ROWS; }

// Calls finish(query row, query head, total) for each row of an item that is not partial.
template <class Finish>
inline void attend(const Item& item, const Heads& heads, const Term* queries, uint16_t* blocks, const int32_t* tables,
                   int64_t layer, int64_t window, Scratch& scratch, const Running& partials, Finish finish) {
  const int64_t group = heads.group(), num_rows = item.count * group, dims = heads.dims;
  const int32_t* table = tables + item.table;
  const int64_t end = item.position + item.count;  // of the positions that anyone here sees
  const int64_t begin = window && item.position >= window ? item.position - window + 1 : 0;
  const bool split = item.partial >= 0;
  if (!split)
    for (int64_t i = 0; i < num_rows; ++i) scratch.total.at(i).reset();
  for (int64_t part = item.first_part; part < item.end_part; ++part) {
    const Running running = split ? partials.at(item.partial) : scratch.part;
    for (int64_t i = 0; i < num_rows; ++i) running.at(i).reset();
    int64_t start = part * PARTITION;
    if (start < begin) start = begin / TILE * TILE;
    const int64_t stop = (part + 1) * PARTITION < end ? (part + 1) * PARTITION : end;
    for (; start < stop; start += TILE) {
      Tile tile{start, {}, {}};
      for (int b = 0; b < TILE / LANES && start + b * LANES < end; ++b) {
        const int64_t position = start + b * LANES, block = table[position / heads.page];
        tile.keys[b] = heads.place(blocks, layer, block, 0, item.head, position);
        tile.values[b] = heads.place(blocks, layer, block, 1, item.head, position);
      }
      for (int64_t i = 0; i < num_rows;) {
        const Term* q[TOGETHER];
        int64_t positions[TOGETHER];
        Running rows[TOGETHER];
        const int n = int(num_rows - i < TOGETHER ? num_rows - i : TOGETHER);
        for (int r = 0; r < n; ++r) {
          const int64_t offset = (i + r) / group, head = item.head * group + (i + r) % group;
          q[r] = queries + ((item.row + offset) * heads.num_heads + head) * dims;
          positions[r] = item.position + offset;
          rows[r] = running.at(i + r);
        }
        switch (n) {
          case 1: attend_tile<1>(q, positions, window, tile, dims, rows); break;
          case 2: attend_tile<2>(q, positions, window, tile, dims, rows); break;
          case 3: attend_tile<3>(q, positions, window, tile, dims, rows); break;
#ifdef __AVX512VNNI__
          case 4: attend_tile<4>(q, positions, window, tile, dims, rows); break;
          case 5: attend_tile<5>(q, positions, window, tile, dims, rows); break;
          case 6: attend_tile<6>(q, positions, window, tile, dims, rows); break;
#endif
        }
        i += n;
      }
    }
    if (!split)
      for (int64_t i = 0; i < num_rows; ++i) scratch.total.at(i).merge(running.at(i));
  }
  if (!split)
    for (int64_t i = 0; i < num_rows; ++i)
      finish(item.to + i / group, item.head * group + i % group, scratch.total.at(i));
}

}  // namespace ISA
