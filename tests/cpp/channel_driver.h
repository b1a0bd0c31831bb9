// Drives both ends of the engine channel beside peers that send anything, in any pieces, and stop
// at any moment, and checks from outside what must always hold:
//
//  1. What is read is what was written; what nobody has written is refused, and nothing else.
//  2. Frames arrive whole and in order, in however many pieces they are sent.
//  3. A client takes in all that a good engine said, to its end, and closes at anything else.
//  4. A front end is none the wiser whatever the others beside it do, and nothing of them is left.
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>

#include <cerrno>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "block_checks.h"
#include "channel/messages.h"
#include "channel/socket_io.h"
#include "fake_model.h"
#include "fastpage/engine_channel.h"
#include "random_requests.h"

namespace fastpage {

struct Ends {
  Descriptor one;
  Descriptor other;
};

inline Ends connected() {
  int fds[2];
  if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds) != 0) throw Broken("socketpair() failed");
  return {Descriptor(fds[0]), Descriptor(fds[1])};
}

// The least that a socket can hold, so that sending is often done by halves.
inline void make_narrow(int fd) {
  const int bytes = 1;
  setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
}

// What the socket takes at once. Returns how much that was.
inline size_t send_some(int fd, const char* bytes, size_t size) {
  const ssize_t sent = send(fd, bytes, size, MSG_DONTWAIT | MSG_NOSIGNAL);
  return sent > 0 ? static_cast<size_t>(sent) : 0;
}

template <typename Message>
std::string bytes_of(const Message& message) {
  ArchiveWriter writer;
  writer(message);
  return writer.bytes();
}

template <typename Message>
std::string frame_of(const Message& message) {
  ArchiveWriter writer;
  return make_frame(&writer, message);
}

inline Span<const char> span_of(const std::string& bytes) { return {bytes.data(), bytes.size()}; }

// ---------------------------------------------------------------- what is sent

inline Request any_request(Choices* choices) {
  Request request = to_request(absurd_request(choices));
  SamplingParams& params = request.params;
  for (float SamplingParams::* field :
       {&SamplingParams::top_p, &SamplingParams::min_p, &SamplingParams::repetition_penalty,
        &SamplingParams::presence_penalty, &SamplingParams::frequency_penalty}) {
    if (choices->one_in(16)) params.*field = any_float(choices);
  }
  if (choices->one_in(8)) params.logit_bias = {{any_int(choices), any_float(choices)}};
  if (choices->one_in(8)) params.allowed_token_ids = any_ints(choices, 5);
  if (choices->one_in(8)) params.bad_words = {any_ints(choices, 3), any_ints(choices, 3)};
  if (choices->one_in(8)) params.top_k = any_int(choices);
  if (choices->one_in(8)) params.seed = choices->below(~uint64_t{0});
  return request;
}

inline FrontEndMessage any_order(Choices* choices) {
  using Kind = FrontEndMessage::Kind;
  FrontEndMessage message;
  message.kind = choices->of({Kind::kAddRequest, Kind::kAddRequest, Kind::kAbort,
                              Kind::kAbortSample, Kind::kResetPrefixCache, Kind::kPing});
  message.id = choices->below(12);
  message.index = any_int(choices);
  if (message.kind != Kind::kAddRequest) return message;
  message.request = any_request(choices);
  if (choices->one_in(2)) message.name = std::string(choices->below(3), 'x');
  return message;
}

inline EngineNews any_news(Choices* choices) {
  using Kind = EngineNews::Kind;
  EngineNews news;
  news.kind = choices->of({Kind::kStep, Kind::kStep, Kind::kAccepted, Kind::kRefused,
                           Kind::kStepFailed, Kind::kReset, Kind::kAlive});
  news.request_id = choices->below(~uint64_t{0});
  news.error = std::string(choices->below(40), 'e');
  news.refusal =
      choices->of({EngineNews::Refusal::kInvalidArgument, EngineNews::Refusal::kResourceExhausted,
                   EngineNews::Refusal::kNameInUse});
  news.done = choices->one_in(2);
  news.progress = any_int(choices);
  news.step.num_tokens = any_int(choices);
  for (int32_t left = choices->between(0, 3); left > 0; --left) {
    RequestOutput& output = news.step.outputs.emplace_back();
    output.request_id = choices->below(12);
    output.index = any_int(choices);
    output.new_token_ids = any_ints(choices, 4);
    output.logprobs.resize(choices->below(3));
    for (TokenLogprobs& each : output.logprobs) each = {any_ints(choices, 3), {NAN}, 1};
    output.cumulative_logprob = any_float(choices);
  }
  for (int32_t left = choices->between(0, 2); left > 0; --left) {
    news.step.kv_events.emplace_back().token_ids = any_ints(choices, 4);
    news.step.kv_events.back().kind = KvEvent::Kind::kStored;
  }
  news.stats.num_steps = any_int(choices);
  return news;
}

