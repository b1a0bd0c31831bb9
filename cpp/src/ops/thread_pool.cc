#include "fastpage/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <exception>
#include <fstream>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>

#include "ops/fork_depth.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastpage {

namespace {

// A step issues its loops microseconds apart: spinning this long catches the next one, and an idle
// engine gives its cores back soon enough.
constexpr auto kSpinTime = std::chrono::microseconds(80);

#if defined(__linux__)
// Cores' worth of time that a container may use (cgroup v2, "<quota|max> <period>"); 0 = no limit.
int cgroup_cores() {
  std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r");
  if (file == nullptr) return 0;
  long quota = 0;
  long period = 0;
  const int fields = std::fscanf(file, "%ld %ld", &quota, &period);
  std::fclose(file);
  if (fields != 2 || quota <= 0 || period <= 0) return 0;
  return static_cast<int>((quota + period - 1) / period);
}

// Cores of which the set holds a CPU: two hyper-threads of one core share its arithmetic. A CPU of
// which the system does not say counts as a core.
int physical_cores(const cpu_set_t& set) {
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &set)) continue;
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                       "/topology/thread_siblings_list");
    std::string siblings;
    if (!std::getline(file, siblings)) siblings = "cpu " + std::to_string(cpu);
    cores.insert(siblings);
  }
  return static_cast<int>(cores.size());
}

int current_cpu() { return sched_getcpu(); }

// Moves this thread elsewhere if it is on `cpu`. The system may wake a worker on the CPU where its
// caller computes (the worker's last one, say) and takes milliseconds to part the two.
void leave_cpu(int cpu) {
  if (cpu < 0 || sched_getcpu() != cpu) return;
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
  cpu_set_t others = allowed;
  CPU_CLR(static_cast<size_t>(cpu), &others);
  if (CPU_COUNT(&others) == 0) return;
  if (sched_setaffinity(0, sizeof(others), &others) != 0) return;
  sched_setaffinity(0, sizeof(allowed), &allowed);
}

bool bind_this_thread(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<size_t>(cpu), &set);
  return pthread_setaffinity_np(pthread_self(), sizeof(set), &set) == 0;
}
#else
int current_cpu() { return -1; }
void leave_cpu(int) {}
bool bind_this_thread(int) { return false; }
#endif

void check_cpus(const std::vector<int>& cpus, int num_threads) {
  if (cpus.empty()) return;
  if (static_cast<int>(cpus.size()) < num_threads) {
    throw InvalidArgument(std::to_string(cpus.size()) + " CPUs for " + std::to_string(num_threads) +
                          " threads: name one for each");
  }
#if defined(__linux__)
  cpu_set_t set;
  const bool known = sched_getaffinity(0, sizeof(set), &set) == 0;
  for (const int cpu : cpus) {
    if (cpu < 0 || cpu >= CPU_SETSIZE || (known && !CPU_ISSET(static_cast<size_t>(cpu), &set))) {
      throw InvalidArgument("CPU " + std::to_string(cpu) +
                            " is none that this process may use: see taskset -p");
    }
  }
#else
  throw InvalidArgument("threads cannot be bound to CPUs on this system: name none");
#endif
}

int available_cores() {
  int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) cores = std::max(1, physical_cores(set));
  const int quota = cgroup_cores();
  if (quota > 0) cores = std::min(cores, quota);
#endif
  return cores;
}

inline void cpu_relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until done() or kSpinTime has passed; says whether it was done.
template <typename Done>
bool spin_until(bool oversubscribed, const Done& done) {
  const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      cpu_relax();
    }
    // With more threads than cores the one that is waited for may need this very core.
    if (oversubscribed) std::this_thread::yield();
  } while (std::chrono::steady_clock::now() < deadline);
  return done();
}

}  // namespace

// What is left of a part: pieces [begin, end), in one word, so that the thread whose part it is and
// those who take from its end agree by compare-and-swap.
class alignas(64) Cursor {
 public:
  void set(int64_t count) { word_.store(pack(0, count), std::memory_order_release); }

