#include "ops/scratch.h"

#include <cstdlib>
#include <mutex>
#include <string>

#include "fastpage/types.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastpage::ops {

void FreeDeleter::operator()(void* p) const { std::free(p); }

void* allocate_aligned(size_t bytes) {
  constexpr size_t kHugePage = size_t{2} << 20;
  const bool huge = bytes >= 2 * kHugePage;
  const size_t alignment = huge ? kHugePage : 64;
  const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* p = std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded);
  if (p == nullptr) {
    throw ResourceExhausted("out of memory: " + std::to_string(bytes) +
                            " bytes could not be allocated");
  }
#if defined(__linux__)
  if (huge) madvise(p, rounded, MADV_HUGEPAGE);  // advice: nothing is lost if it is not taken
#endif
  return p;
}

std::shared_ptr<char> allocate_shared(size_t bytes) {
  constexpr size_t kAlignment = 64;
  constexpr size_t kChunk = size_t{32} << 20;
  static std::mutex mutex;
  static std::weak_ptr<char> current;
  static size_t used = 0;
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  const auto new_chunk = [](size_t size) {
    return std::shared_ptr<char>(static_cast<char*>(allocate_aligned(size)), FreeDeleter());
  };
  if (rounded > kChunk / 2) return new_chunk(rounded);
  std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<char> chunk = current.lock();
  if (chunk == nullptr || used + rounded > kChunk) {
    chunk = new_chunk(kChunk);
    current = chunk;
    used = 0;
  }
  char* const block = chunk.get() + used;
  used += rounded;
  return {std::move(chunk), block};
}

}  // namespace fastpage::ops
