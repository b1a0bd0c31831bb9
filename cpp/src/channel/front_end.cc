#include "channel/front_end.h"

#include <sys/socket.h>

namespace fastpage {

size_t FrontEnd::send(const std::string& frame) {
  std::lock_guard<std::mutex> lock(mutex);
  return send_locked(frame);
}

size_t FrontEnd::send_locked(const std::string& frame) {
  if (gone) return 0;
  bool sent;
  if (held_until.has_value()) {
    out.keep({frame.data(), frame.size()});
    held_until.reset();
    sent = out.flush(socket.get());
  } else {
    sent = out.send(socket.get(), {frame.data(), frame.size()});
  }
  if (!sent) give_up_locked();
  return out.size();
}

FrontEnd::Room::Room(FrontEnd* front_end, size_t frame_bytes)
    : front_end_(front_end), lock_(front_end->mutex) {
  front_end->out.reserve(frame_bytes);
}

void FrontEnd::Room::send(const std::string& frame) noexcept { front_end_->send_locked(frame); }

void FrontEnd::Room::hold(const std::string& frame, Clock::time_point latest) noexcept {
  if (front_end_->gone) return;
  if (front_end_->out.size() == 0) front_end_->held_until = latest;
  front_end_->out.keep({frame.data(), frame.size()});
}

void FrontEnd::flush() {
  std::lock_guard<std::mutex> lock(mutex);
  if (gone) return;
  held_until.reset();
  if (!out.flush(socket.get())) give_up_locked();
  changed.notify_all();
}

FrontEnd::Unsent FrontEnd::unsent() {
  std::lock_guard<std::mutex> lock(mutex);
  return {out.size(), held_until};
}

void FrontEnd::give_up() {
  std::lock_guard<std::mutex> lock(mutex);
  give_up_locked();
}

void FrontEnd::give_up_locked() {
  if (gone) return;
  shutdown(socket.get(), SHUT_RDWR);
  out.clear();
  held_until.reset();
}

bool FrontEnd::has_gone() {
  std::lock_guard<std::mutex> lock(mutex);
  return gone;
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
  held_until.reset();
  changed.notify_all();
}

}  // namespace fastpage
