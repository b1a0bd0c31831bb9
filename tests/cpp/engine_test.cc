#include "fastpage/engine.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <set>
#include <thread>

#include "engine_fixture.h"

namespace fastpage {
namespace {

TEST(Engine, RunsARequestToItsEnd) {
  Fixture f;
  const Request r = request({1, 2, 3, 4, 5});
  const RequestId id = f.engine.add_request(r);
  EXPECT_TRUE(f.engine.has_unfinished());
  const auto outputs = f.drain()[{id, 0}];
  EXPECT_EQ(tokens_of(outputs),
            fake_completion(r.prompt_token_ids, r.params, 0, {}, 64, kVocabSize).tokens);
  EXPECT_EQ(outputs.back().finish_reason, FinishReason::kLength);
  EXPECT_EQ(outputs.back().num_prompt_tokens, 5);
  EXPECT_EQ(outputs.back().num_output_tokens, 6);
  const EngineStats stats = f.engine.stats();
  EXPECT_EQ(stats.num_steps, 6);
  EXPECT_EQ(stats.num_computed_tokens, 10);
  EXPECT_EQ(stats.num_generated_tokens, 6);
  EXPECT_GT(stats.schedule_seconds, 0);
  EXPECT_GT(stats.prepare_seconds, 0);
  EXPECT_GT(stats.model_seconds, 0);
  EXPECT_EQ(stats.sample_seconds, 0);  // the fake model does not say
  EXPECT_GT(stats.output_seconds, 0);
  EXPECT_FALSE(f.engine.abort(id));
  EXPECT_EQ(f.engine.step().step_id, -1);
}

TEST(Engine, RefusesBadRequestsInTheCallersThread) {
  Fixture f;
  f.model->close();  // a step in progress must not matter
  f.engine.add_request(request({1}));
  std::thread stepper([&] { f.engine.step(); });
  f.model->wait_until_inside();
  const auto add = [&](Request r) {
    return error_of<InvalidArgument>([&] { f.engine.add_request(std::move(r)); });
  };
  EXPECT_EQ(add(request({})), "the prompt is empty: it needs at least one token");
  EXPECT_EQ(add(request({1, kVocabSize})), "prompt token 1 is 50: not in [0, 50)");
  EXPECT_EQ(add(request({-1})), "prompt token 0 is -1: not in [0, 50)");
  EXPECT_EQ(add(request({1, 2}, 63)), "prompt 2 + max_tokens 63 > max_model_len 64");
  Request bad = request({1});
  bad.params.temperature = -1;
  EXPECT_NE(add(bad).find("temperature"), std::string::npos);
  f.model->open();
  stepper.join();
}

TEST(Engine, AFullQueueIsRefused) {
  EngineConfig config = small_config();
  config.scheduler.max_num_waiting = 3;
  Fixture f(config);
  f.engine.add_request(request({1}));
  Request two = request({2});
  two.params.n = 2;
  f.engine.add_request(two);
  EXPECT_EQ(f.engine.stats().scheduler.num_waiting, 3);
  EXPECT_EQ(error_of<ResourceExhausted>([&] { f.engine.add_request(request({3})); }),
            "the queue is full: 3 waiting, max_num_waiting 3: try again later");
  two.params.n = 4;  // not even later
  EXPECT_EQ(error_of<InvalidArgument>([&] { f.engine.add_request(two); }),
            "n is 4: more than max_num_waiting 3 can never queue up");
  f.engine.step();
  EXPECT_EQ(f.engine.stats().scheduler.num_waiting, 0);
  f.engine.add_request(request({3}));
  f.drain();
}

// A request in the scheduler's queue counts for as many as one that is still on its way there.
TEST(Engine, AFullQueueIsRefusedWhenItsRequestsHaveReachedTheScheduler) {
  EngineConfig config = small_config();
  config.scheduler.max_num_seqs = 1;
  config.scheduler.max_num_waiting = 4;
  Fixture f(config);
  f.engine.add_request(request({1, 2}, 30));
  f.engine.step();
  Request three = request({3, 4});
  three.params.n = 3;
  f.engine.add_request(three);
  f.engine.step();
  EXPECT_EQ(f.engine.stats().scheduler.num_never_admitted, 3);
  EXPECT_EQ(error_of<ResourceExhausted>([&] { f.engine.add_request(three); }),
            "the queue is full: 3 waiting, max_num_waiting 4: try again later");
  f.engine.add_request(request({5}));
  for (const auto& [key, outputs] : f.drain()) {
    EXPECT_EQ(outputs.back().finish_reason, FinishReason::kLength);
  }
}

TEST(Engine, AQueueThatHoldsTooManyTokensIsRefused) {
  EngineConfig config = small_config();
  config.scheduler.max_num_seqs = 1;
  config.scheduler.max_num_waiting_tokens = 5;
  Fixture f(config);
  f.engine.add_request(request(std::vector<TokenId>(9, 1)));  // longer, but alone
  EXPECT_EQ(f.engine.stats().scheduler.num_waiting_tokens, 9);
  EXPECT_EQ(error_of<ResourceExhausted>([&] { f.engine.add_request(request({2})); }),
            "the queue is full: 9 prompt tokens waiting and 1 more, max_num_waiting_tokens 5: try "
            "again later");
  f.engine.step();
  EXPECT_EQ(f.engine.stats().scheduler.num_waiting_tokens, 0);
  Request two = request({2, 3, 4});
  two.params.n = 2;  // one prompt
  const RequestId id = f.engine.add_request(two);
  f.engine.step();
  EXPECT_EQ(f.engine.stats().scheduler.num_waiting_tokens, 3);
  EXPECT_THROW(f.engine.add_request(request({5, 6, 7})), ResourceExhausted);
  f.engine.add_request(request({5, 6}));
  f.engine.abort(id, 1);
  EXPECT_EQ(f.engine.stats().scheduler.num_waiting_tokens, 5);
  f.engine.abort(id);
  EXPECT_EQ(f.engine.stats().scheduler.num_waiting_tokens, 2);
  f.drain();
  EXPECT_EQ(f.engine.stats().scheduler.num_waiting_tokens, 0);
}

TEST(Engine, SaysHowLongARequestHasWaited) {
  EngineConfig config = small_config();
  config.scheduler.max_num_seqs = 1;
  config.scheduler.max_num_batched_tokens = 4;
  Fixture f(config);
  const auto asked = std::chrono::steady_clock::now();
  const RequestId first = f.engine.add_request(request({1, 2, 3, 4, 5, 6, 7, 8, 9}));
  const RequestId second = f.engine.add_request(request({1}));
  const RequestId third = f.engine.add_request(request({2}));
  const auto added = std::chrono::steady_clock::now();
  f.engine.step();
  const auto stepped = std::chrono::steady_clock::now();
  f.engine.abort(third);
  auto outputs = f.drain();
  const double least = std::chrono::duration<double>(stepped - added).count();
  const double most = std::chrono::duration<double>(stepped - asked).count();
  const auto waited = [&](RequestId id) { return outputs[{id, 0}].front().queue_seconds; };
  EXPECT_GT(waited(first), 0);
  EXPECT_LE(waited(first), most);
  EXPECT_GE(waited(second), least);
  EXPECT_GE(waited(third), least);
  const double said_last = outputs[{second, 0}].back().queue_seconds;
  EXPECT_EQ(said_last, waited(second));
}

TEST(Engine, SamplesOfOneRequestDifferBySeedAndIndexOnly) {
  std::vector<std::vector<TokenId>> samples[2];
  for (int run = 0; run < 2; ++run) {
    Fixture f;
    for (int other = 0; other < run * 5; ++other) f.engine.add_request(request({9, 9}));
    Request r = request({1, 2, 3}, 10);
    r.params.temperature = 1;
    r.params.seed = 7;
    r.params.n = 3;
    const RequestId id = f.engine.add_request(r);
    auto all = f.drain();
    for (int32_t i = 0; i < 3; ++i) samples[run].push_back(tokens_of(all[{id, i}]));
    r.params.n = 1;
    EXPECT_EQ(samples[run][0], fake_completion({1, 2, 3}, r.params, 7, {}, 64, kVocabSize).tokens);
  }
  EXPECT_EQ(samples[0], samples[1]);
  EXPECT_NE(samples[0][0], samples[0][1]);
  EXPECT_NE(samples[0][1], samples[0][2]);
}

TEST(Engine, RequestsWithoutASeedGetOneFromTheConfigAndTheirNumber) {
  const auto run = [](uint64_t seed) {
    EngineConfig config = small_config();
    config.seed = seed;
    Fixture f(config);
    std::vector<std::vector<TokenId>> outputs;
    std::vector<RequestId> ids;
    for (int i = 0; i < 2; ++i) {
      Request r = request({1, 2, 3}, 10);
      r.params.temperature = 1;
      ids.push_back(f.engine.add_request(r));
    }
    auto all = f.drain();
    for (const RequestId id : ids) outputs.push_back(tokens_of(all[{id, 0}]));
    return outputs;
  };
  EXPECT_EQ(run(1), run(1));
  EXPECT_NE(run(1), run(2));
  EXPECT_NE(run(1)[0], run(1)[1]);
}

TEST(Engine, PromptLogprobsComeOnceAndForIndexZeroOnly) {
  EngineConfig config = small_config();
  config.scheduler.max_num_batched_tokens = 8;  // in chunks
  Fixture f(config);
  std::vector<TokenId> prompt(30);
  for (int i = 0; i < 30; ++i) prompt[i] = i + 1;
  f.engine.add_request(request(prompt));
  f.drain();
  Request r = request(prompt, 3);
  r.params.n = 2;
  r.params.prompt_logprobs = 0;
  const RequestId id = f.engine.add_request(r);
  auto all = f.drain();
  std::vector<float> logprobs;
  for (const RequestOutput& output : all[{id, 0}]) {
    for (const TokenLogprobs& entry : output.prompt_logprobs) {
      logprobs.push_back(entry.logprobs[0]);
    }
  }
  EXPECT_EQ(logprobs, fake_completion(prompt, r.params, 0, {}, 64, kVocabSize).prompt_logprobs);
  for (const RequestOutput& output : all[{id, 1}]) EXPECT_TRUE(output.prompt_logprobs.empty());
}

TEST(Engine, AbortFreesAtOnceWhenNoStepIsInProgress) {
  Fixture f;
  Request r = request({1, 2, 3, 4, 5}, 20);
  r.params.n = 3;
  const RequestId id = f.engine.add_request(r);
  f.engine.step();
  EXPECT_TRUE(f.engine.abort(id));
  EXPECT_EQ(f.engine.stats().scheduler.num_free_blocks, 32);
  EXPECT_TRUE(f.engine.has_unfinished()) << "its last outputs are still to be fetched";
  EXPECT_TRUE(f.engine.wait_for_work(0));
  const StepOutput last = f.engine.step();
  EXPECT_EQ(last.step_id, -1);
  ASSERT_EQ(last.outputs.size(), 3u);
  for (const RequestOutput& output : last.outputs) {
    EXPECT_EQ(output.finish_reason, FinishReason::kAbort);
    EXPECT_EQ(output.num_output_tokens, 1);
  }
  EXPECT_FALSE(f.engine.has_unfinished());
  EXPECT_FALSE(f.engine.abort(id));
}

TEST(Engine, AbortOfOneSampleLetsTheOthersGoOn) {
  Fixture f;
  Request r = request({1, 2, 3}, 8);
  r.params.n = 3;
  const RequestId id = f.engine.add_request(r);
  f.engine.step();
  EXPECT_TRUE(f.engine.abort(id, 1));
  EXPECT_FALSE(f.engine.abort(id, 1)) << "finished";
  EXPECT_FALSE(f.engine.abort(id, 3));
  EXPECT_FALSE(f.engine.abort(id, -1));
  EXPECT_FALSE(f.engine.abort(id + 1, 0));
  auto all = f.drain();
  EXPECT_EQ((all[{id, 0}].back().num_output_tokens), 8);
  EXPECT_EQ((all[{id, 1}].size()), 1u);
  EXPECT_EQ((all[{id, 1}].back().finish_reason), FinishReason::kAbort);
  EXPECT_EQ((all[{id, 2}].back().num_output_tokens), 8);

  const RequestId other = f.engine.add_request(r);
  f.engine.step();
  for (int32_t i = 0; i < 3; ++i) EXPECT_TRUE(f.engine.abort(other, i));
  EXPECT_FALSE(f.engine.abort(other)) << "its last sample was its end";
  f.drain();
}

TEST(Engine, LogprobsComeWithEveryTokenTheLastOneToo) {
  Fixture f;
  f.model->tamper = [](ModelRunnerOutput* o) {
    o->logprobs.assign(o->sampled_token_ids.size(), TokenLogprobs{});
    o->logprobs[0] = {{o->sampled_token_ids[0]}, {-0.25f}, 1};  // the other asked for none
  };
  Request r = request({1, 2, 3}, 4);
  r.params.logprobs = 0;
  const RequestId id = f.engine.add_request(r);
  r.params.logprobs = SamplingParams::kNoLogprobs;
  const RequestId other = f.engine.add_request(r);
  auto all = f.drain();
  for (const RequestOutput& output : all[{id, 0}]) {
    ASSERT_EQ(output.logprobs.size(), 1u);
    EXPECT_EQ(output.logprobs[0].token_ids, output.new_token_ids);
  }
  for (const RequestOutput& output : all[{other, 0}]) EXPECT_TRUE(output.logprobs.empty());
}

TEST(Engine, AddsAndAbortsDoNotWaitForTheStepInProgress) {
  Fixture f;
  const RequestId a = f.engine.add_request(request({1, 2, 3}, 20));
  const RequestId b = f.engine.add_request(request({4, 5, 6}, 20));
  f.model->close();
  StepOutput output;
  std::thread stepper([&] { output = f.engine.step(); });
  f.model->wait_until_inside();
  EXPECT_TRUE(f.engine.abort(a));
  const RequestId c = f.engine.add_request(request({7, 8}, 2));
  EXPECT_EQ(f.engine.stats().scheduler.num_waiting, 1);
  const RequestId d = f.engine.add_request(request({7, 8}, 2));
  EXPECT_TRUE(f.engine.abort(d)) << "before the scheduler has heard of it";
  f.model->open();
  stepper.join();
  f.engine.check_integrity();
  EXPECT_EQ(f.engine.stats().scheduler.num_free_blocks, 31) << "a's block is free again";
  int32_t num_aborted = 0;
  for (const RequestOutput& o : output.outputs) {
    if (o.request_id == b) {
      EXPECT_EQ(o.new_token_ids.size(), 1u);
    } else {
      EXPECT_EQ(o.finish_reason, FinishReason::kAbort);
      EXPECT_TRUE(o.new_token_ids.empty()) << "a late result came through";
      ++num_aborted;
    }
  }
  EXPECT_EQ(num_aborted, 2);
  auto rest = f.drain();
  EXPECT_EQ(tokens_of(rest[{c, 0}]).size(), 2u);
  EXPECT_EQ(rest.count({a, 0}), 0u);
}

TEST(Engine, AFailingRunnerCostsTheRequestsOfItsStepOnly) {
  for (const bool in_wait : {false, true}) {
    EngineConfig config = small_config();
    config.scheduler.max_num_seqs = 2;
    Fixture f(config);
    std::set<RequestId> lost;
    for (int i = 0; i < 2; ++i) lost.insert(f.engine.add_request(request({1, 2, 3, 4, 5})));
    const RequestId waiting = f.engine.add_request(request({1, 2, 3, 4, 5}));
    f.engine.step();
    (in_wait ? f.model->fail_in_wait : f.model->fail_in_execute) = true;
    EXPECT_EQ(error_of<std::runtime_error>([&] { f.engine.step(); }), "out of luck");
    (in_wait ? f.model->fail_in_wait : f.model->fail_in_execute) = false;
    f.engine.check_integrity();
    EXPECT_EQ(f.engine.stats().scheduler.num_free_blocks, 32);
    auto all = f.drain();
    for (const RequestId id : lost) {
      const std::vector<RequestOutput>& outputs = all[{id, 0}];
      ASSERT_EQ(outputs.size(), 1u);
      EXPECT_EQ(outputs[0].finish_reason, FinishReason::kAbort);
    }
    EXPECT_EQ(tokens_of(all[{waiting, 0}]),
              fake_completion({1, 2, 3, 4, 5}, request({}).params, 0, {}, 64, kVocabSize).tokens);
  }
}

TEST(Engine, ARunnerThatAnswersNonsenseFailsLikeOneThatThrows) {
  const std::pair<const char*, std::function<void(ModelRunnerOutput*)>> cases[] = {
      {"the model runner returned 0 sampled_token_ids, not 1",
       [](ModelRunnerOutput* o) { o->sampled_token_ids.clear(); }},
      {"the model runner returned token 50, not in [0, 50)",
       [](ModelRunnerOutput* o) { o->sampled_token_ids[0] = kVocabSize; }},
      {"the model runner returned 1 prompt_logprobs, not 0",
       [](ModelRunnerOutput* o) { o->prompt_logprobs.resize(1); }},
      {"the model runner returned 2 logprobs, not 1",
       [](ModelRunnerOutput* o) { o->logprobs.resize(2); }},
  };
  for (const auto& [message, tamper] : cases) {
    Fixture f;
    f.engine.add_request(request({1, 2, 3}));
    f.model->tamper = tamper;
    EXPECT_EQ(error_of<Error>([&] { f.engine.step(); }), message);
    f.model->tamper = nullptr;
    f.drain();
  }
}

TEST(Engine, WaitForWorkWakesForARequestAndForWake) {
  Fixture f;
  EXPECT_FALSE(f.engine.wait_for_work(0));
  EXPECT_FALSE(f.engine.wait_for_work(0.01));
  std::thread waker([&] { f.engine.wake(); });
  EXPECT_FALSE(f.engine.wait_for_work(1e300));
  waker.join();
  std::thread adder([&] { f.engine.add_request(request({1})); });
  EXPECT_TRUE(f.engine.wait_for_work(1e300));
  adder.join();
  f.drain();
}

TEST(Engine, ResetPrefixCacheWhenIdle) {
  Fixture f;
  f.engine.add_request(request({1, 2, 3, 4, 5, 6, 7, 8, 9}));
  f.engine.step();
  EXPECT_FALSE(f.engine.reset_prefix_cache());
  f.drain();
  EXPECT_TRUE(f.engine.reset_prefix_cache());
  const RequestId id = f.engine.add_request(request({1, 2, 3, 4, 5, 6, 7, 8, 9}));
  auto all = f.drain();
  EXPECT_EQ((all[{id, 0}].back().num_cached_tokens), 0);
}

TEST(Engine, RefusesAConfigThatMakesNoSense) {
  EngineConfig config = small_config();
  const auto model = std::make_shared<GatedModel>(config);
  EXPECT_THROW(Engine(config, nullptr), InvalidArgument);
  config.scheduler.eos_token_ids = {kVocabSize};
  EXPECT_THROW(Engine(config, model), InvalidArgument);
  config = small_config();
  config.vocab_size = 0;
  EXPECT_THROW(Engine(config, model), InvalidArgument);
}

// Threads add and abort while others step: everybody gets the right tokens or an abort, once.
TEST(Engine, SurvivesManyThreads) {
  Fixture f;
  constexpr int kThreads = 4;
  constexpr int kRequests = 150;
  std::mutex mutex;
  std::map<RequestId, Request> asked;
  std::map<RequestId, std::vector<RequestOutput>> heard;
  std::atomic<int> num_adding{kThreads};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kRequests; ++i) {
        const Request r = request({t, i % 7, 3, 4, 5, i % 3}, 1 + i % 9);
        const RequestId id = f.engine.add_request(r);
        {
          std::lock_guard<std::mutex> lock(mutex);
          asked.emplace(id, r);
        }
        if (i % 4 == 0) f.engine.abort(id);
        if (i % 16 == 0) std::this_thread::yield();
      }
      --num_adding;
      f.engine.wake();
    });
  }
  for (int t = 0; t < 2; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; num_adding > 0 || f.engine.has_unfinished(); ++i) {
        if (i == 1000000) std::abort();  // it does not come to an end
        f.engine.wait_for_work(0.01);
        const StepOutput output = f.engine.step();
        std::lock_guard<std::mutex> lock(mutex);
        for (const RequestOutput& o : output.outputs) heard[o.request_id].push_back(o);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  f.engine.check_integrity();
  EXPECT_EQ(f.engine.stats().scheduler.num_free_blocks, 32);
  ASSERT_EQ(asked.size(), static_cast<size_t>(kThreads * kRequests));
  for (auto& [id, r] : asked) {
    std::vector<RequestOutput>& outputs = heard[id];
    int32_t num_ends = 0;
    for (const RequestOutput& o : outputs) num_ends += o.finish_reason != FinishReason::kNone;
    ASSERT_EQ(num_ends, 1);
    // Two steppers may hand in a request's outputs in either order.
    std::sort(outputs.begin(), outputs.end(), [](const RequestOutput& a, const RequestOutput& b) {
      return a.num_output_tokens < b.num_output_tokens;
    });
    const std::vector<TokenId> tokens = tokens_of(outputs);
    std::vector<TokenId> expected =
        fake_completion(r.prompt_token_ids, r.params, 0, {}, 64, kVocabSize).tokens;
    const bool aborted = std::any_of(outputs.begin(), outputs.end(), [](const RequestOutput& o) {
      return o.finish_reason == FinishReason::kAbort;
    });
    if (aborted) expected.resize(tokens.size());
    ASSERT_EQ(tokens, expected);
  }
}

}  // namespace
}  // namespace fastpage
