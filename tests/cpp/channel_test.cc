// EngineServer and EngineClient: what is said through the channel, and to whom.
#include <gtest/gtest.h>

#include <numeric>

#include "channel_fixture.h"
#include "random_requests.h"

namespace fastpage {
namespace {

// Such as the engine takes.
std::vector<Request> random_requests(uint64_t seed, int n) {
  Fixture f;
  SeededChoices choices(seed);
  std::vector<Request> requests;
  while (static_cast<int>(requests.size()) < n) {
    const Request request = to_request(random_request(&choices, 24));
    try {
      f.engine.add_request(request);
    } catch (const InvalidArgument&) {
      continue;
    }
    requests.push_back(request);
  }
  return requests;
}

// All that is said of one sample, without when it was said.
struct Told {
  std::vector<TokenId> tokens;
  std::vector<TokenLogprobs> logprobs;
  std::vector<TokenLogprobs> prompt_logprobs;
  RequestOutput last;
};

Told told_in(const std::vector<RequestOutput>& outputs) {
  Told told;
  for (const RequestOutput& output : outputs) {
    told.tokens.insert(told.tokens.end(), output.new_token_ids.begin(), output.new_token_ids.end());
    told.logprobs.insert(told.logprobs.end(), output.logprobs.begin(), output.logprobs.end());
    told.prompt_logprobs.insert(told.prompt_logprobs.end(), output.prompt_logprobs.begin(),
                                output.prompt_logprobs.end());
  }
  told.last = outputs.back();
  return told;
}

void expect_same_logprobs(const std::vector<TokenLogprobs>& a,
                          const std::vector<TokenLogprobs>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].token_ids, b[i].token_ids);
    EXPECT_EQ(a[i].logprobs, b[i].logprobs);
    EXPECT_EQ(a[i].rank, b[i].rank);
  }
}

void expect_same(const std::vector<RequestOutput>& a_outputs,
                 const std::vector<RequestOutput>& b_outputs, bool is_whole = true) {
  ASSERT_FALSE(a_outputs.empty());
  ASSERT_FALSE(b_outputs.empty());
  const Told a = told_in(a_outputs);
  const Told b = told_in(b_outputs);
  EXPECT_EQ(a.tokens, b.tokens);
  expect_same_logprobs(a.logprobs, b.logprobs);
  // The prompt's come with another sample if the first one is aborted.
  if (is_whole) expect_same_logprobs(a.prompt_logprobs, b.prompt_logprobs);
  EXPECT_EQ(a.last.finish_reason, b.last.finish_reason);
  EXPECT_EQ(a.last.stop_token_id, b.last.stop_token_id);
  EXPECT_EQ(a.last.num_prompt_tokens, b.last.num_prompt_tokens);
  EXPECT_EQ(a.last.num_output_tokens, b.last.num_output_tokens);
  EXPECT_EQ(a.last.cumulative_logprob, b.last.cumulative_logprob);
  EXPECT_EQ(a.last.score, b.last.score);
}

// What the engine itself says to each request, by its number and the sample.
std::vector<std::vector<std::vector<RequestOutput>>> direct(const EngineConfig& config,
                                                            const std::vector<Request>& requests) {
  Fixture f(config);
  std::vector<std::vector<std::vector<RequestOutput>>> out;
  for (const Request& r : requests) {
    const RequestId id = f.engine.add_request(r);
    Outputs all = f.drain();
    std::vector<std::vector<RequestOutput>>& samples = out.emplace_back();
    for (int32_t j = 0; j < r.params.n; ++j) samples.push_back(all[{id, j}]);
  }
  return out;
}

class Channel : public testing::TestWithParam<bool> {
 protected:
  static EngineConfig config() {
    EngineConfig config = small_config(GetParam());
    config.scheduler.num_blocks = 40;
    return config;
  }
};
INSTANTIATE_TEST_SUITE_P(, Channel, testing::Values(false, true),
                         [](const auto& info) { return info.param ? "Async" : "Sync"; });

