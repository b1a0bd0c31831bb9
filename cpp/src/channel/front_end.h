// A front end, as EngineServer sees it.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <unordered_map>

#include "channel/messages.h"
#include "channel/socket_io.h"

namespace fastpage {

struct FrontEnd {
  using Clock = std::chrono::steady_clock;

  // Sends the frame, or keeps what the socket does not take. Returns what is unsent then.
  size_t send(const std::string& frame);
  // For one frame of so many bytes, which can be sent without any more memory. Nobody else sends
  // meanwhile, or the room would be theirs.
  class Room {
   public:
    Room(FrontEnd* front_end, size_t frame_bytes);
    void send(const std::string& frame) noexcept;
    // Keeps it for the next send(), or the first flush() that comes once `latest` is there.
    void hold(const std::string& frame, Clock::time_point latest) noexcept;

   private:
    FrontEnd* const front_end_;
    const std::lock_guard<std::mutex> lock_;
  };
  void flush();
  struct Unsent {
    size_t num_bytes;
    std::optional<Clock::time_point> held_until;  // none: as soon as the socket takes them
  };
  Unsent unsent();
  // It cannot be served any more. The I/O thread, which has to see to what it leaves behind, will
  // find its socket at its end.
  void give_up();
  // Waits while more than that is unsent, unless it has gone or `stopping` says so.
  template <typename Stopping>
  void wait_until_read(size_t max_unsent_bytes, Stopping stopping) {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] {
      // What is held may wait for the next send().
      return out.size() <= max_unsent_bytes || held_until.has_value() || gone || stopping();
    });
  }
  bool has_gone();
  void notify();  // `stopping` may say something else
  void close();

  size_t send_locked(const std::string& frame);
  void give_up_locked();

  // Of the I/O thread.
  ReceiveBuffer in{kMaxRequestBytes};

  // Guarded by the mutex. Only the I/O thread closes the socket.
  std::mutex mutex;
  std::condition_variable changed;
  Descriptor socket;
  SendBuffer out;
  std::optional<Clock::time_point> held_until;  // all of `out` is held, nothing waits to be taken
  bool gone = false;

  // Of the step thread: what it has not been told yet.
  StepOutput news;
  bool has_news = true;  // before the first step: the statistics
  Clock::time_point told_at{};

  // Guarded by the server's mutex.
  std::unordered_map<RequestId, RequestId> engine_ids;  // by those that the client gave out
  size_t num_resets_asked = 0;
};

}  // namespace fastpage
