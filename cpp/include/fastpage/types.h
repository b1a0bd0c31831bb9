// Basic ids, spans and errors. Everything else in libfastpage stands on this header.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastpage {

using TokenId = int32_t;
// A physical KV block: an index into the BlockPool and into every layer's KV cache.
using BlockId = int32_t;
// Given out by Engine / Scheduler, never reused within a process.
using RequestId = uint64_t;

inline constexpr BlockId kNoBlock = -1;

// A view of contiguous elements that somebody else owns (std::span is C++20).
template <typename T>
class Span {
 public:
  constexpr Span() = default;
  constexpr Span(T* data, size_t size) : data_(data), size_(size) {}
  template <typename U>
  Span(const std::vector<U>& v) : data_(v.data()), size_(v.size()) {}  // NOLINT: implicit
  template <typename U>
  Span(std::vector<U>& v) : data_(v.data()), size_(v.size()) {}  // NOLINT: implicit

  constexpr T* data() const { return data_; }
  constexpr size_t size() const { return size_; }
  constexpr bool empty() const { return size_ == 0; }
  constexpr T& operator[](size_t i) const { return data_[i]; }
  constexpr T* begin() const { return data_; }
  constexpr T* end() const { return data_ + size_; }
  constexpr Span subspan(size_t offset, size_t count) const { return {data_ + offset, count}; }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

// One block's contents, in every layer, is to be copied before the step runs (copy-on-write).
struct BlockCopy {
  BlockId src;
  BlockId dst;
};

// One block's contents, in every layer, are to be moved between the device's KV cache and the host
// tier: from `device` to `host` if it is swapped out, the other way round if it is swapped in.
struct BlockSwap {
  BlockId device;
  BlockId host;  // an index into the host tier
};

// What has to be done to the KV cache before a step computes anything: all swap_outs, then the
// block_copies in their order, then all swap_ins; and after the transfers of the step before.
struct BlockTransfers {
  std::vector<BlockSwap> swap_outs;
  std::vector<BlockCopy> block_copies;
  std::vector<BlockSwap> swap_ins;

  bool empty() const { return swap_outs.empty() && block_copies.empty() && swap_ins.empty(); }
  void clear() {
    swap_outs.clear();
    block_copies.clear();
    swap_ins.clear();
  }
};

enum class FinishReason : uint8_t {
  kNone,    // still running
  kStop,    // an EOS or a stop token id
  kLength,  // max_tokens or max_model_len
  kAbort,   // the caller gave it up
};

// Every error that libfastpage throws on purpose derives from Error. Messages are one line, name
// the thing that is wrong and, where there is one, the remedy.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The caller's mistake: a parameter out of range, a prompt that can never fit. Python: ValueError.
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

// Something has run out: memory for the cache, places in the queue. Python:
// fastpage.ResourceExhausted.
class ResourceExhausted : public Error {
 public:
  using Error::Error;
};

}  // namespace fastpage
