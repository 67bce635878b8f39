// The library's C interface: picks the instruction set, keeps exceptions inside.
//
// Every function that can fail returns 0 or a number from `fs_error`. Arguments are trusted: the caller has checked them.
#include <new>

#include "kernels.h"
#include "splice.h"

namespace {

enum fs_error { FS_OK = 0, FS_NO_MEMORY = 1, FS_FAILED = 2 };

struct Kernels {
  void* (*create)(int64_t);
  void (*destroy)(void*);
  void (*run)(void*, const fs_model&, const fs_cache&, const fs_step&);
  void (*quantise)(const float*, int64_t, int8_t*, float*);
  void (*multiply_rows)(const float*, int64_t, const fs_linear&, float*);
};

#define KERNELS_OF(isa) \
  { isa::create, isa::destroy, isa::run, isa::quantise, isa::multiply_rows }

// By number. Each includes those before it, and all compute the same bits.
const Kernels KERNELS[] = {KERNELS_OF(avx2), KERNELS_OF(avx512), KERNELS_OF(avx512bf16)};

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

bool has_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

const Kernels& kernels(int64_t isa) { return KERNELS[isa]; }

template <class Call>
int guarded(Call call) {
  try {
    call();
    return FS_OK;
  } catch (const std::bad_alloc&) {
    return FS_NO_MEMORY;
  } catch (...) {
    return FS_FAILED;
  }
}

struct Handle {
  const Kernels& kernels;
  void* runner;
};

}  // namespace

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// Changes with what the structures of abi.h mean; their sizes say the rest.
EXPORT int64_t fs_abi() { return 1 << 24 | int64_t(sizeof(fs_model)) << 12 | int64_t(sizeof(fs_step)); }

// What the library was built from, see build.py.
EXPORT const char* fs_sources() { return SOURCES; }

// The best instruction set of this processor, by number: AVX2, AVX-512 with VNNI, and with bfloat16 too; -1: none.
EXPORT int64_t fs_best_isa() {
  __builtin_cpu_init();
  return has_bf16() ? 2 : has_avx512() ? 1 : has_avx2() ? 0 : -1;
}

EXPORT void* fs_create(int64_t isa, int64_t num_threads) {
  Handle* handle = nullptr;
  guarded([&] { handle = new Handle{kernels(isa), kernels(isa).create(num_threads)}; });
  return handle;
}

EXPORT void fs_destroy(void* handle) {
  Handle* h = static_cast<Handle*>(handle);
  h->kernels.destroy(h->runner);
  delete h;
}

EXPORT int fs_run(void* handle, const fs_model* model, const fs_cache* cache, const fs_step* step) {
  Handle* h = static_cast<Handle*>(handle);
  return guarded([&] { h->kernels.run(h->runner, *model, *cache, *step); });
}

// On the calling thread, between two steps.
EXPORT void fs_move(const fs_model* model, const fs_cache* cache, const fs_splice* splice) {
  Splicer(*model, *cache).run(*splice);
}

// One kernel at a time, for tests and on the calling thread: groups of fp32 to codes; rows of fp32, quantised, times a
// linear.
EXPORT void fs_quantise(int64_t isa, const float* x, int64_t num_groups, int8_t* codes, float* scales) {
  kernels(isa).quantise(x, num_groups, codes, scales);
}

EXPORT int fs_multiply(int64_t isa, const float* x, int64_t num_rows, const fs_linear* linear, float* y) {
  return guarded([&] { kernels(isa).multiply_rows(x, num_rows, *linear, y); });
}
}
