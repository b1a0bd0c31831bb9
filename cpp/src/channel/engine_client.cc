#include <atomic>

#include "channel/messages.h"
#include "channel/socket_io.h"
#include "fastpage/engine_channel.h"

namespace fastpage {

namespace {

constexpr int kMostReadsAtOnce = 16;  // 1 MiB: an event loop has others to serve

RequestId next_id() {
  static std::atomic<RequestId> last{0};
  return ++last;
}

}  // namespace

struct EngineClient::State {
  explicit State(int fd) : socket((check_stream_socket(fd), fd)) {}

  void send(const FrontEndMessage& message);
  std::vector<EngineNews> receive();
  void close();

  Descriptor socket;
  ArchiveWriter writer;
  SendBuffer out;
  ReceiveBuffer in{UINT32_MAX};
  bool can_send = true;
  bool closed = false;
};

// An engine that is gone may still have said something: receive() finds out, and ends it.
void EngineClient::State::send(const FrontEndMessage& message) {
  if (closed || !can_send) return;
  const std::string& frame = make_frame(&writer, message);
  if (frame.size() - sizeof(uint32_t) > kMaxRequestBytes) {
    throw InvalidArgument("the request takes " + std::to_string(frame.size()) +
                          " bytes: " + std::to_string(kMaxRequestBytes) + " are possible");
  }
  can_send = out.send(socket.get(), {frame.data(), frame.size()});
  if (!can_send) out.clear();
}

std::vector<EngineNews> EngineClient::State::receive() {
  std::vector<EngineNews> news;
  for (int i = 0; i < kMostReadsAtOnce && !closed; ++i) {
    const ReceiveBuffer::Result result = in.receive(socket.get());
    if (result == ReceiveBuffer::Result::kNothingYet) break;
    if (result == ReceiveBuffer::Result::kEnd) close();
    while (const auto frame = in.next_frame()) read_message(*frame, &news.emplace_back());
  }
  return news;
}

void EngineClient::State::close() {
  closed = true;
  out.clear();
}

EngineClient::EngineClient(int socket) : s_(std::make_unique<State>(socket)) {}
EngineClient::~EngineClient() = default;

int EngineClient::fileno() const { return s_->socket.get(); }

RequestId EngineClient::add_request(Request request, std::string name) {
  FrontEndMessage message;
  message.kind = FrontEndMessage::Kind::kAddRequest;
  message.id = next_id();
  message.request = std::move(request);
  message.name = std::move(name);
  s_->send(message);
  return message.id;
}

void EngineClient::abort(RequestId id) {
  FrontEndMessage message;
  message.kind = FrontEndMessage::Kind::kAbort;
  message.id = id;
  s_->send(message);
}

void EngineClient::abort(RequestId id, int32_t index) {
  FrontEndMessage message;
  message.kind = FrontEndMessage::Kind::kAbortSample;
  message.id = id;
  message.index = index;
  s_->send(message);
}

void EngineClient::reset_prefix_cache() {
  FrontEndMessage message;
  message.kind = FrontEndMessage::Kind::kResetPrefixCache;
  s_->send(message);
}

void EngineClient::ping() {
  FrontEndMessage message;
  message.kind = FrontEndMessage::Kind::kPing;
  s_->send(message);
}

bool EngineClient::has_unsent() const { return s_->out.size() > 0; }

size_t EngineClient::num_unsent_bytes() const { return s_->out.size(); }

void EngineClient::flush() {
  if (!has_unsent()) return;
  s_->can_send = s_->out.flush(s_->socket.get());
  if (!s_->can_send) s_->out.clear();
}

// Whatever goes wrong, news are lost: there is no going on.
std::vector<EngineNews> EngineClient::receive() {
  try {
    return s_->receive();
  } catch (const InvalidArgument& error) {
    s_->close();
    throw Error(std::string(error.what()) + ": are the engine and its front end of one build?");
  } catch (...) {
    s_->close();
    throw;
  }
}

bool EngineClient::closed() const { return s_->closed; }

}  // namespace fastpage
