// Threads that go through the phases of a step together, and wait for work rather than for each other.
//
// In a phase each thread takes the next tasks until there are none, and goes on once all tasks are done, whoever did
// them. So a thread that the system holds up between two tasks delays no phase, and one held up in a task delays the
// others by that task; only the end of a step is waited for by all. Waiting is a short spin, then sleep, which gives the
// core to whoever is held up. (An OpenMP barrier waits for threads: with one other busy process on two cores, a decode
// step of 8 ms took 180.)
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace ISA {

class Team {
 public:
  explicit Team(int num_threads) : num_threads_(num_threads) {
    try {
      for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this, i] { work(i); });
    } catch (...) {  // no more threads are to be had
      stop();
      throw;
    }
  }
  Team(const Team&) = delete;
  ~Team() { stop(); }

  // `walk(thread)` on every thread: the same calls of `run`, with phases 0 to num_phases - 1 at most once each.
  void step(int64_t num_phases, std::function<void(int)> walk) {
    if (num_phases > num_phases_) {
      phases_ = std::make_unique<Phase[]>(num_phases);
      num_phases_ = num_phases;
    }
    for (int64_t i = 0; i < num_phases; ++i) {
      phases_[i].next.store(0, std::memory_order_relaxed);
      phases_[i].done.store(0, std::memory_order_relaxed);
    }
    walk_ = std::move(walk);
    inside_.store(num_threads_ - 1, std::memory_order_relaxed);
    call();
    walk_(0);
    wait(inside_, [](int32_t inside) { return inside == 0; });
  }

  // `task(i)` for each i below num_tasks, on some thread; returns when all are done.
  template <class Task>
  void run(int64_t phase, int64_t num_tasks, Task task) {
    if (num_threads_ == 1) {
      for (int64_t i = 0; i < num_tasks; ++i) task(i);
      return;
    }
    const int32_t total = int32_t(num_tasks), share = std::max(1, total / (num_threads_ * 32));
    Phase& here = phases_[phase];
    int32_t mine = 0;
    for (;;) {
      const int32_t first = here.next.fetch_add(share, std::memory_order_relaxed);
      if (first >= total) break;
      const int32_t end = std::min(first + share, total);
      for (int32_t i = first; i < end; ++i) task(i);
      mine += end - first;
    }
    if (mine && here.done.fetch_add(mine, std::memory_order_acq_rel) + mine == total) here.done.notify_all();
    wait(here.done, [total](int32_t done) { return done == total; });
  }

 private:
  struct alignas(64) Phase {
    std::atomic<int32_t> next{0};
    alignas(64) std::atomic<int32_t> done{0};
  };

  template <class Enough>
  static int32_t wait(std::atomic<int32_t>& value, Enough enough) {
    for (int spin = 0; spin < 2000; ++spin) {  // some 50 microseconds
      const int32_t found = value.load(std::memory_order_acquire);
      if (enough(found)) return found;
      _mm_pause();
    }
    for (;;) {
      const int32_t found = value.load(std::memory_order_acquire);
      if (enough(found)) return found;
      value.wait(found, std::memory_order_acquire);
    }
  }

  void stop() {
    stopping_ = true;
    call();
    for (std::thread& thread : threads_) thread.join();
  }

  void call() {
    called_.fetch_add(1, std::memory_order_release);
    called_.notify_all();
  }

  void work(int thread) {
    for (int32_t seen = 0;;) {
      seen = wait(called_, [seen](int32_t called) { return called != seen; });
      if (stopping_) return;
      walk_(thread);
      if (inside_.fetch_sub(1, std::memory_order_acq_rel) == 1) inside_.notify_all();
    }
  }

  const int num_threads_;
  std::vector<std::thread> threads_;
  std::unique_ptr<Phase[]> phases_;
  int64_t num_phases_ = 0;
  std::function<void(int)> walk_;
  std::atomic<int32_t> called_{0}, inside_{0};
  std::atomic<bool> stopping_{false};
};

}  // namespace ISA
