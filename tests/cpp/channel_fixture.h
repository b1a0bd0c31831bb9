// An EngineServer on a thread of its own, and clients at the other ends of its sockets.
#pragma once

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine_fixture.h"
#include "fastpage/engine_channel.h"

namespace fastpage {

// {the server's, the other end}
inline std::pair<int, int> socket_pair() {
  int fds[2];
  if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds) != 0) throw std::runtime_error("socketpair");
  return {fds[0], fds[1]};
}

// A client, and what has come to it.
struct FrontEndOfTest {
  explicit FrontEndOfTest(int fd) : client(fd) {}

  RequestId add(const Request& r, std::string name = {}) {
    const RequestId id = client.add_request(r, std::move(name));
    left[id] = r.params.n;
    return id;
  }

  // Waits for something to come, and takes it in.
  void receive() {
    pollfd polled{client.fileno(), POLLIN, 0};
    if (client.has_unsent()) polled.events |= POLLOUT;
    poll(&polled, 1, -1);
    client.flush();
    take_what_is_there();
  }
  void take_what_is_there() {
    for (EngineNews& each : client.receive()) take(std::move(each));
  }
  template <typename Done>
  void receive_until(Done done) {
    while (!done()) {
      ASSERT_FALSE(client.closed());
      receive();
    }
  }
  // Waits for it to be accepted, or refused.
  bool is_accepted(RequestId id) {
    receive_until([&] { return accepted.count(id) + refused.count(id) > 0; });
    return accepted.count(id) > 0;
  }
  void receive_all() {
    receive_until([this] { return left.empty(); });
  }
  size_t count(EngineNews::Kind kind) const {
    size_t n = 0;
    for (const EngineNews& each : news) n += each.kind == kind;
    return n;
  }

  int64_t ping() {
    client.ping();
    const size_t before = alive.size();
    receive_until([&] { return alive.size() > before; });
    return alive.back();
  }

  FinishReason end_of(RequestId id) { return outputs[{id, 0}].back().finish_reason; }

  EngineClient client;
  std::map<RequestId, int32_t> left;  // samples that have not ended
  std::set<RequestId> accepted;
  std::map<RequestId, EngineNews> refused;
  Outputs outputs;
  std::vector<EngineNews> news;  // all of them, without their outputs
  std::vector<bool> resets;
  std::vector<int64_t> alive;  // the progress that answers to ping() told
  std::vector<std::string> failures;
  EngineStats stats;
  std::vector<KvEvent> kv_events;

 private:
  void take(EngineNews each) {
    for (RequestOutput& output : each.step.outputs) take(std::move(output));
    each.step.outputs.clear();
    if (each.kind == EngineNews::Kind::kAccepted) {
      EXPECT_TRUE(accepted.insert(each.request_id).second);
    } else if (each.kind == EngineNews::Kind::kRefused) {
      EXPECT_EQ(left.erase(each.request_id), 1u);
      refused[each.request_id] = each;
    } else if (each.kind == EngineNews::Kind::kStep) {
      stats = each.stats;
      for (KvEvent& event : each.step.kv_events) kv_events.push_back(std::move(event));
    } else if (each.kind == EngineNews::Kind::kReset) {
      resets.push_back(each.done);
    } else if (each.kind == EngineNews::Kind::kAlive) {
      alive.push_back(each.progress);
    } else {
      failures.push_back(each.error);
    }
    news.push_back(std::move(each));
  }
  void take(RequestOutput output) {
    const RequestId id = output.request_id;
    EXPECT_EQ(accepted.count(id), 1u);
    EXPECT_EQ(left.count(id), 1u) << "an output after the last one";
    if (output.finish_reason != FinishReason::kNone && --left[id] == 0) left.erase(id);
    outputs[{id, output.index}].push_back(std::move(output));
  }
};

struct ServerFixture : Fixture {
  explicit ServerFixture(EngineConfig engine_config = small_config(), int num_front_ends = 1,
                         EngineServerConfig config = {}, int num_others = 0)
      : Fixture(std::move(engine_config)) {
    std::vector<int> fds;
    for (int i = 0; i < num_front_ends + num_others; ++i) {
      const auto [servers, other] = socket_pair();
      fds.push_back(servers);
      if (i < num_front_ends) {
        front_ends.push_back(std::make_unique<FrontEndOfTest>(other));
      } else {
        others.push_back(other);
      }
    }
    server = std::make_unique<EngineServer>(&engine, fds, config);
    server_fds = fds;
  }
  void start() {
    thread = std::thread([this] { server->run(); });
  }
  // Waits for run() to return: the front ends have gone. Nothing may be left.
  void finish() {
    thread.join();
    engine.check_integrity();
    const SchedulerStats stats = engine.stats().scheduler;
    EXPECT_EQ(stats.num_free_blocks, stats.num_blocks);
    EXPECT_EQ(stats.num_running + stats.num_waiting, 0);
    EXPECT_FALSE(engine.has_unfinished());
  }
  ~ServerFixture() {
    front_ends.clear();
    for (const int fd : others) close(fd);
    if (thread.joinable()) finish();
  }

  FrontEndOfTest& front_end(int i = 0) { return *front_ends[i]; }

  std::vector<std::unique_ptr<FrontEndOfTest>> front_ends;
  std::vector<int> others;  // bare sockets, for what no client does
  std::vector<int> server_fds;
  std::unique_ptr<EngineServer> server;
  std::thread thread;
};

}  // namespace fastpage
