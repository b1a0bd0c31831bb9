#include "channel/socket_io.h"

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

namespace fastpage {

namespace {

// A buffer that has grown beyond this is given back once it is empty.
constexpr size_t kKeptBytes = 1 << 20;

uint32_t fixed32_at(const char* bytes) {
  uint32_t value = 0;
  for (int i = 0; i < 4; ++i) {
    value |= static_cast<uint32_t>(static_cast<uint8_t>(bytes[i])) << (8 * i);
  }
  return value;
}

bool would_block() { return errno == EAGAIN || errno == EWOULDBLOCK; }

// As many as the socket takes now. -1: the other end is gone.
ssize_t send_now(int fd, const char* bytes, size_t size) {
  size_t sent = 0;
  while (sent < size) {
    const ssize_t n = ::send(fd, bytes + sent, size - sent, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n >= 0) {
      sent += static_cast<size_t>(n);
    } else if (errno != EINTR) {
      // ENOBUFS, ENOMEM: of the system, for now.
      if (would_block() || errno == ENOBUFS || errno == ENOMEM) break;
      return -1;
    }
  }
  return static_cast<ssize_t>(sent);
}

}  // namespace

Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
  if (this != &other) {
    close();
    fd_ = other.release();
  }
  return *this;
}

int Descriptor::release() {
  const int fd = fd_;
  fd_ = -1;
  return fd;
}

void Descriptor::close() {
  if (fd_ >= 0) ::close(release());
}

void check_stream_socket(int fd) {
  int type = 0;
  socklen_t size = sizeof type;
  if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) != 0) {
    throw InvalidArgument("descriptor " + std::to_string(fd) +
                          " is no socket: " + std::strerror(errno));
  }
  if (type != SOCK_STREAM) {
    throw InvalidArgument("descriptor " + std::to_string(fd) + " is no stream socket");
  }
}

bool SendBuffer::send(int fd, Span<const char> bytes) {
  reserve(bytes.size());  // first: half a frame cannot be taken back
  ssize_t sent = 0;
  if (size() == 0) {
    sent = send_now(fd, bytes.data(), bytes.size());
    if (sent < 0) return false;
  }
  bytes_.insert(bytes_.end(), bytes.begin() + sent, bytes.end());
  return true;
}

void SendBuffer::keep(Span<const char> bytes) {
  reserve(bytes.size());
  bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
}

// Moves what is unsent only once as much was sent, so that each byte is moved but once or twice.
void SendBuffer::reserve(size_t num_more) {
  if (bytes_.capacity() - bytes_.size() >= num_more) return;
  if (sent_ >= size()) {
    bytes_.erase(bytes_.begin(), bytes_.begin() + static_cast<ptrdiff_t>(sent_));
    sent_ = 0;
  }
  const size_t needed = bytes_.size() + num_more;
  if (needed > bytes_.capacity()) bytes_.reserve(std::max(needed, 2 * bytes_.capacity()));
}

bool SendBuffer::flush(int fd) {
  const ssize_t sent = send_now(fd, bytes_.data() + sent_, size());
  if (sent < 0) return false;
  sent_ += static_cast<size_t>(sent);
  if (size() == 0) clear();
  return true;
}

void SendBuffer::clear() {
  bytes_.clear();
  sent_ = 0;
  if (bytes_.capacity() > kKeptBytes) std::vector<char>().swap(bytes_);
}

void ReceiveBuffer::make_room() {
  if (begin_ > 0) {
    std::copy(bytes_.begin() + static_cast<ptrdiff_t>(begin_),
              bytes_.begin() + static_cast<ptrdiff_t>(end_), bytes_.begin());
    end_ -= begin_;
    begin_ = 0;
  }
  if (end_ == 0 && bytes_.size() > kKeptBytes) std::vector<char>().swap(bytes_);
  if (bytes_.size() - end_ < kReadBytes) {
    bytes_.resize(std::max(end_ + kReadBytes, 2 * bytes_.size()));
  }
}

ReceiveBuffer::Result ReceiveBuffer::receive(int fd) {
  make_room();
  while (true) {
    const ssize_t n = recv(fd, bytes_.data() + end_, kReadBytes, MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && (would_block() || errno == ENOBUFS || errno == ENOMEM)) return Result::kNothingYet;
    if (n <= 0) return Result::kEnd;
    end_ += static_cast<size_t>(n);
    const size_t dropped = std::min(num_to_drop_, size());
    begin_ += dropped;
    num_to_drop_ -= dropped;
    return Result::kReceived;
  }
}

std::optional<Span<const char>> ReceiveBuffer::next_frame() {
  if (size() < sizeof(uint32_t)) return std::nullopt;
  const size_t frame_bytes = fixed32_at(bytes_.data() + begin_);
  if (frame_bytes > max_frame_bytes_) {
    throw InvalidArgument("a message of " + std::to_string(frame_bytes) +
                          " bytes: " + std::to_string(max_frame_bytes_) + " are allowed");
  }
  if (size() - sizeof(uint32_t) < frame_bytes) return std::nullopt;
  const char* frame = bytes_.data() + begin_ + sizeof(uint32_t);
  begin_ += sizeof(uint32_t) + frame_bytes;
  return Span<const char>(frame, frame_bytes);
}

Span<const char> ReceiveBuffer::give_up_frame() {
  if (size() < sizeof(uint32_t)) return {};
  const char* frame = bytes_.data() + begin_ + sizeof(uint32_t);
  const size_t there = size() - sizeof(uint32_t);
  num_to_drop_ = fixed32_at(bytes_.data() + begin_) - there;
  begin_ = end_;
  return {frame, there};
}

}  // namespace fastpage
