#include "ops/fork_depth.h"

#include <pthread.h>

#include <atomic>

namespace fastpage {

int fork_depth() {
  static std::atomic<int> depth{0};
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { depth.fetch_add(1, std::memory_order_relaxed); });
  static_cast<void>(registered);
  return depth.load(std::memory_order_relaxed);
}

}  // namespace fastpage
