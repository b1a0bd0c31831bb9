// What libFuzzer's bytes become.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <exception>

#include "random_requests.h"

namespace fastpage {

class Bytes : public Choices {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), end_(data + size) {}
  bool empty() const { return data_ == end_; }
  uint64_t below(uint64_t n) override {
    uint64_t value = 0;
    for (uint64_t left = n - 1; left > 0 && data_ != end_; left >>= 8)
      value = value << 8 | *data_++;
    return value % n;
  }

 private:
  const uint8_t* data_;
  const uint8_t* end_;
};

// An exception that leaves `run` is what is looked for.
template <typename Run>
int fuzz(const uint8_t* data, size_t size, Run run) {
  Bytes bytes(data, size);
  try {
    run(&bytes);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    std::abort();
  }
  return 0;
}

}  // namespace fastpage
