// The engine channel with peers that send garbage, die, or do not read.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>

#include "channel/front_end.h"
#include "channel_fixture.h"
#include "random_requests.h"

namespace fastpage {
namespace {

template <typename Message>
std::string frame_of(const Message& message) {
  ArchiveWriter writer;
  return make_frame(&writer, message);
}

std::string add_frame(RequestId id, const Request& r) {
  FrontEndMessage message;
  message.kind = FrontEndMessage::Kind::kAddRequest;
  message.id = id;
  message.request = r;
  return frame_of(message);
}

std::string random_bytes(Choices* choices, size_t size) {
  std::string bytes(size, 0);
  for (char& byte : bytes) byte = static_cast<char>(choices->below(256));
  return bytes;
}

// As much as the other end takes.
void send_all(int fd, const std::string& bytes) {
  size_t sent = 0;
  while (sent < bytes.size()) {
    const ssize_t n = send(fd, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
    if (n <= 0) return;
    sent += static_cast<size_t>(n);
  }
}

// Waits until the other end has closed it.
void read_to_end(int fd) {
  char bytes[4096];
  while (recv(fd, bytes, sizeof bytes, 0) > 0) {
  }
}

// Some of everything in it.
Request rich_request() {
  Request r = request({1, 2, 3, 4, 5}, 6);
  r.params.n = 2;
  r.params.temperature = 0.5f;
  r.params.logit_bias = {{3, 1.5f}, {4, -2.0f}};
  r.params.allowed_token_ids = {1, 2, 3, 4};
  r.params.bad_words = {{1, 2}, {3}};
  r.params.stop_token_ids = {7};
  r.params.seed = 99;
  r.params.logprobs = 2;
  r.cache_salt = "salt";
  r.priority = -3;
  return r;
}

EngineNews rich_news() {
  EngineNews news;
  news.kind = EngineNews::Kind::kStep;
  news.step.step_id = 12;
  news.step.num_tokens = 3;
  RequestOutput output{};
  output.request_id = 5;
  output.index = 1;
  output.new_token_ids = {4, 5, -1};
  output.logprobs = {{{4, 5}, {-0.5f, -1.5f}, 1}};
  output.prompt_logprobs = {{{4}, {-0.5f}, 3}, {{5}, {-0.25f}, 4}};
  output.finish_reason = FinishReason::kStop;
  output.cumulative_logprob = -3.25;
  news.step.outputs = {output, output};
  KvEvent event{};
  event.kind = KvEvent::Kind::kStored;
  event.token_ids = {1, 2, 3, 4};
  news.step.kv_events = {event};
  news.stats.num_steps = 1 << 20;
  news.stats.model_seconds = 0.25;
  return news;
}

// Whatever it is, it is read or refused, and takes no more memory than it may.
template <typename Message>
void read_anything(const std::string& bytes) {
  Message message;
  try {
    read_message({bytes.data(), bytes.size()}, &message);
  } catch (const InvalidArgument&) {
  }
}

template <typename Message>
void read_damaged(const std::string& frame, Choices* choices) {
  const std::string whole = frame.substr(4);
  for (size_t size = 0; size < whole.size(); ++size) {
    Message message;
    EXPECT_THROW(read_message({whole.data(), size}, &message), InvalidArgument);
  }
  Message message;
  const std::string longer = whole + '\0';
  EXPECT_THROW(read_message({longer.data(), longer.size()}, &message), InvalidArgument);
  for (int i = 0; i < 20000; ++i) {
    std::string damaged = whole;
    for (int32_t n = choices->between(1, 4); n > 0; --n) {
      damaged[choices->below(damaged.size())] = static_cast<char>(choices->below(256));
    }
    read_anything<Message>(damaged);
    read_anything<Message>(random_bytes(choices, choices->below(64)));
  }
}

TEST(ChannelMessages, AnyBytesAreReadOrRefused) {
  SeededChoices choices(1);
  read_damaged<FrontEndMessage>(add_frame(1, rich_request()), &choices);
  read_damaged<EngineNews>(frame_of(rich_news()), &choices);
}

TEST(ChannelMessages, ComeBackAsTheyWere) {
  for (const std::string& frame : {add_frame(7, rich_request()), add_frame(8, Request())}) {
    FrontEndMessage message;
    read_message({frame.data() + 4, frame.size() - 4}, &message);
    EXPECT_EQ(frame_of(message), frame);
  }
  FrontEndMessage ping;
  ping.kind = FrontEndMessage::Kind::kPing;
  FrontEndMessage same_ping;
  const std::string pinged = frame_of(ping);
  read_message({pinged.data() + 4, pinged.size() - 4}, &same_ping);
  EXPECT_EQ(frame_of(same_ping), pinged);
  EngineNews news;
  const std::string frame = frame_of(rich_news());
  read_message({frame.data() + 4, frame.size() - 4}, &news);
  EXPECT_EQ(frame_of(news), frame);
  EXPECT_EQ(news.step.outputs[1].logprobs[0].logprobs[1], -1.5f);
  EXPECT_EQ(news.step.outputs[1].new_token_ids.back(), -1);
}

class HostileFrontEnd : public testing::Test {
 protected:
  static constexpr int kNumHostile = 200;

  // Each of them sends something; all are cut off, and the honest one is none the wiser.
  template <typename Send>
  void let_them(Send send_something) {
    ServerFixture f(small_config(), 1, {}, kNumHostile);
    f.start();
    const Request r = request({1, 2, 3, 4, 5}, 40);
    const std::vector<TokenId> expected =
        fake_completion(r.prompt_token_ids, r.params, 0, {}, 64, kVocabSize).tokens;
    for (const int fd : f.others) {
      const RequestId id = f.front_end().add(r);
      send_something(fd);
      read_to_end(fd);
      f.front_end().receive_all();
      ASSERT_EQ(tokens_of(f.front_end().outputs[{id, 0}]), expected);
    }
  }

  SeededChoices choices{2};
};

TEST_F(HostileFrontEnd, SendsGarbage) {
  let_them([&](int fd) {
    send_all(fd, random_bytes(&choices, choices.below(200000)));
    shutdown(fd, SHUT_WR);  // what looks like the beginning of a message would be waited for
  });
}

TEST_F(HostileFrontEnd, SendsDamagedRequests) {
  let_them([&](int fd) {
    for (RequestId id = 1; id < 20; ++id) {
      std::string frame = add_frame(id, rich_request());
      frame[4 + choices.below(frame.size() - 4)] ^= static_cast<char>(1 << choices.below(8));
      send_all(fd, frame);
    }
    shutdown(fd, SHUT_WR);
  });
}

TEST_F(HostileFrontEnd, SendsHalfARequest) {
  const std::string frame = add_frame(1, rich_request());
  let_them([&](int fd) {
    send_all(fd, frame);
    send_all(fd, frame.substr(0, choices.below(frame.size())));
    shutdown(fd, SHUT_WR);
  });
}

TEST_F(HostileFrontEnd, SaysThatItWillSendTooMuch) {
  let_them([&](int fd) {
    ArchiveWriter writer;
    writer.fixed32(static_cast<uint32_t>(kMaxRequestBytes + 1 + choices.below(1 << 30)));
    send_all(fd, writer.bytes());
  });
}

TEST_F(HostileFrontEnd, UsesAnIdTwice) {
  ServerFixture f(small_config(), 1, {}, 1);
  f.model->close();  // or the first request may have ended when the second one comes
  f.start();
  const std::string frame = add_frame(1, request({1}, 60));
  send_all(f.others[0], frame + frame);
  read_to_end(f.others[0]);
  f.model->open();
}

TEST_F(HostileFrontEnd, ClosesOneDirection) {
  const std::string frame = add_frame(1, request({1, 2, 3}, 60));
  let_them([&](int fd) {
    send_all(fd, frame);
    shutdown(fd, choices.one_in(2) ? SHUT_RD : SHUT_WR);
  });
}

// A length alone takes no memory; what belongs to it may come byte by byte.
TEST(ChannelPeers, ARequestInSmallPieces) {
  ServerFixture f(small_config(), 1, {}, 1);
  f.start();
  const std::string frame = add_frame(1, rich_request());
  for (const char byte : frame) send_all(f.others[0], std::string(1, byte));
  ReceiveBuffer in(1 << 20);
  bool accepted = false;
  int32_t num_ended = 0;
  while (num_ended < 2) {
    pollfd polled{f.others[0], POLLIN, 0};
    poll(&polled, 1, -1);
    ASSERT_EQ(in.receive(f.others[0]), ReceiveBuffer::Result::kReceived);
    while (const auto bytes = in.next_frame()) {
      EngineNews news;
      read_message(*bytes, &news);
      accepted = accepted || news.kind == EngineNews::Kind::kAccepted;
      EXPECT_TRUE(accepted || news.step.outputs.empty());
      for (const RequestOutput& output : news.step.outputs) {
        num_ended += output.finish_reason != FinishReason::kNone;
      }
    }
  }
}

// Each step's news are long, and nobody reads them.
class FrontEndThatDoesNotRead : public testing::Test {
 protected:
  static constexpr size_t kMaxUnsentBytes = 20000;
  static constexpr int kNumRequests = 200;
  static constexpr int64_t kNumSteps = kNumRequests / 8 * 50;  // at least, for all of them

  FrontEndThatDoesNotRead() : f_(small_config(), 2, config()) {
    for (const int fd : f_.server_fds) {
      const int bytes = 4096;
      setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
    }
    f_.start();
    for (int i = 0; i < kNumRequests; ++i) {
      Request r = request({i % 40, i / 40}, 50);
      r.params.logprobs = 40;
      f_.front_end(0).add(r);
    }
    while (f_.front_end(0).client.has_unsent()) f_.front_end(0).client.flush();
    // Time enough for all of the steps, were nobody to hold them up.
    for (int i = 0; i < 50; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      most_steps_ = std::max(most_steps_, f_.engine.stats().num_steps);
    }
  }
  static EngineServerConfig config() {
    EngineServerConfig config;
    config.max_unsent_bytes = kMaxUnsentBytes;
    return config;
  }

  int64_t most_steps_ = 0;
  ServerFixture f_;
};

TEST_F(FrontEndThatDoesNotRead, HoldsUpTheEngineUntilItReads) {
  EXPECT_LT(most_steps_, kNumSteps / 4);
  f_.front_end(0).receive_all();
  EXPECT_GE(f_.engine.stats().num_steps, kNumSteps);
  for (const auto& [key, outputs] : f_.front_end(0).outputs) {
    EXPECT_EQ(tokens_of(outputs).size(), 50u);
  }
}

TEST_F(FrontEndThatDoesNotRead, HoldsUpTheEngineUntilItDies) {
  EXPECT_LT(most_steps_, kNumSteps / 4);
  f_.front_ends[0].reset();
  const RequestId id = f_.front_end(1).add(request({1}, 50));
  f_.front_end(1).receive_all();
  EXPECT_EQ(f_.front_end(1).end_of(id), FinishReason::kLength);
}

TEST_F(FrontEndThatDoesNotRead, HoldsUpTheEngineUntilTheServerIsStopped) {
  f_.server->stop();
  f_.finish();
}

// Or the step thread would wait for its own next send().
TEST(ChannelPeers, NobodyWaitsForWhatIsHeld) {
  FrontEnd front_end;
  const std::string frame = "a frame";
  FrontEnd::Room(&front_end, frame.size())
      .hold(frame, FrontEnd::Clock::now() + std::chrono::hours(1));
  bool has_waited = false;
  front_end.wait_until_read(0, [&] { return has_waited = true; });
  EXPECT_FALSE(has_waited);
}

// Its requests are not read either, or the answers would pile up.
TEST(ChannelPeers, AFrontEndThatOnlyAsks) {
  EngineServerConfig config;
  config.max_unsent_bytes = 4096;
  ServerFixture f(small_config(), 1, config);
  f.start();
  Request refused = request({1});
  refused.params.temperature = -1;
  EngineClient& client = f.front_end().client;
  for (int i = 0; i < 40000; ++i) f.front_end().add(refused);
  // Until nothing more is read of it.
  for (int num_idle = 0; client.has_unsent() && num_idle < 50; ++num_idle) {
    const size_t before = client.num_unsent_bytes();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    client.flush();
    if (client.num_unsent_bytes() < before) num_idle = 0;
  }
  EXPECT_GT(client.num_unsent_bytes(), 1u << 20);
  f.front_end().receive_all();
  EXPECT_EQ(f.front_end().refused.size(), 40000u);
}

// ---------------------------------------------------------------- the engine's side

TEST(ChannelPeers, AnEngineThatDiesAmidAMessage) {
  const std::string frame = frame_of(rich_news());
  for (size_t size = 0; size < frame.size(); size += 7) {
    const auto [engine, other] = socket_pair();
    EngineClient client(other);
    send_all(engine, frame + frame.substr(0, size));
    close(engine);
    EXPECT_EQ(client.receive().size(), 1u);
    EXPECT_TRUE(client.closed());
    client.add_request(request({1}));
    client.abort(1);
    EXPECT_FALSE(client.has_unsent());
    EXPECT_TRUE(client.receive().empty());
  }
}

TEST(ChannelPeers, AnEngineThatSendsGarbage) {
  SeededChoices choices(3);
  for (int i = 0; i < 200; ++i) {
    const auto [engine, other] = socket_pair();
    EngineClient client(other);
    std::string frame = frame_of(rich_news());
    frame[4] = static_cast<char>(5 + choices.below(250));  // no such kind
    send_all(engine, frame);
    EXPECT_THROW(client.receive(), Error);
    EXPECT_TRUE(client.closed());
    EXPECT_TRUE(client.receive().empty());
    close(engine);
  }
}

TEST(ChannelPeers, AnEngineThatDoesNotRead) {
  const auto [engine, other] = socket_pair();
  EngineClient client(other);
  const Request r = request(std::vector<TokenId>(1000, 1));
  size_t most = 0;
  for (int i = 0; i < 2000; ++i) {
    client.add_request(r);
    most = std::max(most, client.num_unsent_bytes());
  }
  EXPECT_TRUE(client.has_unsent());
  EXPECT_GT(most, 1u << 20);
  EXPECT_TRUE(client.receive().empty());
  close(engine);
  while (!client.closed()) client.receive();
  EXPECT_FALSE(client.has_unsent());
}

TEST(ChannelPeers, ARequestThatIsTooLongIsRefusedByTheClient) {
  const auto [engine, other] = socket_pair();
  EngineClient client(other);
  EXPECT_THROW(client.add_request(request(std::vector<TokenId>(kMaxRequestBytes, 1))),
               InvalidArgument);
  EXPECT_FALSE(client.has_unsent());
  EXPECT_FALSE(client.closed());
  close(engine);
}

}  // namespace
}  // namespace fastpage
