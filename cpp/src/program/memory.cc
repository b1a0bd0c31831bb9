#include "program/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <utility>

#include "fastpage/types.h"

namespace fastpage {

namespace {

// What can be had without swapping: free and reclaimable memory, within the limit of the control
// group (a container's limit).
size_t available_bytes() {
  size_t available = SIZE_MAX;
  std::ifstream meminfo("/proc/meminfo");
  std::string key;
  size_t kib = 0;
  std::string unit;
  while (meminfo >> key >> kib >> unit) {
    if (key == "MemAvailable:") available = kib * 1024;
  }
  size_t limit = 0;
  if (std::ifstream("/sys/fs/cgroup/memory.max") >> limit) available = std::min(available, limit);
  return available;
}

std::string mebibytes(size_t bytes) { return std::to_string(bytes >> 20) + " MiB"; }

}  // namespace

ZeroedMemory::ZeroedMemory(size_t bytes, const std::string& what, size_t promised) : size_(bytes) {
  if (bytes == 0) return;
  size_t available = available_bytes();
  available -= std::min(available, promised);
  if (bytes > available) {
    throw ResourceExhausted(what + " needs " + mebibytes(bytes) + ", but only " +
                            mebibytes(available) + " of memory are available");
  }
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    throw ResourceExhausted(what + " needs " + mebibytes(bytes) + ", which the system refuses");
  }
#ifdef MADV_HUGEPAGE
  madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  data_ = static_cast<std::byte*>(memory);
}

ZeroedMemory::~ZeroedMemory() {
  if (data_ != nullptr) munmap(data_, size_);
}

ZeroedMemory::ZeroedMemory(ZeroedMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

ZeroedMemory& ZeroedMemory::operator=(ZeroedMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

}  // namespace fastpage
