// Front ends that come to an EngineServer while it runs.
#include <gtest/gtest.h>

#include "channel/cached_blocks.h"
#include "channel_fixture.h"

namespace fastpage {
namespace {

EngineServerConfig takes_more() {
  EngineServerConfig config;
  config.takes_more = true;
  return config;
}

EngineConfig telling_config() {
  EngineConfig config = small_config();
  config.scheduler.enable_kv_events = true;
  return config;
}

std::unique_ptr<FrontEndOfTest> arrive(ServerFixture* f) {
  const auto [servers, other] = socket_pair();
  f->server->add_front_end(servers);
  return std::make_unique<FrontEndOfTest>(other);
}

TEST(ChannelArrivals, AFrontEndThatComesLaterIsServed) {
  ServerFixture f(small_config(), 1, takes_more());
  f.start();
  f.front_end().add(request({1, 2, 3}));
  f.front_end().receive_all();
  const auto late = arrive(&f);
  const RequestId id = late->add(request({1, 2, 3}));
  late->receive_all();
  EXPECT_EQ(tokens_of(late->outputs[{id, 0}]), tokens_of(f.front_end().outputs.begin()->second));
}

TEST(ChannelArrivals, TheQueueIsOneForAll) {
  EngineConfig config = small_config();
  config.scheduler.max_num_waiting = 1;
  ServerFixture f(config, 1, takes_more());
  f.model->close();
  f.start();
  f.front_end().add(request({1}));
  f.model->wait_until_inside();
  const RequestId waiting = f.front_end().add(request({2}));
  f.front_end().receive_until([&] { return f.front_end().accepted.count(waiting) == 1; });
  const auto late = arrive(&f);
  const RequestId too_many = late->add(request({3}));
  late->receive_until([&] { return late->refused.size() == 1; });
  EXPECT_EQ(late->refused[too_many].refusal, EngineNews::Refusal::kResourceExhausted);
  f.model->open();
  f.front_end().receive_all();
}

TEST(ChannelNames, AreOfOneRequestAtATimeInAllFrontEnds) {
  ServerFixture f(small_config(), 2);
  f.model->close();
  f.start();
  FrontEndOfTest& one = f.front_end(0);
  FrontEndOfTest& other = f.front_end(1);
  EXPECT_TRUE(one.is_accepted(one.add(request({1}), "a")));
  for (FrontEndOfTest* each : {&one, &other}) {
    const RequestId id = each->add(request({2}), "a");
    EXPECT_FALSE(each->is_accepted(id));
    EXPECT_EQ(each->refused[id].refusal, EngineNews::Refusal::kNameInUse);
    // A request that is refused for something else has not got its name.
    EXPECT_FALSE(each->is_accepted(each->add(request({kVocabSize}), "b")));
    EXPECT_TRUE(each->is_accepted(each->add(request({3}))));
  }
  EXPECT_TRUE(other.is_accepted(other.add(request({2}), "b")));
  f.model->open();
  one.receive_all();
  other.receive_all();
  EXPECT_TRUE(other.is_accepted(other.add(request({2}), "a")));
  other.receive_all();
}

TEST(ChannelNames, AreFreeOnceTheirRequestIsAborted) {
  ServerFixture f(small_config(), 2);
  f.model->close();
  f.start();
  FrontEndOfTest& front_end = f.front_end();
  const RequestId first = front_end.add(request({1}), "a");
  EXPECT_TRUE(front_end.is_accepted(first));
  f.model->wait_until_inside();
  front_end.client.abort(first);
  EXPECT_TRUE(front_end.is_accepted(front_end.add(request({1}), "a")));
  EXPECT_FALSE(front_end.is_accepted(front_end.add(request({1}), "a")));
  f.model->open();
  front_end.receive_all();
}

// Of both the server hears in one round.
TEST(ChannelNames, AreFreeOnceTheirFrontEndHasGone) {
  ServerFixture f(small_config(), 3);
  f.model->close();
  FrontEndOfTest& other = f.front_end(1);
  RequestId second = 0;
  f.model->when_asked = [&] {
    f.front_ends[0].reset();
    second = other.add(request({2}), "a");
  };
  f.start();
  EXPECT_TRUE(f.front_end(0).is_accepted(f.front_end(0).add(request({1}, 60), "a")));
  f.front_end(2).ping();
  EXPECT_TRUE(other.is_accepted(second));
  f.model->open();
  other.receive_all();
}

// What is read at once is 64 KiB. In a second round the server finds in the first socket a request
// whose name is in use, and in the other one, after it, an abort that was sent before.
TEST(ChannelNames, AreFreeWhenAnAbortLiesInAnotherSocket) {
  for (const bool is_aborted_too : {false, true}) {
    ServerFixture f(small_config(), 2);
    f.model->close();
    const Request long_one = request(std::vector<TokenId>(70'000, 1));
    FrontEndOfTest& one = f.front_end(0);
    FrontEndOfTest& other = f.front_end(1);
    const RequestId first = other.add(request({1}), "a");
    other.add(long_one);
    other.client.abort(first);
    one.add(long_one);
    const RequestId second = one.add(request({2}), "a");
    if (is_aborted_too) one.client.abort(second);
    f.start();
    EXPECT_EQ(one.is_accepted(second), !is_aborted_too);
    f.model->open();
    one.receive_all();
    other.receive_all();
    EXPECT_EQ(other.accepted.count(first), 1u);
  }
}

TEST(ChannelArrivals, ManyComeAndGoAmidTheirRequests) {
  ServerFixture f(telling_config(), 1, takes_more());
  f.start();
  for (int i = 0; i < 50; ++i) {
    const auto passing = arrive(&f);
    const RequestId id = passing->add(request({i % 7, 2, 3, 4, 5}, 40));
    passing->receive_until([&] { return passing->accepted.count(id) > 0; });
    f.front_end().add(request({i % 5, 2, 3}));
    f.front_end().receive_all();
  }
}  // nothing is left: see finish()

TEST(ChannelArrivals, TheServerLivesOnWithTheLastThatCame) {
  ServerFixture f(small_config(), 1, takes_more());
  f.start();
  const auto late = arrive(&f);
  late->receive_until([&] { return !late->news.empty(); });
  f.front_ends.clear();
  late->add(request({1, 2, 3}));
  late->receive_all();
}

TEST(ChannelArrivals, WhatIsCachedIsTheFirstThatTheyHear) {
  ServerFixture f(telling_config(), 1, takes_more());
  f.start();
  f.front_end().add(request({1, 2, 3, 4, 5, 6, 7, 8, 9}, 1));
  f.front_end().receive_all();
  const auto late = arrive(&f);
  late->receive_until([&] { return late->kv_events.size() >= 2; });
  ASSERT_EQ(late->kv_events.size(), f.front_end().kv_events.size());
  for (size_t i = 0; i < late->kv_events.size(); ++i) {
    const KvEvent& mine = late->kv_events[i];
    const KvEvent& theirs = f.front_end().kv_events[i];
    EXPECT_EQ(mine.kind, KvEvent::Kind::kStored);
    EXPECT_TRUE(mine.hash == theirs.hash);
    EXPECT_TRUE(mine.parent_hash == theirs.parent_hash);
    EXPECT_EQ(mine.token_ids, theirs.token_ids);
  }
  // From then on they hear the same.
  late->client.reset_prefix_cache();
  for (FrontEndOfTest* each : {late.get(), &f.front_end()}) {
    each->receive_until([&] { return each->kv_events.back().kind == KvEvent::Kind::kCleared; });
  }
  const auto last = arrive(&f);
  last->receive_until([&] { return !last->news.empty(); });
  EXPECT_TRUE(last->kv_events.empty());
}

TEST(ChannelArrivals, AServerThatTakesNoMoreClosesTheSocket) {
  ServerFixture f;
  f.start();
  const auto late = arrive(&f);
  while (!late->client.closed()) late->receive();
}

TEST(ChannelArrivals, ASocketAfterTheEndIsClosed) {
  ServerFixture f(small_config(), 1, takes_more());
  f.start();
  f.front_ends.clear();
  f.thread.join();
  const auto late = arrive(&f);
  while (!late->client.closed()) late->receive();
}

KvEvent event(KvEvent::Kind kind, uint64_t hash, KvTier tier = KvTier::kDevice) {
  KvEvent made{kind, tier, {hash, 1}, {hash - 1, 1}, {}};
  if (kind == KvEvent::Kind::kStored && tier == KvTier::kDevice) made.token_ids = {7, 8};
  return made;
}

TEST(CachedBlocks, AreWhatWasStoredAndNotRemoved) {
  using K = KvEvent::Kind;
  CachedBlocks cached;
  EXPECT_TRUE(cached.parts().empty());
  cached.take_in({event(K::kStored, 1), event(K::kStored, 2), event(K::kStored, 3)});
  cached.take_in({event(K::kStored, 2, KvTier::kHost), event(K::kRemoved, 2), event(K::kRemoved, 3),
                  event(K::kRemoved, 99)});
  const auto parts = cached.parts();
  ASSERT_EQ(parts.size(), 1u);
  ASSERT_EQ(parts[0].size(), 2u);
  EXPECT_EQ(parts[0][0].hash.lo, 1u);
  // On the host only, where it was stored without its tokens: these are known from before.
  EXPECT_EQ(parts[0][1].hash.lo, 2u);
  EXPECT_EQ(parts[0][1].tier, KvTier::kHost);
  EXPECT_EQ(parts[0][1].token_ids, (std::vector<TokenId>{7, 8}));
  EXPECT_EQ(parts[0][1].parent_hash.lo, 1u);
  cached.take_in({event(K::kCleared, 0)});
  EXPECT_TRUE(cached.parts().empty());
}

TEST(CachedBlocks, ComeInPartsOfAMessageEach) {
  CachedBlocks cached;
  std::vector<KvEvent> events;
  for (uint64_t i = 1; i <= 100; ++i) {
    events.push_back(event(KvEvent::Kind::kStored, i));
    events.back().token_ids.resize(4096);
  }
  cached.take_in(events);
  const auto parts = cached.parts();
  EXPECT_EQ(parts.size(), 7u);
  uint64_t last = 0;
  for (const auto& part : parts) {
    EXPECT_LE(part.size(), 16u);
    for (const KvEvent& each : part) EXPECT_EQ(each.hash.lo, ++last);
  }
  EXPECT_EQ(last, 100u);
}

}  // namespace
}  // namespace fastpage