inline std::string any_bytes(Choices* choices, uint64_t max_size) {
  std::string bytes(choices->below(max_size + 1), 0);
  const bool extreme = choices->one_in(2);  // the longest numbers and the shortest
  for (char& byte : bytes) {
    byte = static_cast<char>(extreme ? choices->of({0xff, 0x7f, 0x80, 1, 0})
                                     : static_cast<int>(choices->below(256)));
  }
  return bytes;
}

inline void damage(Choices* choices, std::string* bytes) {
  const size_t at = choices->below(bytes->size() + 1);
  switch (choices->below(4)) {
    case 0:
      return bytes->resize(at);
    case 1:
      *bytes += any_bytes(choices, 20);
      return;
    case 2:
      bytes->insert(at, any_bytes(choices, 20));
      return;
    default:
      if (at < bytes->size()) (*bytes)[at] ^= static_cast<char>(1 << choices->below(8));
  }
}

// A frame that says so, and yet is none; or the beginning of one, or one that is too long.
inline std::string any_damaged_frame(Choices* choices, std::string message) {
  if (choices->one_in(4)) return any_bytes(choices, 200);
  if (choices->one_in(2)) damage(choices, &message);
  ArchiveWriter writer;
  writer.fixed32(choices->one_in(3) ? static_cast<uint32_t>(choices->below(uint64_t{1} << 32))
                                    : static_cast<uint32_t>(message.size()));
  return writer.bytes() + message;
}

// ---------------------------------------------------------------- 1: messages

template <typename Message>
void check_reading(const std::string& bytes) {
  Message message;
  try {
    read_message(span_of(bytes), &message);
  } catch (const InvalidArgument&) {
    return;
  }
  const std::string written = bytes_of(message);
  Message again;
  read_message(span_of(written), &again);
  hold(bytes_of(again) == written, "a message is another once it was read");
}

inline void drive_messages(Choices* choices) {
  std::string order = bytes_of(any_order(choices));
  std::string news = bytes_of(any_news(choices));
  if (choices->one_in(4)) order = any_bytes(choices, 300);
  if (choices->one_in(4)) news = any_bytes(choices, 300);
  for (int32_t left = choices->between(0, 3); left > 0; --left) {
    damage(choices, &order);
    damage(choices, &news);
  }
  check_reading<FrontEndMessage>(order);
  check_reading<EngineNews>(news);
  try {
    read_message_head(span_of(order));
  } catch (const InvalidArgument&) {
  }
}

// ---------------------------------------------------------------- 2: frames

class BuffersDriver {
 public:
  static constexpr size_t kMaxFrameBytes = 40000;

  explicit BuffersDriver(Choices* choices) : ends_(connected()) {
    if (choices->one_in(2)) make_narrow(ends_.one.get());
  }

  void call_something(Choices* choices) {
    switch (choices->below(6)) {
      case 0:
      case 1:
        return send(any_frame(choices));
      case 2:
        return hold(out_.flush(ends_.one.get()), "a socket is gone that is there");
      case 3:
        return out_.reserve(choices->below(2 * kMaxFrameBytes));
      case 4:
        return give_up();
      default:
        receive();
    }
  }

  void drain() {
    while (!ended_ && (out_.size() > 0 || !expected_.empty())) {
      hold(out_.flush(ends_.one.get()), "a socket is gone that is there");
      receive();
    }
    if (ended_) return;
    ends_.one.close();
    // There may be some left of a frame that was given up.
    while (in_.receive(ends_.other.get()) != ReceiveBuffer::Result::kEnd) {
      hold(!in_.next_frame().has_value(), "a frame that nobody sent");
    }
  }

 private:
  std::string any_frame(Choices* choices) {
    const uint64_t size = choices->below(choices->of({2, 100, 5000, 50000}));
    return std::string(size, static_cast<char>(++num_sent_));
  }

  void send(const std::string& frame) {
    if (num_too_long_ > 0) return;
    num_too_long_ += frame.size() > kMaxFrameBytes;
    ArchiveWriter writer;
    writer.fixed32(static_cast<uint32_t>(frame.size()));
    hold(out_.send(ends_.one.get(), span_of(writer.bytes() + frame)), "a socket is gone");
    expected_.push_back(frame);
  }

