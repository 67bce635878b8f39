// What Python hands to the kernels: plain structures of 8-byte fields, mirrored one for one in native_decoder.py.
//
// No Python, no torch: the library has a C interface, so it is built by any compiler in a second's notice, pairs with
// every Python and every torch, and a process that uses it need not load torch at all.
#pragma once
#include <cstdint>

extern "C" {

// Weights of one product, int8 in groups of 32 inputs. A panel is 32 outputs. `num_outputs` and `num_inputs` are padded
// to multiples of 32; codes of the padding are zero.
struct fs_linear {
  const uint8_t* codes;    // [outputs / 32][inputs / 4][32][4], each the code + 128
  const uint16_t* scales;  // bfloat16 [outputs / 32][inputs / 32][32]
  const float* bias;       // [outputs] or null
  int64_t num_outputs;
  int64_t num_inputs;
};

struct fs_layer {
  const float* attention_norm;  // [padded width]
  const float* mlp_norm;        // [padded width]
  const float* head_norm;       // [2][head_dim], of queries and keys, or null
  fs_linear qkv;                // width -> heads, each padded to a multiple of 32
  fs_linear out;                // heads, each padded -> width
  fs_linear gate_up;            // width -> panels of 16 gates and their 16 ups
  fs_linear down;               // hidden -> width
  int64_t window;               // positions a row sees, 0: all
};

struct fs_model {
  int64_t vocab, width, num_layers, num_heads, num_kv_heads, head_dim;
  double norm_eps;
  const float* embed;  // [vocab][width]
  const float* norm;   // [padded width]
  fs_linear head;
  const fs_layer* layers;
};

// Keys and values in bfloat16, a block's layers next to each other: [block][layer][key, value][kv head][page / 16], then
// 16 positions of keys as [dims / 2][16][2] and of values as [8][dims][2] (dims: head_dim padded to a multiple of 16).
// Whichever way they are summed, one load brings a pair of terms for 16 lanes.
struct fs_cache {
  uint16_t* blocks;
  int64_t num_blocks, page;
};

// Rows of one sequence: positions start to start + length; its block table begins at tables[table].
struct fs_span {
  int64_t start, length, table;
};

// `length` positions, copied from `source_start` on of one block table to `start` on of another. Keys turn by cos and sin
// [head_dim / 2][length], in the pairs (i, i + head_dim / 2); without these they keep their bits.
struct fs_splice {
  const int32_t* source;
  const int32_t* table;
  int64_t source_start, start, length;
  const float* cos;
  const float* sin;
};

enum fs_part { FS_EMBED, FS_NORM, FS_QKV, FS_ATTENTION, FS_OUT, FS_GATE_UP, FS_DOWN, FS_HEAD, FS_NUM_PARTS };

struct fs_step {
  int64_t num_rows, num_spans, num_samples;
  const int32_t* tokens;       // [num_rows]
  const fs_span* spans;        // [num_spans]
  const int32_t* tables;
  const int32_t* sample_rows;  // [num_samples], ascending
  const float* cos;            // [positions][head_dim / 2]
  const float* sin;
  float* logits;               // [num_samples][vocab]
  double* seconds;             // [FS_NUM_PARTS], added to
};
}
