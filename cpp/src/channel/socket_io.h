// A connected stream socket, without waiting: bytes that it does not take yet, and frames of which
// not all bytes are there yet.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "fastpage/types.h"

namespace fastpage {

// Owns a file descriptor.
class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(other.release()) {}
  Descriptor& operator=(Descriptor&& other) noexcept;
  ~Descriptor() { close(); }

  int get() const { return fd_; }
  int release();
  void close();

 private:
  int fd_;
};

// Throws InvalidArgument unless `fd` is one.
void check_stream_socket(int fd);

// Bytes on their way out.
class SendBuffer {
 public:
  // Sends what the socket takes at once, and keeps the rest. Throws bad_alloc with nothing sent.
  // False: the other end is gone.
  bool send(int fd, Span<const char> bytes);
  // For a later flush(). Throws bad_alloc with nothing kept.
  void keep(Span<const char> bytes);
  // send() or keep() of that much will not throw.
  void reserve(size_t num_more);
  bool flush(int fd);
  size_t size() const { return bytes_.size() - sent_; }
  void clear();

 private:
  std::vector<char> bytes_;
  size_t sent_ = 0;
};

// Bytes on their way in, as frames.
class ReceiveBuffer {
 public:
  explicit ReceiveBuffer(size_t max_frame_bytes) : max_frame_bytes_(max_frame_bytes) {}

  enum class Result : uint8_t { kReceived, kNothingYet, kEnd };
  // Takes what is there, kReadBytes at most. Throws bad_alloc with nothing taken. kEnd: the other
  // end is gone, and all that it sent was received.
  static constexpr size_t kReadBytes = 64 << 10;
  Result receive(int fd);
  // The next frame, if it is there; valid until the next call of receive(). Throws InvalidArgument
  // for one that is longer than may be.
  std::optional<Span<const char>> next_frame();
  // For a frame that there is no memory for: what is there of it. The rest will be dropped.
  Span<const char> give_up_frame();

 private:
  size_t size() const { return end_ - begin_; }
  void make_room();

  const size_t max_frame_bytes_;
  std::vector<char> bytes_;  // received, and not returned: [begin_, end_)
  size_t begin_ = 0;
  size_t end_ = 0;
  size_t num_to_drop_ = 0;
};

}  // namespace fastpage
