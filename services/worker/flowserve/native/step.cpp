// One step of a decoder: the rows of many sequences through all layers, in one call.
//
// Compiled once for each instruction set (ISA names the namespace). What is
// fused where: norm with quantisation; the query, key and value product with rotary embedding and the write to the
// cache; attention with the quantisation of its result; the gate and up products with SiLU and quantisation; the other
// two with the residual. Values between are fp32, or int8 in groups of 32.
#include <algorithm>
#include <chrono>
#include <new>
#include <vector>

#include "attention.h"
#include "kernels.h"
#include "matmul.h"
#include "team.h"

namespace ISA {
namespace {

constexpr int64_t ROW_BLOCK = 256;  // rows of one task of a product: their codes stay in the second cache level
constexpr int64_t SPLIT_BELOW = 8;  // rows of a chunk, below which its partitions are tasks of their own

// Memory that only grows, aligned to cache lines.
template <class T>
class Buffer {
 public:
  ~Buffer() { operator delete[](data_, std::align_val_t(64)); }
  T* get(int64_t size) {
    if (size > size_) {
      T* data = static_cast<T*>(operator new[](size * sizeof(T), std::align_val_t(64)));
      operator delete[](data_, std::align_val_t(64));
      data_ = data;
      size_ = size;
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

struct Merge {
  int64_t row, head, partial, num_parts, stride;
};

class Runner {
 public:
  explicit Runner(int num_threads) : num_threads_(num_threads), team_(num_threads) {}

  void step(const fs_model& model, const fs_cache& cache, const fs_step& step) {
    prepare(model, cache, step);
    team_.step(9 * model.num_layers + 8, [&](Team::Member& member) { forward(model, cache, step, member); });
  }

 private:
  void prepare(const fs_model& model, const fs_cache& cache, const fs_step& step) {
    heads_ = {model.num_heads,  model.num_kv_heads, model.head_dim, padded(model.head_dim, LANES),
              model.num_layers, cache.page};
    head_columns_ = padded(model.head_dim, PANEL);
    width_ = padded(model.width, PANEL);
    const int64_t num_rows = step.num_rows;
    x_ = x_buffer_.get(num_rows * width_);
    last_x_ = last_x_buffer_.get(step.num_samples * width_);
    queries_ = query_buffer_.get(num_rows * model.num_heads * heads_.dims);
    normed_ = rows(normed_buffer_, num_rows, width_);
    attended_ = rows(attended_buffer_, num_rows, model.num_heads * head_columns_);
    hidden_ = rows(hidden_buffer_, num_rows, model.layers[0].down.num_inputs);
    const int64_t scratch = rows_at_once(heads_) * Running::size(heads_.dims);
    scratch_ = scratch_buffer_.get(2 * scratch * num_threads_);
    scratch_size_ = scratch;

    positions_.resize(num_rows);
    tables_.resize(num_rows);
    items_.clear();
    merges_.clear();
    last_items_.clear();
    num_partials_ = 0;
    const int64_t at_once = std::max<int64_t>(1, QUERY_ROWS / heads_.group());
    int64_t row = 0;
    for (int64_t s = 0; s < step.num_spans; ++s) {
      const fs_span& span = step.spans[s];
      for (int64_t i = 0; i < span.length; ++i) {
        positions_[row + i] = span.start + i;
        tables_[row + i] = span.table;
      }
      for (int64_t i = 0; i < span.length; i += at_once)
        add(items_, span, i, std::min(at_once, span.length - i), row + i, row + i, span.length < SPLIT_BELOW);
      row += span.length;
    }
    // The last layer's rows are needed only where logits are wanted.
    if (step.num_samples == num_rows) {
      last_items_ = items_;
    } else {
      for (int64_t i = 0; i < step.num_samples; ++i) {
        const int64_t from = step.sample_rows[i];
        add(last_items_, {positions_[from], 1, tables_[from]}, 0, 1, from, i, false);
      }
    }
    deal(items_);
    deal(last_items_);
    partials_ = {partial_buffer_.get(num_partials_ * Running::size(heads_.dims)), heads_.dims};
  }

  // Long ones first, and to each thread's stretch its share of them: the threads end together.
  void deal(std::vector<Item>& items) {
    std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost() > b.cost(); });
    const int64_t total = int64_t(items.size());
    sorted_.swap(items);
    items.resize(total);
    auto item = sorted_.begin();
    for (int64_t place = 0; item != sorted_.end(); ++place)
      for (int thread = 0; thread < num_threads_; ++thread)
        if (const int64_t i = team_.stretch(total, thread) + place; i < team_.stretch(total, thread + 1)) items[i] = *item++;
  }

  static Rows rows(Buffer<Group>& buffer, int64_t num_rows, int64_t width) {
    return {buffer.get(num_rows * width / GROUP), width};
  }

  void add(std::vector<Item>& items, const fs_span& span, int64_t offset, int64_t count, int64_t row, int64_t to,
           bool may_split) {
    const int64_t first = span.start + offset, num_parts = (first + count + PARTITION - 1) / PARTITION;
    for (int64_t head = 0; head < heads_.num_kv_heads; ++head) {
      if (!may_split || num_parts == 1) {
        items.push_back({span.table, first, count, head, row, to, 0, num_parts, -1});
        continue;
      }
      const int64_t num_rows = count * heads_.group();
      for (int64_t part = 0; part < num_parts; ++part)
        items.push_back(
            {span.table, first, count, head, row, to, part, part + 1, num_partials_ + part * num_rows});
      for (int64_t i = 0; i < num_rows; ++i)
        merges_.push_back({to + i / heads_.group(), head * heads_.group() + i % heads_.group(), num_partials_ + i,
                           num_parts, num_rows});
      num_partials_ += num_parts * num_rows;
    }
  }

  // What every thread does.
  void forward(const fs_model& model, const fs_cache& cache, const fs_step& step, Team::Member& member) {
    const unsigned int mode = _mm_getcsr();
    // Whatever others set for this thread: round to nearest, and numbers too small for a normal one are zero, as
    // the products of bfloat16 pairs have it.
    _mm_setcsr(0x9fc0);
    Clock clock{step.seconds, member.thread == 0};
    float* x = x_;
    int64_t num_rows = step.num_rows;
    const float eps = float(model.norm_eps);
    member.run(num_rows, [&](int64_t i) { embed(model, step.tokens[i], x + i * width_, width_); });
    clock.lap(FS_EMBED);
    for (int64_t l = 0; l < model.num_layers; ++l) {
      const fs_layer& layer = model.layers[l];
      const bool is_last = l + 1 == model.num_layers;
      normalise(member, x, num_rows, layer.attention_norm, model.width, eps, normed_);
      clock.lap(FS_NORM);
      project_heads(member, layer, cache, step, l, num_rows, eps);
      clock.lap(FS_QKV);
      if (is_last && step.num_samples < num_rows) {
        member.run(step.num_samples, [&](int64_t i) {
          std::memcpy(last_x_ + i * width_, x + step.sample_rows[i] * width_, width_ * sizeof(float));
        });
        x = last_x_;
        num_rows = step.num_samples;
      }
      attend_all(member, is_last ? last_items_ : items_, is_last && step.num_samples < step.num_rows, layer, cache,
                 step, l);
      clock.lap(FS_ATTENTION);
      add_product(member, attended_, layer.out, x, num_rows);
      clock.lap(FS_OUT);
      normalise(member, x, num_rows, layer.mlp_norm, model.width, eps, normed_);
      clock.lap(FS_NORM);
      gate(member, layer.gate_up, num_rows);
      clock.lap(FS_GATE_UP);
      add_product(member, hidden_, layer.down, x, num_rows);
      clock.lap(FS_DOWN);
    }
    normalise(member, x, num_rows, model.norm, model.width, eps, normed_);
    clock.lap(FS_NORM);
    predict(member, model, num_rows, step.logits);
    clock.lap(FS_HEAD);
    _mm_setcsr(mode);
  }

  void normalise(Team::Member& member, const float* x, int64_t num_rows, const float* weight, int64_t width, float eps,
                 const Rows& to) {
    member.run(num_rows, [&](int64_t i) {
      norm_and_quantise(x + i * width_, weight, width, eps, to.num_groups(), to.row(i));
    });
  }

  // `each(panel or the like, first row, number of rows)`, all panels of one block of rows before the next block.
  template <class Each>
  void over_blocks(Team::Member& member, int64_t num_units, int64_t num_rows, Each each) {
    const int64_t num_blocks = (num_rows + ROW_BLOCK - 1) / ROW_BLOCK;
    member.run(num_units * num_blocks, [&](int64_t i) {
      const int64_t block = i / num_units;
      const int64_t begin = block * num_rows / num_blocks, end = (block + 1) * num_rows / num_blocks;
      each(i % num_units, begin, end - begin);
    });
  }

  void project_heads(Team::Member& member, const fs_layer& layer, const fs_cache& cache, const fs_step& step, int64_t l,
                     int64_t num_rows, float eps) {
    const int64_t num_heads = heads_.num_heads, num_kv_heads = heads_.num_kv_heads, half = heads_.head_dim / 2;
    const int64_t panels = head_columns_ / PANEL;
    over_blocks(member, num_heads + 2 * num_kv_heads, num_rows, [&](int64_t head, int64_t first, int64_t count) {
      for_tiles(first, count, [&](int64_t row, int n) {
        alignas(64) float y[ROWS * MAX_HEAD_DIM];
        for (int64_t p = 0; p < panels; ++p)
          multiply(normed_, row, n, layer.qkv, head * panels + p, y + p * PANEL, head_columns_);
        for (int r = 0; r < n; ++r) {
          float* h = y + r * head_columns_;
          const int64_t position = positions_[row + r];
          const int64_t block = step.tables[tables_[row + r] + position / heads_.page];
          if (head < num_heads + num_kv_heads) {
            if (layer.head_norm)
              norm_head(h, layer.head_norm + (head < num_heads ? 0 : heads_.head_dim), heads_.head_dim, eps);
            rotate(h, step.cos + position * half, step.sin + position * half, heads_.head_dim);
          }
          if (head < num_heads) {
            store_query(h, queries_ + ((row + r) * num_heads + head) * heads_.dims, heads_);
          } else if (head < num_heads + num_kv_heads) {
            store_key(h, heads_.place(cache.blocks, l, block, 0, head - num_heads, position), position, heads_);
          } else {
            store_value(h, heads_.place(cache.blocks, l, block, 1, head - num_heads - num_kv_heads, position),
                        position, heads_);
          }
        }
      });
    });
  }

  // The items, then the merging of those that were split.
  void attend_all(Team::Member& member, const std::vector<Item>& items, bool compact, const fs_layer& layer,
                  const fs_cache& cache, const fs_step& step, int64_t l) {
    float* memory = scratch_ + 2 * member.thread * scratch_size_;
    Scratch scratch{{memory, heads_.dims}, {memory + scratch_size_, heads_.dims}};
    const auto finish = [&](int64_t row, int64_t head, const Running& total) { keep(row, head, total); };
    member.run(int64_t(items.size()), [&](int64_t i) {
      attend(items[i], heads_, queries_, cache.blocks, step.tables, l, layer.window, scratch, partials_, finish);
    });
    if (compact || merges_.empty()) return;
    member.run(int64_t(merges_.size()), [&](int64_t i) {
      const Merge& merge = merges_[i];
      scratch.total.reset();
      for (int64_t part = 0; part < merge.num_parts; ++part)
        scratch.total.merge(partials_.at(merge.partial + part * merge.stride));
      keep(merge.row, merge.head, scratch.total);
    });
  }

  // Divides by the softmax's sum and quantises, as input of the output projection.
  void keep(int64_t row, int64_t head, const Running& total) {
    const Floats inverse = all(1.0f / sum(load(total.sums())));
    const float* values = total.values();
    for (int64_t i = 0; i < head_columns_; i += GROUP) {
      const Floats a = load(values + i) * inverse;
      const Floats b = i + LANES < heads_.dims ? load(values + i + LANES) * inverse : all(0.0f);
      quantise_group(a, b, attended_.row(row)[(head * head_columns_ + i) / GROUP]);
    }
  }

  // x += rows . linear
  void add_product(Team::Member& member, const Rows& rows, const fs_linear& linear, float* x, int64_t num_rows) {
    over_blocks(member, linear.num_outputs / PANEL, num_rows, [&](int64_t panel, int64_t first, int64_t count) {
      for_tiles(first, count, [&](int64_t row, int n) {
        alignas(64) float y[ROWS * PANEL];
        for (int r = 0; r < n; ++r) {  // from the second level, while the product runs
          const float* to = x + (row + r) * width_ + panel * PANEL;
          for (int64_t i = 0; i < PANEL; i += LANES) _mm_prefetch((const char*)(to + i), _MM_HINT_T0);
        }
        multiply(rows, row, n, linear, panel, y, PANEL);
        for (int r = 0; r < n; ++r) {
          float* to = x + (row + r) * width_ + panel * PANEL;
          store(to, load(to) + load(y + r * PANEL));
          store(to + LANES, load(to + LANES) + load(y + r * PANEL + LANES));
        }
      });
    });
  }

  // hidden = silu(gate) * up, two panels and so one group of hidden values at a time.
  void gate(Team::Member& member, const fs_linear& linear, int64_t num_rows) {
    over_blocks(member, linear.num_outputs / (2 * PANEL), num_rows, [&](int64_t group, int64_t first, int64_t count) {
      for_tiles(first, count, [&](int64_t row, int n) {
        alignas(64) float y[ROWS * 2 * PANEL];
        multiply(normed_, row, n, linear, 2 * group, y, 2 * PANEL);
        multiply(normed_, row, n, linear, 2 * group + 1, y + PANEL, 2 * PANEL);
        for (int r = 0; r < n; ++r) {
          const float* h = y + r * 2 * PANEL;
          quantise_group(swiglu(load(h), load(h + LANES)), swiglu(load(h + PANEL), load(h + PANEL + LANES)),
                         hidden_.row(row + r)[group]);
        }
      });
    });
  }

  // g / (1 + 2^(-g log2 e)) * u
  static INLINE Floats swiglu(Floats g, Floats u) {
    return g / (all(1.0f) + exp2(g * all(-1.44269504f))) * u;
  }

  void predict(Team::Member& member, const fs_model& model, int64_t num_rows, float* logits) {
    over_blocks(member, model.head.num_outputs / PANEL, num_rows, [&](int64_t panel, int64_t first, int64_t count) {
      const int64_t left = std::min<int64_t>(PANEL, model.vocab - panel * PANEL);
      for_tiles(first, count, [&](int64_t row, int n) {
        float* to = logits + row * model.vocab + panel * PANEL;
        if (left == PANEL) return multiply(normed_, row, n, model.head, panel, to, model.vocab);
        alignas(64) float y[ROWS * PANEL];
        multiply(normed_, row, n, model.head, panel, y, PANEL);
        for (int r = 0; r < n; ++r) std::memcpy(to + r * model.vocab, y + r * PANEL, left * sizeof(float));
      });
    });
  }

  // Adds up where the first thread's time goes.
  struct Clock {
    double* seconds;
    bool runs;
    std::chrono::steady_clock::time_point last = std::chrono::steady_clock::now();
    void lap(fs_part part) {
      if (!runs) return;
      const auto now = std::chrono::steady_clock::now();
      seconds[part] += std::chrono::duration<double>(now - last).count();
      last = now;
    }
  };

  const int num_threads_;
  Team team_;
  Heads heads_{};
  int64_t head_columns_ = 0, width_ = 0, scratch_size_ = 0, num_partials_ = 0;
  Buffer<Term> query_buffer_;
  Buffer<float> x_buffer_, last_x_buffer_, scratch_buffer_, partial_buffer_;
  Buffer<Group> normed_buffer_, attended_buffer_, hidden_buffer_;
  float *x_ = nullptr, *last_x_ = nullptr, *scratch_ = nullptr;
  Term* queries_ = nullptr;
  Rows normed_{}, attended_{}, hidden_{};
  Running partials_{};
  std::vector<int64_t> positions_, tables_;
  std::vector<Item> items_, last_items_, sorted_;
  std::vector<Merge> merges_;
};

}  // namespace

void* create(int64_t num_threads) { return new Runner(int(num_threads)); }
void destroy(void* runner) { delete static_cast<Runner*>(runner); }
void run(void* runner, const fs_model& model, const fs_cache& cache, const fs_step& step) {
  static_cast<Runner*>(runner)->step(model, cache, step);
}

void quantise(const float* x, int64_t num_groups, int8_t* codes, float* scales) {
  for (int64_t i = 0; i < num_groups; ++i) {
    Group group;
    quantise_group(load(x + i * GROUP), load(x + i * GROUP + LANES), group);
    std::memcpy(codes + i * GROUP, group.codes, GROUP);
    scales[i] = group.scale;
  }
}

void multiply_rows(const float* x, int64_t num_rows, const fs_linear& linear, float* y) {
  Buffer<Group> buffer;
  const Rows rows{buffer.get(num_rows * linear.num_inputs / GROUP), linear.num_inputs};
  for (int64_t i = 0; i < num_rows * rows.num_groups(); ++i)
    quantise_group(load(x + i * GROUP), load(x + i * GROUP + LANES), rows.groups[i]);
  for (int64_t panel = 0; panel < linear.num_outputs / PANEL; ++panel)
    for_tiles(0, num_rows, [&](int64_t row, int n) {
      multiply(rows, row, n, linear, panel, y + row * linear.num_outputs + panel * PANEL, linear.num_outputs);
    });
}

}  // namespace ISA