  void receive() {
    if (ended_) return;
    hold(in_.receive(ends_.other.get()) != ReceiveBuffer::Result::kEnd, "an end that is none");
    try {
      while (const auto frame = in_.next_frame()) {
        hold(!expected_.empty(), "a frame that nobody sent");
        hold(frame->size() <= kMaxFrameBytes, "a frame that is too long");
        hold(std::string(frame->begin(), frame->end()) == expected_.front(), "another frame");
        expected_.pop_front();
      }
    } catch (const InvalidArgument&) {
      hold(expected_.front().size() > kMaxFrameBytes, "a frame is refused that may be");
      ended_ = true;
    }
  }

  // Where all whole frames were taken, as in EngineServer.
  void give_up() {
    if (ended_) return;
    const Span<const char> head = in_.give_up_frame();
    if (head.data() == nullptr) return;
    hold(expected_.front().compare(0, head.size(), head.data(), head.size()) == 0,
         "the beginning of another frame");
    expected_.pop_front();
  }

  Ends ends_;
  SendBuffer out_;
  ReceiveBuffer in_{kMaxFrameBytes};
  std::deque<std::string> expected_;
  int num_sent_ = 0;
  int num_too_long_ = 0;
  bool ended_ = false;
};

// ---------------------------------------------------------------- 3: a client

class ClientDriver {
 public:
  explicit ClientDriver(Choices* choices) : ends_(connected()), client_(ends_.other.release()) {
    if (choices->one_in(2)) make_narrow(ends_.one.get());
    if (choices->one_in(2)) make_narrow(client_.fileno());
  }

  void call_something(Choices* choices) {
    switch (choices->below(16)) {
      case 0:
        client_.add_request(any_request(choices));
        break;
      case 1:
        client_.abort(choices->below(1000));
        break;
      case 2:
        client_.abort(choices->below(1000), any_int(choices));
        break;
      case 3:
        choices->one_in(2) ? client_.reset_prefix_cache() : client_.ping();
        break;
      case 4:
        client_.flush();
        break;
      case 5:
      case 6:
        receive();
        break;
      case 7:
        drain_engine();
        break;
      case 8:
        if (choices->one_in(4)) say_anything(choices);
        break;
      case 9:
        if (choices->one_in(4)) ends_.one.close();
        break;
      case 10:
      case 11:
      case 12:
        send(choices->below(unsent_.size() + 1));
        break;
      default:
        say(choices);
    }
    hold(!client_.closed() || !client_.has_unsent(), "a closed client has something to send");
  }

  void drain() {
    for (size_t before = 0; ends_.one.get() >= 0 && before != unsent_.size(); receive()) {
      before = unsent_.size();
      send(before);
    }
    ends_.one.close();
    while (!client_.closed()) receive();
    hold(!good_ || num_received_ == num_whole_, "what a good engine said is lost");
    hold(client_.receive().empty(), "a closed client has news");
  }

 private:
  void say(Choices* choices) {
    const EngineNews news = any_news(choices);
    unsent_ += frame_of(news);
    if (!good_) return;
    expected_.push_back(bytes_of(news));
    ends_of_frames_.push_back(num_bytes_ + unsent_.size());
  }

  void say_anything(Choices* choices) {
    unsent_ += any_damaged_frame(choices, bytes_of(any_news(choices)));
    good_ = false;
  }

  void send(size_t size) {
    if (ends_.one.get() < 0) return;
    const size_t sent = send_some(ends_.one.get(), unsent_.data(), size);
    unsent_.erase(0, sent);
    num_bytes_ += sent;
    for (; !ends_of_frames_.empty() && ends_of_frames_.front() <= num_bytes_; ++num_whole_) {
      ends_of_frames_.pop_front();
    }
  }

  void drain_engine() {
    char bytes[4096];
    while (ends_.one.get() >= 0 && recv(ends_.one.get(), bytes, sizeof bytes, MSG_DONTWAIT) > 0) {
    }
  }

  void receive() {
    std::vector<EngineNews> all;
    try {
      all = client_.receive();
    } catch (const Error&) {
      hold(!good_, "a good engine's news are refused");
      hold(client_.closed(), "a client goes on with news lost");
      expected_.clear();  // some were in the same piece
    }
    for (const EngineNews& news : all) {
      ++num_received_;
      if (expected_.empty()) {
        hold(!good_, "news that nobody sent");
        continue;
      }
      hold(bytes_of(news) == expected_.front(), "other news");
      expected_.pop_front();
    }
  }

