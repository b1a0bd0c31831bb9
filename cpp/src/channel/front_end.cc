#include "channel/front_end.h"

#include <sys/socket.h>

namespace fastpage {

size_t FrontEnd::send(const std::string& frame) {
  std::lock_guard<std::mutex> lock(mutex);
  if (gone) return 0;
  if (!out.send(socket.get(), {frame.data(), frame.size()})) give_up_locked();
  return out.size();
}

void FrontEnd::reserve(size_t frame_bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  out.reserve(frame_bytes);
}

void FrontEnd::flush() {
  std::lock_guard<std::mutex> lock(mutex);
  if (gone) return;
  if (!out.flush(socket.get())) give_up_locked();
  changed.notify_all();
}

size_t FrontEnd::num_unsent_bytes() {
  std::lock_guard<std::mutex> lock(mutex);
  return out.size();
}

void FrontEnd::give_up() {
  std::lock_guard<std::mutex> lock(mutex);
  give_up_locked();
}

void FrontEnd::give_up_locked() {
  if (gone) return;
  shutdown(socket.get(), SHUT_RDWR);
  out.clear();
}

void FrontEnd::notify() {
  std::lock_guard<std::mutex> lock(mutex);
  changed.notify_all();
}

void FrontEnd::close() {
  std::lock_guard<std::mutex> lock(mutex);
  gone = true;
  socket.close();
  out.clear();
  changed.notify_all();
}

}  // namespace fastpage