TEST_P(Channel, SaysWhatTheEngineSays) {
  const std::vector<Request> requests = random_requests(1, 300);
  const auto expected = direct(config(), requests);
  ServerFixture f(config());
  f.start();
  std::vector<RequestId> ids;
  for (const Request& r : requests) ids.push_back(f.front_end().add(r));
  f.front_end().receive_all();
  EXPECT_EQ(f.front_end().accepted.size(), requests.size());
  for (size_t i = 0; i < requests.size(); ++i) {
    SCOPED_TRACE("request " + std::to_string(i));
    for (int32_t j = 0; j < requests[i].params.n; ++j) {
      const std::vector<RequestOutput>& outputs = f.front_end().outputs[{ids[i], j}];
      expect_same(outputs, expected[i][j]);
      EXPECT_GE(outputs.back().queue_seconds, 0);
      EXPECT_EQ(outputs.back().index, j);
    }
  }
  EXPECT_EQ(f.front_end().stats.num_generated_tokens, f.engine.stats().num_generated_tokens);
}

// Some are aborted, whole or a sample of them, whenever it happens to be; the others are none the
// wiser.
TEST_P(Channel, AbortsAtRandomMoments) {
  const std::vector<Request> requests = random_requests(2, 300);
  const auto expected = direct(config(), requests);
  ServerFixture f(config());
  f.start();
  FrontEndOfTest& front_end = f.front_end();
  SeededChoices choices(3);
  std::vector<RequestId> ids;
  std::set<size_t> touched;
  const auto abort_one = [&] {
    const auto i = static_cast<size_t>(choices.below(ids.size()));
    touched.insert(i);
    if (choices.one_in(2)) {
      front_end.client.abort(ids[i]);
    } else {
      front_end.client.abort(ids[i], choices.between(-1, requests[i].params.n));
    }
  };
  for (const Request& r : requests) {
    ids.push_back(front_end.add(r));
    if (choices.one_in(4)) abort_one();
    if (choices.one_in(8)) front_end.receive();
  }
  while (!front_end.left.empty()) {
    front_end.receive();
    if (choices.one_in(8)) abort_one();
  }
  for (size_t i = 0; i < requests.size(); ++i) {
    SCOPED_TRACE("request " + std::to_string(i));
    for (int32_t j = 0; j < requests[i].params.n; ++j) {
      const std::vector<RequestOutput>& outputs = front_end.outputs[{ids[i], j}];
      ASSERT_FALSE(outputs.empty());
      if (outputs.back().finish_reason != FinishReason::kAbort) {
        expect_same(outputs, expected[i][j], touched.count(i) == 0);
        continue;
      }
      EXPECT_EQ(touched.count(i), 1u);
      const std::vector<TokenId> whole = tokens_of(expected[i][j]);
      const std::vector<TokenId> part = tokens_of(outputs);
      ASSERT_LE(part.size(), whole.size());
      EXPECT_TRUE(std::equal(part.begin(), part.end(), whole.begin()));
    }
  }
}

TEST_P(Channel, FrontEndsHearOfTheirOwnRequestsOnly) {
  const std::vector<Request> requests = random_requests(4, 200);
  const auto expected = direct(config(), requests);
  ServerFixture f(config(), 3);
  f.start();
  std::vector<RequestId> ids;
  for (size_t i = 0; i < requests.size(); ++i) {
    ids.push_back(f.front_end(i % 3).add(requests[i]));
    // The last one ends amid its work; what it says on its way matters to nobody.
    if (i == 150) f.front_ends.pop_back();
    if (i == 150) break;
  }
  f.front_end(0).receive_all();
  f.front_end(1).receive_all();
  for (size_t i = 0; i < ids.size(); ++i) {
    if (i % 3 == 2) continue;
    SCOPED_TRACE("request " + std::to_string(i));
    for (int32_t j = 0; j < requests[i].params.n; ++j) {
      expect_same(f.front_end(i % 3).outputs[{ids[i], j}], expected[i][j]);
    }
  }
}

