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
  // Throws ResourceExhausted, naming `what`, if the machine cannot hold so many bytes now.
  ZeroedMemory(size_t bytes, const std::string& what);
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
