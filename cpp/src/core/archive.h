// Plain data as bytes and back: what the log of a scheduler's calls and the messages of the engine
// channel are made of. A struct has one function for both directions,
//
//   template <typename Archive> void transfer(Archive& archive, Struct& value)
//
// which takes it apart by a structured binding: a field that is added to the struct does not
// compile until it is transferred, too.
//
// Integers are varints (7 bits a byte, low ones first; signed ones zigzag-coded), 64-bit unsigned
// ones and floats are fixed (little-endian), enumerators a byte, lists are preceded by their
// length.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "fastpage/types.h"

namespace fastpage {

// The largest enumerator of each enum that is read: they count from 0.
template <typename Enum>
inline constexpr Enum kLastOf = Enum{};

class ArchiveWriter {
 public:
  template <typename... Fields>
  void operator()(const Fields&... fields) {
    (put(fields), ...);
  }
  void varint(uint64_t value) {
    for (; value >= 0x80; value >>= 7) byte(static_cast<uint8_t>(value | 0x80));
    byte(static_cast<uint8_t>(value));
  }
  void fixed32(uint32_t value) { fixed<4>(value); }
  void raw(const char* data, size_t size) { bytes_.append(data, size); }
  void overwrite_fixed32(size_t position, uint32_t value) {
    for (int i = 0; i < 4; ++i) bytes_[position + i] = static_cast<char>(value >> (8 * i));
  }

  const std::string& bytes() const { return bytes_; }
  void clear() {
    bytes_.clear();
    if (bytes_.capacity() > kKeptBytes) std::string().swap(bytes_);
  }

 private:
  // What was needed for something unusually long is given back.
  static constexpr size_t kKeptBytes = 1 << 20;

  void byte(uint8_t value) { bytes_.push_back(static_cast<char>(value)); }
  template <int kSize>
  void fixed(uint64_t value) {
    char bytes[kSize];
    for (int i = 0; i < kSize; ++i) bytes[i] = static_cast<char>(value >> (8 * i));
    raw(bytes, kSize);
  }

  void put(bool value) { byte(value ? 1 : 0); }
  void put(int32_t value) { put(int64_t{value}); }
  void put(int64_t value) {
    varint(static_cast<uint64_t>(value) << 1 ^ static_cast<uint64_t>(value >> 63));
  }
  void put(uint64_t value) { fixed<8>(value); }
  void put(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    fixed<4>(bits);
  }
  void put(double value) {
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    fixed<8>(bits);
  }
  void put(const std::string& text) {
    varint(text.size());
    bytes_ += text;
  }
  void put(Span<const TokenId> ids) {
    varint(ids.size());
    for (const TokenId id : ids) varint(static_cast<uint32_t>(id));
  }
  void put(const std::vector<TokenId>& ids) { put(Span<const TokenId>(ids)); }
  template <typename T>
  void put(const std::optional<T>& value) {
    put(value.has_value());
    if (value) put(*value);
  }
  template <typename A, typename B>
  void put(const std::pair<A, B>& value) {
    (*this)(value.first, value.second);
  }
  template <typename T>
  void put(const std::vector<T>& values) {
    varint(values.size());
    for (const T& value : values) put(value);
  }
  template <typename T>
  void put(const T& value) {
    if constexpr (std::is_enum_v<T>) {
      byte(static_cast<uint8_t>(value));
    } else {
      transfer(*this, const_cast<T&>(value));  // a writer changes nothing
    }
  }

  std::string bytes_;
};

// What an archive says when its source is over in the midst of something.
struct ArchiveEnded {};

// Source: uint8_t byte(), throwing ArchiveEnded after the last; size_t at_most(uint64_t n), n or
// how many bytes there are, if that is known and less, and else 0; [[noreturn]] void damaged(const
// char* what), for what no ArchiveWriter has written. Whatever a count says, no more is allocated
// than a small multiple of what the source holds.
template <typename Source>
class ArchiveReader {
 public:
  template <typename... Arguments>
  explicit ArchiveReader(Arguments&&... arguments)
      : source_(std::forward<Arguments>(arguments)...) {}

  template <typename... Fields>
  void operator()(Fields&... fields) {
    (get(fields), ...);
  }
  Source& source() { return source_; }
  uint8_t byte() { return source_.byte(); }
  uint64_t varint() {
    uint64_t value = 0;
    for (int shift = 0;; shift += 7) {
      const uint8_t next = byte();
      if (shift == 63 && next > 1) source_.damaged("a number of more than 64 bits");
      value |= static_cast<uint64_t>(next & 0x7f) << shift;
      if (next < 0x80) return value;
    }
  }
  uint32_t fixed32() { return static_cast<uint32_t>(fixed(4)); }

 private:
  uint64_t fixed(int size) {
    uint64_t value = 0;
    for (int i = 0; i < size; ++i) value |= static_cast<uint64_t>(byte()) << (8 * i);
    return value;
  }
  uint8_t enumerator(int last) {
    const uint8_t value = byte();
    if (value > last) source_.damaged("an unknown kind");
    return value;
  }

  void get(bool& value) { value = enumerator(1) != 0; }
  void get(int32_t& value) {
    int64_t wide;
    get(wide);
    value = static_cast<int32_t>(wide);
    if (value != wide) source_.damaged("a number of more than 32 bits");
  }
  void get(int64_t& value) {
    const uint64_t bits = varint();
    value = static_cast<int64_t>(bits >> 1 ^ (~(bits & 1) + 1));
  }
  void get(uint64_t& value) { value = fixed(8); }
  void get(float& value) {
    const uint32_t bits = fixed32();
    std::memcpy(&value, &bits, sizeof bits);
  }
  void get(double& value) {
    const uint64_t bits = fixed(8);
    std::memcpy(&value, &bits, sizeof bits);
  }
  void get(std::string& text) {
    text.clear();
    uint64_t left = varint();
    text.reserve(source_.at_most(left));
    for (; left > 0; --left) text.push_back(static_cast<char>(byte()));
  }
  void get(std::vector<TokenId>& ids) {
    ids.clear();
    uint64_t left = varint();
    ids.reserve(source_.at_most(left));
    for (; left > 0; --left) {
      const uint64_t id = varint();
      if (id > UINT32_MAX) source_.damaged("a token id of more than 32 bits");
      ids.push_back(static_cast<TokenId>(static_cast<uint32_t>(id)));
    }
  }
  template <typename T>
  void get(std::optional<T>& value) {
    value.reset();
    bool has_value;
    get(has_value);
    if (has_value) get(value.emplace());
  }
  template <typename A, typename B>
  void get(std::pair<A, B>& value) {
    (*this)(value.first, value.second);
  }
  template <typename T>
  void get(std::vector<T>& values) {
    values.clear();
    for (uint64_t left = varint(); left > 0; --left) get(values.emplace_back());
  }
  template <typename T>
  void get(T& value) {
    if constexpr (std::is_enum_v<T>) {
      value = static_cast<T>(enumerator(static_cast<int>(kLastOf<T>)));
    } else {
      transfer(*this, value);
    }
  }

  Source source_;
};

}  // namespace fastpage
