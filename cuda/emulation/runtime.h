// A CUDA grid on the CPU, for tests: kernels are compiled as C++, the threads of a block are fibers
// that switch where threads of a GPU may have to wait for one another, and blocks run one after the
// other. What real hardware leaves open is chosen by Settings: tests run a kernel under several and
// compare bits, since a missing barrier or wait shows as a difference, or as the NaNs that shared
// memory is filled with. An error (misaligned or out of bounds, threads that wait for different
// things) ends the launch with an exception.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one at a time

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}  // NOLINT
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
using cudaStream_t = void*;

// Of the fiber that runs.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace fastpage::cuda::emulation {

enum class Order { kAscending, kDescending, kRandom };
struct Settings {
  Order order = Order::kAscending;  // of the warps, lanes and blocks that could all run next
  bool late_copies = true;          // cp.async happens when it is waited for, not when issued
  uint64_t seed = 0;
};
inline Settings settings;

// Global memory that a launch may touch; none: anything.
struct Buffer {
  const char* begin;
  const char* end;
};
inline std::vector<Buffer> buffers;

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error("emulated kernel: " + what + " (thread " + std::to_string(threadIdx.x) +
                           " of block " + std::to_string(blockIdx.x) + ", " +
                           std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ")");
}

inline void check_global(const void* p, size_t bytes, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) {
    fail("a global access is not aligned to " + std::to_string(alignment) + " bytes");
  }
  const char* at = static_cast<const char*>(p);
  const auto holds = [&](const Buffer& b) { return at >= b.begin && at + bytes <= b.end; };
  if (!buffers.empty() && std::none_of(buffers.begin(), buffers.end(), holds)) {
    fail("a global access is outside of all arguments");
  }
}

inline int64_t bytes_loaded = 0;  // from global memory, by load_global

struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;  // of 16, the rest becomes zero
};

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  std::unique_ptr<char[]> stack;
  int index;
  bool started, done;
  const char* waits_for;  // null: it can run
  std::vector<Copy> copies;
  std::vector<std::vector<Copy>> groups;  // committed, the oldest first
};

struct Warp {
  int arrived = 0;
  const char* name = nullptr;  // of what its lanes have arrived at
  void* slots[32];
};

// See ptx.h.
bool has_ptx();
std::string symbol_of(const void* function);
void launch_ptx(const std::string& symbol, dim3 grid, dim3 size, size_t shared_bytes,
                const std::vector<std::vector<char>>& params);

constexpr size_t kStackBytes = 256 << 10;
inline int max_shared = 227 << 10;  // of sm_90
constexpr size_t kGuard = 1024;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point type

class Block;
inline Block* block = nullptr;