  bool take_first(int64_t* index) {
    return take([&](uint64_t begin, uint64_t end) {
      *index = static_cast<int64_t>(begin);
      return pack(begin + 1, end);
    });
  }
  bool take_last(int64_t* index) {
    return take([&](uint64_t begin, uint64_t end) {
      *index = static_cast<int64_t>(end - 1);
      return pack(begin, end - 1);
    });
  }

 private:
  static uint64_t pack(uint64_t begin, uint64_t end) { return begin << 32 | end; }

  template <typename Rest>
  bool take(const Rest& rest) {
    uint64_t word = word_.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t begin = word >> 32;
      const uint64_t end = word & 0xffffffff;
      if (begin >= end) return false;
      // Acquire: whoever has a piece sees what the loop's caller wrote before it dealt it out.
      if (word_.compare_exchange_weak(word, rest(begin, end), std::memory_order_acquire,
                                      std::memory_order_relaxed)) {
        return true;
      }
    }
  }

  std::atomic<uint64_t> word_{0};
};

// A loop is over when `pending` pieces are 0, whoever did them: nobody waits for a thread that has
// none. A thread that comes late, even from the loop before, finds no piece, or one of the loop in
// progress; that loop cannot end before the piece is done, so `fn` and `arg` are the loop's own for
// whoever has a piece, and for nobody else. A new epoch tells the workers that there are pieces.
// Whoever spins in vain sleeps on a condition variable. No wakeup is lost: a sleeper counts itself
// before it looks at the state a last time (under the mutex), the other side changes the state
// before it looks at the count (both sequentially consistent), so at least one of them sees the
// other.
struct ThreadPool::Impl {
  alignas(64) std::atomic<uint64_t> epoch{0};
  RawFn fn = nullptr;
  void* arg = nullptr;
  std::atomic<bool> stop{false};
  alignas(64) std::atomic<int64_t> pending{0};
  alignas(64) std::atomic<int> sleeping_workers{0};
  std::atomic<bool> caller_sleeps{false};
  bool oversubscribed = false;
  std::mutex run_mutex;
  std::mutex mutex;
  std::condition_variable work;
  std::condition_variable done;
  std::vector<std::thread> threads;
  std::vector<Cursor> cursors;      // per part
  std::vector<int> cpus;            // per thread, or none
  std::atomic<int> caller_cpu{-1};  // when it last had to wake a worker
  const int made_at_depth = fork_depth();

  bool workers_exist() const { return made_at_depth == fork_depth(); }

  void end_workers() {
    stop = true;
    announce();
    for (std::thread& thread : threads) thread.join();
  }

  void announce() {
    epoch.fetch_add(1, std::memory_order_seq_cst);
    if (sleeping_workers.load(std::memory_order_seq_cst) == 0) return;
    {
      std::lock_guard<std::mutex> lock(mutex);
      caller_cpu.store(current_cpu(), std::memory_order_relaxed);
      work.notify_all();
    }
    // One that the system has woken on this very CPU gets it for as long as it takes to move off.
    std::this_thread::yield();
  }

  void wait_for_epoch_after(uint64_t seen) {
    const auto changed = [&] { return epoch.load(std::memory_order_seq_cst) != seen; };
    // Whoever wants the core gets it now rather than amid a piece.
    if (spin_until(true, changed)) return;
    sleeping_workers.fetch_add(1, std::memory_order_seq_cst);
    {
      std::unique_lock<std::mutex> lock(mutex);
      work.wait(lock, changed);
    }
    sleeping_workers.fetch_sub(1, std::memory_order_relaxed);
    const bool may_move = cpus.empty() && !oversubscribed;
    if (may_move) leave_cpu(caller_cpu.load(std::memory_order_relaxed));
  }

  bool take(Pieces* pieces) {
    const int count = static_cast<int>(cursors.size());
    const int thread = pieces->thread_;
    pieces->part_ = thread;
    if (cursors[static_cast<size_t>(thread)].take_first(&pieces->index_)) return true;
    pieces->in_order_ = false;
    for (int i = 1; i < count; ++i) {
      pieces->part_ = thread + i < count ? thread + i : thread + i - count;
      if (cursors[static_cast<size_t>(pieces->part_)].take_last(&pieces->index_)) return true;
    }
    return false;
  }