  Ends ends_;  // .one: the engine's
  EngineClient client_;
  bool good_ = true;  // all that the engine has said so far
  std::string unsent_;
  size_t num_bytes_ = 0;               // that were sent
  std::deque<std::string> expected_;   // news, until something else was said
  std::deque<size_t> ends_of_frames_;  // of those that are not sent yet, in bytes from the start
  size_t num_whole_ = 0;               // were sent to their end
  size_t num_received_ = 0;
};

// ---------------------------------------------------------------- 4: a server

class ServerDriver {
 public:
  explicit ServerDriver(Choices* choices)
      : config_(config(choices)),
        engine_(config_, std::make_shared<FakeModel>(config_.scheduler.num_blocks,
                                                     config_.scheduler.block_size, kFakeVocabSize,
                                                     model_options(config_))) {
    std::vector<int> servers;
    Ends good = connected();
    servers.push_back(good.one.release());
    client_ = std::make_unique<EngineClient>(good.other.release());
    for (int32_t left = choices->between(1, 3); left > 0; --left) {
      Ends ends = connected();
      if (choices->one_in(3)) make_narrow(ends.one.get());
      servers.push_back(ends.one.release());
      bad_.push_back(std::move(ends.other));
    }
    EngineServerConfig server_config;
    server_config.max_unsent_bytes = choices->of({64 << 20, 0, 1000});
    server_config.max_delay_seconds = choices->of({0.05, 0.0, 1e9});
    server_ = std::make_unique<EngineServer>(&engine_, servers, server_config);
    thread_ = std::thread([this] { server_->run(); });
  }
  ~ServerDriver() { end(); }

  void call_something(Choices* choices) {
    switch (choices->below(16)) {
      case 0:
      case 1:
        return add(choices);
      case 2:
        return abort(choices);
      case 3:
        if (client_->closed()) return;
        ++num_questions_;
        return choices->one_in(2) ? client_->reset_prefix_cache() : client_->ping();
      case 4:
        client_->flush();
        return receive();
      case 5:
        if (choices->one_in(32)) stop();
        return;
      default:
        return misbehave(choices, &bad_[choices->below(bad_.size())]);
    }
  }

  // The good front end hears all that it is owed, whatever the others have sent, as long as they
  // are read: for one that is not the engine waits.
  void drain() {
    while (!live_.empty() || num_questions_ > 0) {
      if (client_->closed()) {
        hold(stopped_, "a good front end was cut off");
        break;
      }
      wait();
    }
    end();
    engine_.check_integrity();
    const SchedulerStats stats = engine_.stats().scheduler;
    hold(stats.num_free_blocks == stats.num_blocks, "blocks are left in use");
    hold(stats.num_running + stats.num_waiting == 0, "requests are left");
    hold(!engine_.has_unfinished(), "something is left to do");
  }

 private:
  struct Told {
    std::vector<TokenId> expected;
    std::vector<TokenId> output;
    bool accepted = false;
    bool aborted = false;
  };

  static EngineConfig config(Choices* choices) {
    EngineConfig config;
    config.scheduler.num_blocks = 32;
    config.scheduler.num_host_blocks = choices->of({0, 8});
    config.scheduler.block_size = 4;
    config.scheduler.max_num_seqs = 8;
    config.scheduler.max_num_batched_tokens = 32;
    config.scheduler.max_model_len = 24;
    config.scheduler.max_num_waiting = choices->of({30, 6});
    config.scheduler.enable_kv_events = choices->one_in(2);
    config.scheduler.eos_token_ids = {0};
    config.vocab_size = kFakeVocabSize;
    config.async_scheduling = choices->one_in(2);
    return config;
  }
  static FakeModelOptions model_options(const EngineConfig& config) {
    return {config.scheduler.num_host_blocks, config.async_scheduling ? 2 : 1, true};
  }

  void add(Choices* choices) {
    if (client_->closed()) return;
    Request request;
    request.prompt_token_ids = random_prompt(choices, 12);
    request.params.max_tokens = choices->between(1, 12);
    request.params.temperature = 0;
    Told& told = live_[client_->add_request(request)];
    told.expected = fake_completion(request.prompt_token_ids, request.params, 0,
                                    config_.scheduler.eos_token_ids,
                                    config_.scheduler.max_model_len, kFakeVocabSize)
                        .tokens;
  }

  void stop() {
    stopped_ = true;
    server_->stop();
  }

