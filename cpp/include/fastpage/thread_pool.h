// A fixed set of threads for short parallel loops: the workers spin for a while after a loop, then
// sleep. A loop is dealt out in contiguous parts, one a thread; whoever is through with its own
// takes pieces of the others' from their ends, so that a thread whose core the system gave to
// somebody else holds up no more than the piece in its hands. Who computes what is left to chance:
// it must not show in the result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "fastpage/types.h"

namespace fastpage {

class ThreadPool {
  struct Impl;

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
  // Loops so far that were dealt out to the threads.
  uint64_t num_loops() const;

  // What one thread does of a loop, piece by piece.
  class Pieces {
   public:
    // From 0 to num_threads() - 1: no two threads within a loop have the same. The caller is 0.
    int thread() const { return thread_; }
    // The piece in hand: of part part() the index()-th.
    int part() const { return part_; }
    int64_t index() const { return index_; }
    // The one before it in its part was the one before it in hand, too, or it is the first.
    bool in_order() const { return in_order_; }
    // Takes the next piece. False if all are taken.
    bool next();

   private:
    friend class ThreadPool;
    friend struct Impl;
    Pieces(Impl& pool, int thread) : pool_(&pool), thread_(thread) {}
    // Without a pool: all of one part.
    Pieces(int part, int64_t count) : part_(part), index_(-1), count_(count) {}

    Impl* const pool_ = nullptr;
    const int thread_ = 0;
    int part_ = 0;
    int64_t index_ = 0;
    const int64_t count_ = 0;
    int64_t num_taken_ = 0;
    bool in_order_ = true;
  };

  // Deals out num_threads() parts of count(part) pieces each, fewer than 2^31. Every thread that
  // gets to a piece calls fn(pieces), which does that piece and goes on while pieces.next(): once,
  // or again where it was there before all parts were dealt out. Returns when all are done. A loop
  // waits for that of another caller to end; fn must not throw and must not start another loop. In
  // a child of fork(), which has no workers, the caller does all of it.
  template <typename Count, typename F>
  void share(const Count& count, F&& fn) {
    using Fn = std::remove_reference_t<F>;
    const RawCount raw_count = [](const void* c, int part) {
      return static_cast<int64_t>((*static_cast<const Count*>(c))(part));
    };
    const RawFn raw_fn = [](void* f, Pieces& pieces) { (*static_cast<Fn*>(f))(pieces); };
    share_raw(raw_count, &count, raw_fn, const_cast<void*>(static_cast<const void*>(&fn)));
  }

  // Runs fn(part) once for each of num_threads() parts, on whichever threads.
  template <typename F>
  void run(F&& fn) {
    share([](int) { return 1; },
          [&](Pieces& pieces) {
            do {
              fn(pieces.part());
            } while (pieces.next());
          });
  }

  // Splits [0, n) in pieces that are multiples of `grain`: fn(begin, end, thread), several times on
  // a thread.
  template <typename F>
  void parallel_for(int64_t n, int64_t grain, F&& fn) {
    const int64_t chunks = (n + grain - 1) / grain;
    if (chunks <= 1 || num_threads_ == 1) {
      if (n > 0) fn(int64_t{0}, n, 0);
      return;
    }
    const int64_t in_a_piece = std::max<int64_t>(1, chunks / (kPiecesOfPart * num_threads_));
    const int64_t pieces_in_all = (chunks + in_a_piece - 1) / in_a_piece;
    const auto first = [&](int part) { return pieces_in_all * part / num_threads_; };
    share([&](int part) { return first(part + 1) - first(part); },
          [&](Pieces& pieces) {
            do {
              const int64_t piece = first(pieces.part()) + pieces.index();
              const int64_t begin = piece * in_a_piece * grain;
              fn(begin, std::min(n, begin + in_a_piece * grain), pieces.thread());
            } while (pieces.next());
          });
  }

 private:
  // Of parallel_for(): enough that what is left at the end is little.
  static constexpr int64_t kPiecesOfPart = 8;

  using RawCount = int64_t (*)(const void*, int);
  using RawFn = void (*)(void*, Pieces&);
  void share_raw(RawCount count, const void* count_arg, RawFn fn, void* arg);

  std::unique_ptr<Impl> impl_;
  int num_threads_;
};

}  // namespace fastpage
