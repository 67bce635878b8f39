// What one build of the kernels (one instruction set) offers to library.cpp.
#pragma once
#include "abi.h"

constexpr int64_t MAX_HEAD_DIM = 512;

#define DECLARE_KERNELS                                                                                              \
  void* create(int64_t num_threads);                                                                                 \
  void destroy(void* runner);                                                                                        \
  void run(void* runner, const fs_model& model, const fs_cache& cache, const fs_step& step);                         \
  void quantise(const float* x, int64_t num_groups, int8_t* codes, float* scales);                                   \
  void multiply_rows(const float* x, int64_t num_rows, const fs_linear& linear, float* y);

namespace avx512bf16 {
DECLARE_KERNELS
}
namespace avx512 {
DECLARE_KERNELS
}
namespace avx2 {
DECLARE_KERNELS
}
