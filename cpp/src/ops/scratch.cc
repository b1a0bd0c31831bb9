#include "ops/scratch.h"

#include <cstdlib>
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

}  // namespace fastpage::ops
