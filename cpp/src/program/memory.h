// Large blocks of zeroed memory, straight from the system.
#pragma once

#include <cstddef>
#include <string>

namespace fastpage {

// Zero pages that the system hands out as they are first touched: to reserve them costs nothing.
// Backed by huge pages where the system has them. Movable, not copyable.
class ZeroedMemory {
 public:
  ZeroedMemory() = default;
  // Throws ResourceExhausted, naming `what`, if the machine cannot hold so many bytes now beside
  // `promised` bytes that were handed out before and may not have been touched yet.
  ZeroedMemory(size_t bytes, const std::string& what, size_t promised = 0);
  ~ZeroedMemory();
  ZeroedMemory(ZeroedMemory&& other) noexcept;
  ZeroedMemory& operator=(ZeroedMemory&& other) noexcept;

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace fastpage
