// Threads that go through the phases of a step together, and wait for work rather than for each other.
//
// In a phase each thread does the tasks of its own stretch, then what is left of the others', and goes on once all are
// done, whoever did them. Neighbouring tasks share rows, weights and cache lines of their results, hence stretches. A
// thread takes a few tasks at a time, a share; one that the system holds up between two shares delays no phase, and one
// held up in a share delays the others by that share; only the end of a step is waited for by all. Waiting is a short spin, then sleep, which gives the core to
// whoever is held up. (An OpenMP barrier waits for threads: with one other busy process on two cores, a decode step of
// 8 ms took 180.)
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

  // Where the stretch of `thread` begins, of `total` tasks.
  int32_t stretch(int64_t total, int thread) const { return int32_t(total * thread / num_threads_); }

  // One thread on its way through a step.
  class Member {
   public:
    const int thread;

    // `task(i)` for each i below num_tasks, on some thread; returns when all are done. Every member makes the same
    // calls in the same order, as many as the step's phases at most.
    template <class Task>
    void run(int64_t num_tasks, Task task) {
      team_.run(phase_++, thread, int32_t(num_tasks), task);
    }

   private:
    friend class Team;
    Member(Team& team, int thread) : thread(thread), team_(team) {}
    Team& team_;
    int64_t phase_ = 0;
  };

  // `walk(member)` on every thread.
  void step(int64_t num_phases, std::function<void(Member&)> walk) {
    if (num_phases > num_phases_) {
      done_ = std::make_unique<Counter[]>(num_phases);
      next_ = std::make_unique<Counter[]>(num_phases * num_threads_);
      num_phases_ = num_phases;
    }
    for (int64_t i = 0; i < num_phases; ++i) done_[i].value.store(0, std::memory_order_relaxed);
    for (int64_t i = 0; i < num_phases * num_threads_; ++i) next_[i].value.store(0, std::memory_order_relaxed);
    walk_ = std::move(walk);
    inside_.store(num_threads_ - 1, std::memory_order_relaxed);
    call();
    walk_as(0);
    wait(inside_, [](int32_t inside) { return inside == 0; });
  }

 private:
  struct alignas(64) Counter {
    std::atomic<int32_t> value{0};
  };

  template <class Task>
  void run(int64_t phase, int thread, int32_t total, Task& task) {
    if (num_threads_ == 1) {
      for (int32_t i = 0; i < total; ++i) task(i);
      return;
    }
    const int32_t share = std::max(1, total / (num_threads_ * 32));
    std::atomic<int32_t>& done = done_[phase].value;
    for (int turn = 0; turn < num_threads_; ++turn) {
      const int owner = (thread + turn) % num_threads_;
      const int32_t begin = stretch(total, owner), end = stretch(total, owner + 1);
      std::atomic<int32_t>& next = next_[phase * num_threads_ + owner].value;
      while (next.load(std::memory_order_relaxed) < end - begin) {
        const int32_t first = begin + next.fetch_add(share, std::memory_order_relaxed);
        if (first >= end) break;
        const int32_t last = std::min(first + share, end);
        for (int32_t i = first; i < last; ++i) task(i);
        if (done.fetch_add(last - first, std::memory_order_acq_rel) + last - first == total) done.notify_all();
      }
    }
    wait(done, [total](int32_t found) { return found == total; });
  }

  void walk_as(int thread) {
    Member member(*this, thread);
    walk_(member);
  }

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
      walk_as(thread);
      if (inside_.fetch_sub(1, std::memory_order_acq_rel) == 1) inside_.notify_all();
    }
  }

  const int num_threads_;
  std::vector<std::thread> threads_;
  std::unique_ptr<Counter[]> done_, next_;  // [phases], [phases][threads]
  int64_t num_phases_ = 0;
  std::function<void(Member&)> walk_;
  std::atomic<int32_t> called_{0}, inside_{0};
  std::atomic<bool> stopping_{false};
};

}  // namespace ISA