class Block {
 public:
  Block(dim3 size, size_t shared_bytes, std::function<void()> body)
      : body_(std::move(body)), shared_bytes_(shared_bytes), random_(settings.seed) {
    if (size.y != 1 || size.z != 1 || size.x == 0 || size.x % 32 != 0 || size.x > 1024) {
      fail("a block must be of 32 to 1024 threads, whole warps, in x");
    }
    fibers_.resize(size.x);
    warps_.resize(size.x / 32);
    for (Fiber& f : fibers_) f.stack.reset(new char[kStackBytes]);  // untouched memory is free
    memory_ = std::make_unique<char[]>(shared_bytes + kGuard + 1024);
    shared_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory_.get()) + 1023) & ~1023);
  }

  void run() {
    block = this;
    std::memset(shared_, kPoison, shared_bytes_ + kGuard);
    arrived_ = 0;
    running_ = static_cast<int>(fibers_.size());
    for (Warp& w : warps_) w.arrived = 0;
    for (size_t i = 0; i < fibers_.size(); ++i) {
      Fiber& f = fibers_[i];
      f.index = static_cast<int>(i);
      f.started = f.done = false;
      f.waits_for = nullptr;
      f.copies.clear();
      f.groups.clear();
    }
    while (running_ > 0) {
      bool any = false;
      // One warp as far as it gets, then the next.
      for (const int w : order(static_cast<int>(warps_.size()))) {
        for (bool ran = true; ran; any |= ran) {
          ran = false;
          for (const int lane : order(32)) {
            Fiber& f = fibers_[w * 32 + lane];
            if (f.done || f.waits_for != nullptr) continue;
            resume(&f);
            ran = true;
          }
        }
      }
      if (!any) fail_waiting();
    }
    for (size_t i = 0; i < kGuard; ++i) {
      if (static_cast<unsigned char>(shared_[shared_bytes_ + i]) != kPoison) {
        fail("a write behind shared memory");
      }
    }
  }

  char* shared() const { return shared_; }
  Fiber& current() const { return *current_; }

  void check_shared(const void* p, size_t bytes, size_t alignment) const {
    const char* at = static_cast<const char*>(p);
    if (at < shared_ || at + bytes > shared_ + shared_bytes_) fail("outside of shared memory");
    if (reinterpret_cast<uintptr_t>(p) % alignment != 0) fail("misaligned in shared memory");
  }

  void sync_threads() {
    if (++arrived_ == static_cast<int>(fibers_.size())) {
      arrived_ = 0;
      wake(0, static_cast<int>(fibers_.size()));
    } else {
      wait("__syncthreads");
    }
  }

  // fn(T*[32]) once all 32 lanes are here, each having brought its own T.
  template <typename T, typename Fn>
  void together(const char* name, T* mine, Fn fn) {
    const int w = current_->index / 32;
    Warp& warp = warps_[w];
    if (warp.arrived > 0 && std::strcmp(warp.name, name) != 0) {
      fail(std::string("lanes of a warp meet at ") + warp.name + " and at " + name);
    }
    warp.name = name;
    warp.slots[current_->index % 32] = mine;
    if (++warp.arrived < 32) return wait(name);
    warp.arrived = 0;
    T* lanes[32];
    for (int i = 0; i < 32; ++i) lanes[i] = static_cast<T*>(warp.slots[i]);
    fn(lanes);
    wake(w * 32, w * 32 + 32);
  }

 private:
  std::vector<int> order(int n) {
    std::vector<int> result(n);
    for (int i = 0; i < n; ++i) result[i] = settings.order == Order::kDescending ? n - 1 - i : i;
    if (settings.order == Order::kRandom) std::shuffle(result.begin(), result.end(), random_);
    return result;
  }

  void wake(int begin, int end) {
    for (int i = begin; i < end; ++i) fibers_[i].waits_for = nullptr;
  }

  void wait(const char* name) {
    current_->waits_for = name;
    if (_setjmp(current_->at) == 0) _longjmp(scheduler_, 1);
  }

  __attribute__((noinline)) void resume(Fiber* f) {
    current_ = f;
    threadIdx = dim3(static_cast<unsigned>(f->index), 0, 0);
    if (_setjmp(scheduler_) == 0) {
      if (f->started) _longjmp(f->at, 1);
      f->started = true;
      getcontext(&f->start);
      f->start.uc_stack.ss_sp = f->stack.get();
      f->start.uc_stack.ss_size = kStackBytes;
      makecontext(&f->start, &Block::enter, 0);
      setcontext(&f->start);
    }
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  static void enter() {
    Block* const b = block;
    try {
      b->body_();
      if (!b->current_->copies.empty()) fail("a cp.async that nothing waits for");
    } catch (...) {
      b->error_ = std::current_exception();
    }
    b->current_->done = true;
    --b->running_;
    _longjmp(b->scheduler_, 1);
  }

  [[noreturn]] void fail_waiting() {
    std::string where;
    for (const Fiber& f : fibers_) {
      if (f.done || (f.index > 0 && fibers_[f.index - 1].waits_for == f.waits_for)) continue;
      where += " " + std::to_string(f.index) + " at " + f.waits_for;
    }
    fail("threads wait for one another for ever, from" + where);
  }

  std::function<void()> body_;
  size_t shared_bytes_;
  std::mt19937_64 random_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::unique_ptr<char[]> memory_;
  char* shared_;
  int arrived_ = 0;
  int running_ = 0;
  Fiber* current_ = nullptr;
  jmp_buf scheduler_;
  std::exception_ptr error_;
};