TEST_P(Channel, ThousandsOfRequests) {
  ServerFixture f(config(), 2);
  f.start();
  std::map<RequestId, std::vector<TokenId>> prompts[2];
  for (int i = 0; i < 4000; ++i) {
    const Request r = request({i % 40, i / 40 % 40, i / 1600}, 1 + i % 3);
    prompts[i % 2][f.front_end(i % 2).add(r)] = r.prompt_token_ids;
    if (i % 64 == 0) f.front_end(0).receive();
  }
  for (int i = 0; i < 2; ++i) {
    f.front_end(i).receive_all();
    for (const auto& [key, outputs] : f.front_end(i).outputs) {
      const auto n = static_cast<int32_t>(tokens_of(outputs).size());
      const Request r = request(prompts[i][key.first], n);
      EXPECT_EQ(tokens_of(outputs),
                fake_completion(r.prompt_token_ids, r.params, 0, {}, 64, kVocabSize).tokens);
    }
    EXPECT_EQ(f.front_end(i).outputs.size(), 2000u);
  }
}

// The engine is gone over while a front end dies amid everything, again and again.
TEST_P(Channel, AFrontEndThatDiesLeavesNothing) {
  SeededChoices choices(5);
  const std::vector<Request> requests = random_requests(6, 400);
  for (int round = 0; round < 40; ++round) {
    ServerFixture f(config());
    f.start();
    const int num_sent = choices.between(1, 60);
    for (int i = 0; i < num_sent; ++i) f.front_end().add(requests[choices.below(400)]);
    const int num_heard = choices.between(0, 20);
    for (int i = 0; i < num_heard && !f.front_end().left.empty(); ++i) f.front_end().receive();
    f.front_ends.clear();
    f.finish();
    // It is as good as new.
    const Request after = request({7, 7, 7}, 5);
    const RequestId id = f.engine.add_request(after);
    EXPECT_EQ(tokens_of(f.drain()[{id, 0}]),
              fake_completion(after.prompt_token_ids, after.params, 0, {}, 64, kVocabSize).tokens);
  }
}

// Not to the end first: nobody waits for it.
TEST(EngineChannel, ADeadFrontEndsRequestsAreAborted) {
  ServerFixture f(small_config(), 2);
  f.model->close();
  f.start();
  f.front_end(0).add(request({1}, 60));
  f.model->wait_until_inside();
  f.front_ends[0].reset();
  // When the second of two is accepted, one after the other, the first socket was looked at.
  std::vector<RequestId> ids;
  for (int i = 0; i < 2; ++i) {
    ids.push_back(f.front_end(1).add(request({2}, 20)));
    f.front_end(1).receive_until([&] { return f.front_end(1).accepted.count(ids.back()) == 1; });
  }
  f.model->open();
  f.front_end(1).receive_all();
  EXPECT_LE(f.engine.stats().num_generated_tokens, 41);
}

TEST(EngineChannel, RefusesWhatTheEngineRefuses) {
  EngineConfig config = small_config();
  config.scheduler.max_num_waiting = 3;
  ServerFixture f(config);
  f.model->close();
  f.start();
  FrontEndOfTest& front_end = f.front_end();
  const RequestId first = front_end.add(request({1}));
  f.model->wait_until_inside();
  Request nan = request({1});
  nan.params.temperature = std::numeric_limits<float>::quiet_NaN();
  const RequestId bad = front_end.add(nan);
  const RequestId foreign = front_end.add(request({1, kVocabSize}));
  Request three = request({1});
  three.params.n = 3;
  front_end.add(three);
  const RequestId too_many = front_end.add(request({2}));
  front_end.receive_until([&] { return front_end.refused.size() == 3; });
  EXPECT_EQ(front_end.accepted.count(first), 1u);
  EXPECT_NE(front_end.refused[bad].error.find("temperature"), std::string::npos);
  EXPECT_EQ(front_end.refused[bad].refusal, EngineNews::Refusal::kInvalidArgument);
  EXPECT_EQ(front_end.refused[foreign].error, "prompt token 1 is 50: not in [0, 50)");
  EXPECT_EQ(front_end.refused[too_many].error,
            "the queue is full: 3 waiting, max_num_waiting 3: try again later");
  EXPECT_EQ(front_end.refused[too_many].refusal, EngineNews::Refusal::kResourceExhausted);
  f.model->open();
  front_end.receive_all();
}