  // Does what is to be had of the loop.
  void visit(Pieces pieces) {
    if (!pieces.next()) return;
    fn(arg, pieces);
    finish(pieces.num_taken_);
  }

  void finish(int64_t num_pieces) {
    if (pending.fetch_sub(num_pieces, std::memory_order_seq_cst) != num_pieces) return;
    if (caller_sleeps.load(std::memory_order_seq_cst)) {
      std::lock_guard<std::mutex> lock(mutex);
      done.notify_one();
    }
  }

  void wait_until_done() {
    const auto over = [&] { return pending.load(std::memory_order_seq_cst) == 0; };
    if (spin_until(oversubscribed, over)) return;
    caller_sleeps.store(true, std::memory_order_seq_cst);
    {
      std::unique_lock<std::mutex> lock(mutex);
      done.wait(lock, over);
    }
    caller_sleeps.store(false, std::memory_order_relaxed);
  }

  // A caller whom the system refuses, later on, is left where it is: that costs time, not results.
  void bind(int index) {
    thread_local const void* bound_by = nullptr;
    if (cpus.empty() || bound_by == this) return;
    bound_by = this;
    static_cast<void>(bind_this_thread(cpus[static_cast<size_t>(index)]));
  }

  void worker(int index) {
    bind(index);
    for (uint64_t seen = 0;;) {
      wait_for_epoch_after(seen);
      seen = epoch.load(std::memory_order_acquire);
      if (stop) return;
      visit(Pieces(*this, index));
    }
  }
};

ThreadPool::ThreadPool(int num_threads, std::vector<int> cpus)
    : impl_(std::make_unique<Impl>()),
      num_threads_(num_threads > 0 ? num_threads
                   : cpus.empty()  ? available_cores()
                                   : static_cast<int>(cpus.size())) {
  if (num_threads < 0) {
    throw InvalidArgument("num_threads is " + std::to_string(num_threads) +
                          ": give a positive number, or 0 for all cores");
  }
  check_cpus(cpus, num_threads_);
  impl_->cpus = std::move(cpus);
  impl_->cursors = std::vector<Cursor>(static_cast<size_t>(num_threads_));
  impl_->oversubscribed = num_threads_ > available_cores();
  for (int i = 1; i < num_threads_; ++i) {
    try {
      impl_->threads.emplace_back([impl = impl_.get(), i] { impl->worker(i); });
    } catch (const std::exception& e) {
      impl_->end_workers();
      throw ResourceExhausted("only " + std::to_string(i) + " of " + std::to_string(num_threads_) +
                              " threads could be started (" + e.what() + "): ask for fewer");
    }
  }
}

ThreadPool::~ThreadPool() {
  if (impl_->workers_exist()) {
    impl_->end_workers();
  } else {
    // Threads that are not here can be neither joined nor woken: leave them where they are.
    static_cast<void>(impl_.release());
  }
}

uint64_t ThreadPool::num_loops() const { return impl_->epoch.load(std::memory_order_relaxed); }

bool ThreadPool::Pieces::next() {
  if (pool_ == nullptr) return ++index_ < count_;
  if (!pool_->take(this)) return false;
  ++num_taken_;
  return true;
}

void ThreadPool::share_raw(RawCount count, const void* count_arg, RawFn fn, void* arg) {
  impl_->bind(0);
  if (num_threads_ == 1 || !impl_->workers_exist()) {
    for (int part = 0; part < num_threads_; ++part) {
      Pieces pieces(part, count(count_arg, part));
      if (pieces.next()) fn(arg, pieces);
    }
    return;
  }
  std::lock_guard<std::mutex> one_loop_at_a_time(impl_->run_mutex);
  int64_t pending = 0;
  for (int part = 0; part < num_threads_; ++part) pending += count(count_arg, part);
  if (pending == 0) return;
  impl_->fn = fn;
  impl_->arg = arg;
  impl_->pending.store(pending, std::memory_order_relaxed);
  for (int part = 0; part < num_threads_; ++part) {
    impl_->cursors[static_cast<size_t>(part)].set(count(count_arg, part));
  }
  impl_->announce();
  impl_->visit(Pieces(*impl_, 0));
  impl_->wait_until_done();
}

}  // namespace fastpage