// fn() for each block, in an order that the settings choose.
template <typename Fn>
void for_blocks(dim3 grid, Fn fn) {
  const int64_t n = int64_t{grid.x} * grid.y * grid.z;
  std::vector<int64_t> order(n);
  for (int64_t i = 0; i < n; ++i) order[i] = settings.order == Order::kDescending ? n - 1 - i : i;
  std::mt19937_64 random(settings.seed);
  if (settings.order == Order::kRandom) std::shuffle(order.begin(), order.end(), random);
  for (const int64_t i : order) {
    blockIdx = dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                    static_cast<unsigned>(i / grid.x / grid.y));
    fn();
  }
}

template <typename T>
std::vector<char> bytes_of(const T& value) {
  const char* const begin = reinterpret_cast<const char*>(&value);
  return {begin, begin + sizeof value};
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 size, size_t shared_bytes,
            const Args&... args) {
  if (has_ptx()) {
    return launch_ptx(symbol_of(reinterpret_cast<const void*>(kernel)), grid, size, shared_bytes,
                      {bytes_of(Params(args))...});
  }
  blockDim = size;
  gridDim = grid;
  Block b(size, shared_bytes, [&] { kernel(args...); });
  for_blocks(grid, [&] { b.run(); });
}

template <typename T, typename Fn>
T exchange(const char* name, T value, Fn source_of) {
  struct Lane {
    T in, out;
    int source;
  } mine{value, value, source_of(static_cast<int>(threadIdx.x % 32))};
  block->together(name, &mine, [](Lane** lanes) {
    for (int i = 0; i < 32; ++i) lanes[i]->out = lanes[lanes[i]->source & 31]->in;
  });
  return mine.out;
}

}  // namespace fastpage::cuda::emulation

inline void check_full(unsigned mask) {
  if (mask != 0xffffffffu) fastpage::cuda::emulation::fail("only whole warps are emulated");
}
inline void __syncthreads() { fastpage::cuda::emulation::block->sync_threads(); }
inline void __syncwarp() {
  char nothing;
  fastpage::cuda::emulation::block->together("__syncwarp", &nothing, [](char**) {});
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  check_full(mask);
  return fastpage::cuda::emulation::exchange("__shfl_sync", value, [=](int) { return source; });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  check_full(mask);
  return fastpage::cuda::emulation::exchange("__shfl_xor_sync", value,
                                             [=](int lane) { return lane ^ bits; });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int by) {
  check_full(mask);
  return fastpage::cuda::emulation::exchange(
      "__shfl_down_sync", value, [=](int lane) { return lane + by < 32 ? lane + by : lane; });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int by) {
  check_full(mask);
  return fastpage::cuda::emulation::exchange(
      "__shfl_up_sync", value, [=](int lane) { return lane - by >= 0 ? lane - by : lane; });
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  check_full(mask);
  struct Lane {
    bool in;
    unsigned out;
  } mine{predicate, 0};
  fastpage::cuda::emulation::block->together("__ballot_sync", &mine, [](Lane** lanes) {
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(lanes[i]->in) << i;
    for (int i = 0; i < 32; ++i) lanes[i]->out = bits;
  });
  return mine.out;
}
inline bool __any_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate); }

template <typename T, typename U>
T atomicAdd(T* p, U x) {
  return std::exchange(*p, static_cast<T>(*p + x));
}
template <typename T, typename U>
T atomicOr(T* p, U x) {
  return std::exchange(*p, static_cast<T>(*p | x));
}
template <typename T, typename U>
T atomicExch(T* p, U x) {
  return std::exchange(*p, static_cast<T>(x));
}
template <typename T, typename U>
T atomicMin(T* p, U x) {
  return std::exchange(*p, std::min(*p, static_cast<T>(x)));
}
template <typename T, typename U>
T atomicMax(T* p, U x) {
  return std::exchange(*p, std::max(*p, static_cast<T>(x)));
}
inline void __threadfence() {}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
// Compiled without contraction, these are what they say.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __expf(float x) { return std::exp(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::max;
using std::min;
