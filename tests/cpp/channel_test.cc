// EngineServer and EngineClient at the two ends of a socketpair, in one process.
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>

#include <array>
#include <map>
#include <memory>
#include <set>
#include <thread>

#include "engine_fixture.h"
#include "fastpage/engine_channel.h"

namespace fastpage {
namespace {

std::array<int, 2> socket_pair() {
  std::array<int, 2> fds{};
  if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds.data()) != 0) throw std::runtime_error("socketpair");
  return fds;
}

// A client, and what has come to it.
struct FrontEndOfTest {
  explicit FrontEndOfTest(int fd) : client(fd) {}

  void receive() {
    pollfd polled{client.fileno(), POLLIN, 0};
    if (client.has_unsent()) polled.events |= POLLOUT;
    poll(&polled, 1, -1);
    client.flush();
    for (EngineNews& each : client.receive()) take(std::move(each));
  }
  void take(EngineNews each) {
    for (RequestOutput& output : each.step.outputs) {
      EXPECT_EQ(accepted.count(output.request_id), 1u);
      if (output.finish_reason != FinishReason::kNone) ++num_finished[output.request_id];
      outputs[{output.request_id, output.index}].push_back(output);
    }
    if (each.kind == EngineNews::Kind::kAccepted) accepted.insert(each.request_id);
    if (each.kind == EngineNews::Kind::kStep) stats = each.stats;
    news.push_back(std::move(each));
  }
  template <typename Done>
  void receive_until(Done done) {
    while (!done() && !client.closed()) receive();
    ASSERT_TRUE(done());
  }
  RequestId add(const Request& r) {
    const RequestId id = client.add_request(r);
    ns[id] = r.params.n;
    return id;
  }
  bool all_done() const {
    for (const auto& [id, n] : ns) {
      const auto it = num_finished.find(id);
      if (it == num_finished.end() || it->second < n) return false;
    }
    return true;
  }

  EngineClient client;
  std::map<RequestId, int32_t> ns;
  std::map<RequestId, int32_t> num_finished;
  std::set<RequestId> accepted;
  std::vector<EngineNews> news;
  EngineStats stats;
  Outputs outputs;
};

struct ServerFixture : Fixture {
  explicit ServerFixture(int num_front_ends = 1, EngineConfig engine_config = small_config(),
                         EngineServerConfig config = {})
      : Fixture(engine_config) {
    std::vector<int> fds;
    for (int i = 0; i < num_front_ends; ++i) {
      const auto [mine, theirs] = socket_pair();
      fds.push_back(mine);
      front_ends.push_back(std::make_unique<FrontEndOfTest>(theirs));
    }
    server = std::make_unique<EngineServer>(&engine, fds, config);
    thread = std::thread([this] { server->run(); });
  }
  // The front ends go, and nothing may be left.
  ~ServerFixture() {
    front_ends.clear();
    thread.join();
    engine.check_integrity();
    const EngineStats stats = engine.stats();
    EXPECT_EQ(stats.scheduler.num_free_blocks, stats.scheduler.num_blocks);
    EXPECT_EQ(stats.scheduler.num_running + stats.scheduler.num_waiting, 0);
    EXPECT_FALSE(engine.has_unfinished());
  }

  FrontEndOfTest& front_end(int i = 0) { return *front_ends[i]; }

  std::vector<std::unique_ptr<FrontEndOfTest>> front_ends;
  std::unique_ptr<EngineServer> server;
  std::thread thread;
};

TEST(Channel, RunsARequestToItsEnd) {
  ServerFixture f;
  const Request r = request({1, 2, 3, 4, 5});
  const RequestId id = f.front_end().add(r);
  f.front_end().receive_until([&] { return f.front_end().all_done(); });
  EXPECT_EQ(tokens_of(f.front_end().outputs[{id, 0}]),
            fake_completion(r.prompt_token_ids, r.params, 0, {}, 64, kVocabSize).tokens);
  EXPECT_EQ(f.front_end().stats.num_generated_tokens, 6);
}

}  // namespace
}  // namespace fastpage