TEST(EngineChannel, AFailedStepIsToldAndCostsItsRequestsOnly) {
  ServerFixture f(small_config(), 2);
  f.model->fail_in_wait_for = 2;
  f.start();
  const RequestId lost = f.front_end(0).add(request({1, 2, 3}));
  f.front_end(0).receive_all();
  EXPECT_EQ(f.front_end(0).end_of(lost), FinishReason::kAbort);
  for (int i = 0; i < 2; ++i) {
    FrontEndOfTest& front_end = f.front_end(i);
    front_end.receive_until([&] { return !front_end.failures.empty(); });
    EXPECT_EQ(front_end.failures, std::vector<std::string>{"out of luck"});
  }
  const RequestId next = f.front_end(1).add(request({1, 2, 3}));
  f.front_end(1).receive_all();
  EXPECT_EQ(f.front_end(1).end_of(next), FinishReason::kLength);
}

TEST(EngineChannel, ResetsThePrefixCacheBetweenSteps) {
  EngineConfig config = small_config();
  config.scheduler.enable_kv_events = true;
  ServerFixture f(config, 2);
  f.model->close();
  f.start();
  FrontEndOfTest& front_end = f.front_end(0);
  front_end.add(request({1, 2, 3, 4, 5}));
  f.model->wait_until_inside();
  front_end.client.reset_prefix_cache();  // does not hold up what comes after it
  const RequestId second = front_end.add(request({1, 2, 3, 4, 5}));
  front_end.receive_until([&] { return front_end.accepted.count(second) == 1; });
  f.model->open();
  front_end.receive_all();
  front_end.client.reset_prefix_cache();
  front_end.receive_until([&] { return front_end.resets.size() == 2; });
  EXPECT_EQ(front_end.resets, (std::vector<bool>{false, true}));
  // Its KV event comes to all, without any request.
  for (int i = 0; i < 2; ++i) {
    FrontEndOfTest& each = f.front_end(i);
    each.receive_until([&] {
      return !each.kv_events.empty() && each.kv_events.back().kind == KvEvent::Kind::kCleared;
    });
    EXPECT_EQ(each.kv_events.size(), f.front_end(0).kv_events.size());
    EXPECT_TRUE(each.kv_events[0].hash == f.front_end(0).kv_events[0].hash);
    EXPECT_EQ(each.kv_events[0].token_ids, (std::vector<TokenId>{1, 2, 3, 4}));
  }
  EXPECT_TRUE(f.front_end(1).resets.empty());
}

TEST(EngineChannel, ToldFromTheSideAnEngineThatIsStuckShows) {
  ServerFixture f;
  f.start();
  FrontEndOfTest& front_end = f.front_end();
  const auto ping_until_another = [&](int64_t than) {
    while (front_end.ping() == than) {
    }
  };
  ping_until_another(front_end.ping());  // there is nothing to do
  f.model->close();
  front_end.add(request({1, 2, 3}));
  f.model->wait_until_inside();
  const int64_t stuck = front_end.ping();
  for (int i = 0; i < 100; ++i) EXPECT_EQ(front_end.ping(), stuck);
  ++f.model->num_parts_done;
  EXPECT_NE(front_end.ping(), stuck);
  f.model->open();
  front_end.receive_all();
  ping_until_another(stuck);
}