  void abort(Choices* choices) {
    if (live_.empty()) return;
    auto it = live_.begin();
    std::advance(it, choices->below(live_.size()));
    it->second.aborted = true;
    if (choices->one_in(2)) {
      client_->abort(it->first);
    } else {
      client_->abort(it->first, 0);
    }
  }

  void misbehave(Choices* choices, Descriptor* bad) {
    if (bad->get() < 0) return;
    const FrontEndMessage order = any_order(choices);
    const uint64_t how = choices->below(16);
    std::string bytes;
    if (how < 8) {
      bytes = frame_of(order);
    } else if (how < 10) {
      bytes = any_damaged_frame(choices, bytes_of(order));
    } else if (how < 11) {
      bytes = frame_of(order).substr(0, choices->below(40));
    } else if (how < 14) {
      read(*bad, choices->one_in(4) ? 1 << 20 : 100);
      return;
    } else if (how < 15) {
      shutdown(bad->get(), choices->of({SHUT_WR, SHUT_RD, SHUT_RDWR}));
    } else if (choices->one_in(4)) {
      bad->close();
    }
    send_some(bad->get(), bytes.data(), bytes.size());
  }

  // False at the end.
  static bool read(const Descriptor& bad, size_t most) {
    char bytes[4096];
    while (most > 0) {
      const ssize_t n = recv(bad.get(), bytes, std::min(most, sizeof bytes), MSG_DONTWAIT);
      if (n < 0) return errno == EAGAIN || errno == EWOULDBLOCK;
      if (n == 0) return false;
      most -= static_cast<size_t>(n);
    }
    return true;
  }

  // For anything from the server.
  void wait() {
    std::vector<pollfd> polled = {{client_->fileno(), POLLIN, 0}};
    if (client_->has_unsent()) polled[0].events |= POLLOUT;
    for (const Descriptor& bad : bad_) polled.push_back({bad.get(), POLLIN, 0});
    poll(polled.data(), polled.size(), -1);
    for (Descriptor& bad : bad_) {
      if (!read(bad, 1 << 20)) bad.close();
    }
    client_->flush();
    receive();
  }

  void receive() {
    for (const EngineNews& news : client_->receive()) take(news);
  }

  void take(const EngineNews& news) {
    switch (news.kind) {
      case EngineNews::Kind::kAccepted: {
        hold(live_.count(news.request_id) == 1, "accepted: who?");
        Told& told = live_[news.request_id];
        hold(!told.accepted, "accepted twice");
        told.accepted = true;
        return;
      }
      case EngineNews::Kind::kRefused:
        hold(news.refusal == EngineNews::Refusal::kResourceExhausted, "refused: why?");
        hold(live_.count(news.request_id) == 1 && !live_[news.request_id].accepted,
             "refused: who?");
        live_.erase(news.request_id);
        return;
      case EngineNews::Kind::kStep:
        for (const RequestOutput& output : news.step.outputs) take(output);
        return;
      case EngineNews::Kind::kStepFailed:
        throw Broken("a step has failed: " + news.error);
      case EngineNews::Kind::kReset:
      case EngineNews::Kind::kAlive:
        hold(num_questions_-- > 0, "an answer to nothing");
    }
  }

  void take(const RequestOutput& output) {
    const auto it = live_.find(output.request_id);
    hold(it != live_.end(), "an output after the last one");
    Told& told = it->second;
    hold(told.accepted, "an output of what was not accepted");
    told.output.insert(told.output.end(), output.new_token_ids.begin(), output.new_token_ids.end());
    if (output.finish_reason == FinishReason::kNone) return;
    if (output.finish_reason == FinishReason::kAbort) {
      hold(told.aborted, "a request of which nobody wanted the end");
      told.expected.resize(std::min(told.expected.size(), told.output.size()));
    }
    hold(told.output == told.expected, "another output");
    live_.erase(it);
  }

  // All that was said is left lying.
  void end() {
    if (!thread_.joinable()) return;
    client_.reset();
    bad_.clear();
    thread_.join();
  }

  const EngineConfig config_;
  Engine engine_;
  std::unique_ptr<EngineServer> server_;
  std::unique_ptr<EngineClient> client_;
  std::vector<Descriptor> bad_;
  std::thread thread_;
  std::map<RequestId, Told> live_;
  int num_questions_ = 0;
  bool stopped_ = false;
};

// ---------------------------------------------------------------- any of them

template <typename Driver>
void drive(Choices* choices, int32_t max_calls) {
  Driver driver(choices);
  for (int32_t left = choices->between(0, max_calls); left > 0; --left) {
    driver.call_something(choices);
  }
  driver.drain();
}

}  // namespace fastpage
