// Aligned memory that grows and is kept: what a kernel needs for the length of a call.
#pragma once

#include <cstddef>
#include <memory>

namespace fastpage::ops {

struct FreeDeleter {
  void operator()(void* p) const;
};
template <typename T>
using AlignedArray = std::unique_ptr<T[], FreeDeleter>;

// At least 64-byte aligned, uninitialised; large arrays ask the system for huge pages. Throws
// ResourceExhausted.
void* allocate_aligned(size_t bytes);

// The same in memory that is shared by many such blocks, large enough for huge pages even where a
// block is not. It goes back to the system with the last of them.
std::shared_ptr<char> allocate_shared(size_t bytes);

class Scratch {
 public:
  // Room for n floats, contents undefined.
  float* floats(size_t n) {
    if (n > capacity_) {
      data_.reset();
      capacity_ = 0;
      data_.reset(static_cast<float*>(allocate_aligned(n * sizeof(float))));
      capacity_ = n;
    }
    return data_.get();
  }

 private:
  AlignedArray<float> data_;
  size_t capacity_ = 0;
};

}  // namespace fastpage::ops
