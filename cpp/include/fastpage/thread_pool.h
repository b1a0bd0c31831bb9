// A fixed set of threads for short parallel loops: the workers spin for a while after a loop, then
// sleep. Static split, no work stealing, so that who computes what is decided by the shape alone.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "fastpage/types.h"

namespace fastpage {

class ThreadPool {
 public:
  // num_threads counts the caller; 0 = the physical cores this process may use (on Linux: of its
  // affinity, no more than its container's CPU quota), or one for each of `cpus`.
  // cpus: thread i stays on CPU cpus[i], the caller from its first loop on and for good; empty:
  // wherever the system puts them. Throws InvalidArgument for a negative number, for fewer cpus
  // than threads or a CPU that this process may not use, ResourceExhausted if the system refuses a
  // thread.
  explicit ThreadPool(int num_threads = 0, std::vector<int> cpus = {});
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }
  // Loops so far that all threads took part in.
  uint64_t num_loops() const;

  // Runs fn(thread_index) on every thread of the pool, the caller being thread 0, and returns when
  // all are done. A loop waits for that of another caller to end; fn must not throw and must not
  // call run() again. In a child of fork(), which has no workers, the caller does all the parts.
  template <typename F>
  void run(F&& fn) {
    using Fn = std::remove_reference_t<F>;
    run_raw([](void* f, int t) { (*static_cast<Fn*>(f))(t); },
            const_cast<void*>(static_cast<const void*>(&fn)));
  }

  // Splits [0, n) in num_threads contiguous parts, multiples of `grain`: fn(begin, end,
  // thread_index).
  template <typename F>
  void parallel_for(int64_t n, int64_t grain, F&& fn) {
    const int64_t chunks = (n + grain - 1) / grain;
    if (chunks <= 1 || num_threads_ == 1) {
      if (n > 0) fn(int64_t{0}, n, 0);
      return;
    }
    run([&](int t) {
      const int64_t begin = chunks * t / num_threads_ * grain;
      const int64_t last = chunks * (t + 1) / num_threads_ * grain;
      const int64_t end = last < n ? last : n;
      if (begin < end) fn(begin, end, t);
    });
  }

 private:
  using RawFn = void (*)(void*, int);
  void run_raw(RawFn fn, void* arg);

  struct Impl;
  std::unique_ptr<Impl> impl_;
  int num_threads_;
};

}  // namespace fastpage