// Others' steps do not wake it; what it missed is in what it hears at the end.
TEST(EngineChannel, AFrontEndWithNothingInAStepHearsOfItLater) {
  EngineServerConfig config;
  config.max_delay_seconds = 1e9;
  ServerFixture f(small_config(), 2, config);
  f.model->close();
  f.start();
  f.front_end(0).add(request({1}, 40));
  f.model->wait_until_inside();
  f.front_end(0).add(request({2, 3}, 60));
  f.front_end(0).receive_until([&] { return f.front_end(0).accepted.size() == 2; });
  f.model->open();
  f.front_end(0).receive_all();
  const auto num_tokens = [](const FrontEndOfTest& front_end) {
    int64_t sum = 0;
    for (const EngineNews& each : front_end.news) sum += each.step.num_tokens;
    return sum;
  };
  FrontEndOfTest& idle = f.front_end(1);
  idle.receive_until([&] { return num_tokens(idle) == 101; });
  EXPECT_EQ(num_tokens(f.front_end(0)), 101);
  EXPECT_LE(idle.count(EngineNews::Kind::kStep), 2u);
  EXPECT_GE(f.front_end(0).count(EngineNews::Kind::kStep), 59u);
  EXPECT_EQ(idle.stats.num_generated_tokens, 100);
  EXPECT_EQ(idle.stats.scheduler.num_running, 0);
}

// Of several, the first one only finds the engine idle.
TEST(EngineChannel, TheFirstAcceptanceComesWithTheFirstStep) {
  EngineServerConfig config;
  config.max_delay_seconds = 1e9;
  ServerFixture f(small_config(), 2, config);
  f.model->close();
  f.start();
  for (int i = 0; i < 2; ++i) {  // what was told before the first step goes out on its own
    f.front_end(i).receive_until([&] { return !f.front_end(i).news.empty(); });
  }
  const RequestId first = f.front_end(0).add(request({1, 2}));
  f.model->wait_until_inside();
  f.front_end(1).add(request({3}));
  f.front_end(1).receive_until([&] { return f.front_end(1).accepted.size() == 1; });
  f.front_end(0).take_what_is_there();
  EXPECT_TRUE(f.front_end(0).accepted.empty());
  f.model->open();
  f.front_end(0).receive_all();
  EXPECT_EQ(f.front_end(0).accepted.count(first), 1u);
}

TEST(EngineChannel, TheFirstAcceptanceDoesNotWaitForALongStep) {
  EngineServerConfig config;
  config.max_delay_seconds = 0.002;
  ServerFixture f(small_config(), 1, config);
  f.model->close();
  f.start();
  f.front_end(0).add(request({1, 2}));
  f.front_end(0).receive_until([&] { return f.front_end(0).accepted.size() == 1; });
  f.model->open();
  f.front_end(0).receive_all();
}

TEST(EngineChannel, StopEndsItAndTheClientsSeeThat) {
  ServerFixture f(small_config(), 2);
  f.model->close();
  f.start();
  f.front_end(0).add(request({1}, 50));
  f.model->wait_until_inside();
  f.server->stop();
  f.model->open();
  f.finish();
  for (int i = 0; i < 2; ++i) {
    while (!f.front_end(i).client.closed()) f.front_end(i).receive();
    EXPECT_TRUE(f.front_end(i).client.receive().empty());
    f.front_end(i).add(request({1}));  // nothing happens
    f.front_end(i).client.flush();
    EXPECT_FALSE(f.front_end(i).client.has_unsent());
  }
}

TEST(EngineChannel, StoppedBeforeItRunsItReturnsAtOnce) {
  ServerFixture f;
  f.server->stop();
  f.start();
  f.finish();
  ServerFixture nobody(small_config(), 0);
  nobody.start();
  nobody.finish();
}

TEST(EngineChannel, TakesStreamSocketsOnly) {
  Fixture f;
  EXPECT_THROW(EngineClient(-1), InvalidArgument);
  EXPECT_THROW(EngineServer(&f.engine, {-1}), InvalidArgument);
  EXPECT_THROW(EngineServer(nullptr, {}), InvalidArgument);
  int pipes[2];
  ASSERT_EQ(pipe(pipes), 0);
  EXPECT_THROW(EngineClient{pipes[0]}, InvalidArgument);
  int fds[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_DGRAM, 0, fds), 0);
  EXPECT_THROW(EngineClient{fds[0]}, InvalidArgument);
  for (const int fd : {pipes[0], pipes[1], fds[0], fds[1]}) EXPECT_EQ(close(fd), 0);  // still ours
}

}  // namespace
}  // namespace fastpage
