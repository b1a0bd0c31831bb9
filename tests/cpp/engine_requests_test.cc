// What the engine makes of n, best_of, beams, proposals, and of what it is to report beside tokens.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <fstream>
#include <numeric>
#include <sstream>

#include "engine_fixture.h"
#include "fastpage/replay.h"

namespace fastpage {
namespace {

Request sampled(std::vector<TokenId> prompt, int32_t n, int32_t max_tokens = 8) {
  Request out = request(std::move(prompt), max_tokens);
  out.params.temperature = 1;
  out.params.seed = 7;
  out.params.n = n;
  return out;
}

// Logprobs of an output, from the fake model itself.
double cumulative_logprob(const std::vector<TokenId>& prompt, const std::vector<TokenId>& output) {
  FakeContext context;
  context.add(prompt);
  double sum = 0;
  for (const TokenId token : output) {
    sum += fake_logprob(context.digest, token);
    context.add(token);
  }
  return sum;
}

TEST(EngineRequests, SamplesShareThePromptAndCopyWhatTheyWrite) {
  Fixture f;
  Request r = sampled({1, 2, 3, 4, 5, 6}, 4);
  const RequestId id = f.engine.add_request(r);
  auto all = f.drain();
  for (int32_t i = 0; i < 4; ++i) {
    EXPECT_EQ(tokens_of(all[{id, i}]),
              fake_completion(r.prompt_token_ids, r.params, sample_seed(7, i), {}, 64, kVocabSize)
                  .tokens);
  }
  const EngineStats stats = f.engine.stats();
  EXPECT_EQ(stats.num_computed_tokens, 6 + 4 * 7) << "the prompt once, and not the last tokens";
  EXPECT_EQ(stats.scheduler.num_blocks_copied, 3) << "the last holder writes in place";
}

TEST(EngineRequests, BestOfReturnsTheMostLikelyOnceAllAreDone) {
  Fixture f;
  Request r = sampled({1, 2, 3, 4, 5}, 2);
  r.params.best_of = 6;
  const RequestId id = f.engine.add_request(r);
  std::vector<RequestOutput> outputs;
  while (f.engine.has_unfinished()) {
    EXPECT_TRUE(outputs.empty()) << "an output came before the end";
    for (RequestOutput& output : f.engine.step().outputs) outputs.push_back(std::move(output));
  }
  std::vector<std::pair<double, std::vector<TokenId>>> expected;
  for (int32_t i = 0; i < 6; ++i) {
    const auto tokens =
        fake_completion(r.prompt_token_ids, r.params, sample_seed(7, i), {}, 64, kVocabSize).tokens;
    expected.emplace_back(-cumulative_logprob(r.prompt_token_ids, tokens), tokens);
  }
  std::sort(expected.begin(), expected.end());
  ASSERT_EQ(outputs.size(), 2u);
  for (int32_t rank = 0; rank < 2; ++rank) {
    EXPECT_EQ(outputs[rank].request_id, id);
    EXPECT_EQ(outputs[rank].index, rank);
    EXPECT_EQ(outputs[rank].new_token_ids, expected[rank].second);
    EXPECT_NEAR(outputs[rank].cumulative_logprob, -expected[rank].first, 1e-4);
    EXPECT_EQ(outputs[rank].finish_reason, FinishReason::kLength);
    EXPECT_EQ(outputs[rank].num_prompt_tokens, 5);
    EXPECT_EQ(outputs[rank].num_output_tokens, 8);
    EXPECT_TRUE(outputs[rank].logprobs.empty()) << "they were not asked for";
  }
  EXPECT_EQ(f.engine.stats().num_computed_tokens, 5 + 6 * 7);
  EXPECT_FALSE(f.engine.abort(id));
}

TEST(EngineRequests, BestOfReportsLogprobsThatWereAskedFor) {
  Fixture f;
  Request r = sampled({1, 2, 3, 4, 5}, 2);
  r.params.best_of = 3;
  r.params.logprobs = 2;
  r.params.prompt_logprobs = 0;
  const RequestId id = f.engine.add_request(r);
  auto all = f.drain();
  for (int32_t rank = 0; rank < 2; ++rank) {
    const RequestOutput& output = all[{id, rank}].back();
    ASSERT_EQ(output.logprobs.size(), 8u);
    double sum = 0;
    for (size_t i = 0; i < 8; ++i) {
      EXPECT_EQ(output.logprobs[i].token_ids[0], output.new_token_ids[i]);
      EXPECT_EQ(output.logprobs[i].token_ids.size(), 3u);
      sum += output.logprobs[i].logprobs[0];
    }
    EXPECT_DOUBLE_EQ(output.cumulative_logprob, sum);
  }
  ASSERT_EQ((all[{id, 0}].size()), 2u) << "prompt logprobs do not wait for the end";
  EXPECT_EQ((all[{id, 0}][0].prompt_logprobs.size()), 4u);
  EXPECT_TRUE((all[{id, 0}][0].new_token_ids.empty()));
}

TEST(EngineRequests, CumulativeLogprobsFollowTheTokens) {
  Fixture f;
  Request r = request({1, 2, 3}, 4);
  r.params.logprobs = 0;
  const RequestId id = f.engine.add_request(r);
  auto all = f.drain();
  double sum = 0;
  for (const RequestOutput& output : all[{id, 0}]) {
    sum += output.logprobs[0].logprobs[0];
    EXPECT_DOUBLE_EQ(output.cumulative_logprob, sum);
  }
  EXPECT_LT(sum, 0);
}

TEST(EngineRequests, BeamsComeAtTheEndBestFirst) {
  Fixture f;
  Request r = request({1, 2, 3, 4, 5, 6}, 7);
  r.params.beam_width = 4;
  r.params.n = 3;
  r.params.length_penalty = 0.5f;
  r.params.ignore_eos = false;
  const RequestId id = f.engine.add_request(r);
  const RequestId other = f.engine.add_request(request({9, 8}, 12));
  auto all = f.drain();
  const auto expected = fake_beam_search(r.prompt_token_ids, r.params, {0}, 64, kVocabSize);
  for (int32_t rank = 0; rank < 3; ++rank) {
    const std::vector<RequestOutput>& outputs = all[{id, rank}];
    ASSERT_EQ(outputs.size(), 1u);
    const auto num_tokens = static_cast<int32_t>(expected[rank].token_ids.size());
    EXPECT_EQ(outputs[0].new_token_ids, expected[rank].token_ids);
    EXPECT_EQ(outputs[0].score, expected[rank].score);
    EXPECT_EQ(outputs[0].finish_reason, expected[rank].finish_reason);
    EXPECT_EQ(outputs[0].stop_token_id, expected[rank].stop_token_id);
    EXPECT_EQ(outputs[0].num_output_tokens, num_tokens);
    EXPECT_NEAR(outputs[0].cumulative_logprob,
                cumulative_logprob(r.prompt_token_ids, outputs[0].new_token_ids), 1e-3);
    EXPECT_NEAR(outputs[0].cumulative_logprob, outputs[0].score * std::sqrt(num_tokens), 1e-3);
    EXPECT_TRUE(outputs[0].logprobs.empty());
  }
  EXPECT_EQ(all.count({id, 3}), 0u);
  EXPECT_EQ(tokens_of(all[{other, 0}]).size(), 12u);
}

TEST(EngineRequests, WhatComesAtTheEndIsAbortedWholeOrNotAtAll) {
  for (const bool beams : {false, true}) {
    Fixture f;
    Request r = sampled({1, 2, 3}, 2, 20);
    r.params.best_of = beams ? 0 : 3;
    r.params.beam_width = beams ? 3 : 0;
    r.params.temperature = beams ? 0 : 1;
    const RequestId id = f.engine.add_request(r);
    EXPECT_FALSE(f.engine.abort(id, 0)) << "before it is admitted";
    for (int i = 0; i < 4; ++i) EXPECT_TRUE(f.engine.step().outputs.empty());
    for (int32_t index = 0; index < 4; ++index) EXPECT_FALSE(f.engine.abort(id, index));
    EXPECT_TRUE(f.engine.abort(id));
    const StepOutput last = f.engine.step();
    ASSERT_EQ(last.outputs.size(), 2u) << "one for each of its n";
    for (int32_t i = 0; i < 2; ++i) {
      EXPECT_EQ(last.outputs[i].index, i);
      EXPECT_EQ(last.outputs[i].finish_reason, FinishReason::kAbort);
      EXPECT_TRUE(last.outputs[i].new_token_ids.empty());
      EXPECT_EQ(last.outputs[i].num_output_tokens, 0);
    }
    EXPECT_FALSE(f.engine.has_unfinished());
    EXPECT_EQ(f.engine.stats().scheduler.num_free_blocks, 32);
    EXPECT_FALSE(f.engine.abort(id));
  }
}

TEST(EngineRequests, AFailedStepTakesWhatIsHeldBackWithIt) {
  for (const bool beams : {false, true}) {
    Fixture f;
    Request r = sampled({1, 2, 3}, 2, 20);
    r.params.best_of = beams ? 0 : 3;
    r.params.beam_width = beams ? 3 : 0;
    r.params.temperature = beams ? 0 : 1;
    const RequestId id = f.engine.add_request(r);
    for (int i = 0; i < 4; ++i) f.engine.step();
    f.model->fail_in_wait = true;
    EXPECT_THROW(f.engine.step(), std::runtime_error);
    f.model->fail_in_wait = false;
    auto all = f.drain();
    ASSERT_EQ(all.size(), 2u);
    for (int32_t i = 0; i < 2; ++i) {
      EXPECT_EQ((all[{id, i}].back().finish_reason), FinishReason::kAbort);
    }
  }
}

TEST(EngineRequests, ARunnerThatLeavesOutLogprobsFails) {
  const std::pair<const char*, std::function<void(ModelRunnerOutput*)>> cases[] = {
      {"row 1, ", [](ModelRunnerOutput* o) { o->logprobs[1] = TokenLogprobs(); }},
      {"row 1, ", [](ModelRunnerOutput* o) { o->logprobs[1].logprobs.pop_back(); }},
      {"row 1, ", [](ModelRunnerOutput* o) { o->logprobs.clear(); }},
  };
  for (const auto& [words, tamper] : cases) {
    Fixture f;
    f.engine.add_request(request({4, 5}));
    Request r = request({1, 2, 3});
    r.params.logprobs = 0;
    f.engine.add_request(r);
    f.model->tamper = tamper;
    EXPECT_NE(error_of<Error>([&] {
                f.engine.step();
              }).find(std::string("no logprobs for sampling ") + words),
              std::string::npos);
    f.model->tamper = nullptr;
    f.drain();
  }
  // Entry 0 alone is no answer to a beam, which goes on with the others.
  Fixture f;
  Request r = request({1, 2, 3});
  r.params.beam_width = 2;
  f.engine.add_request(r);
  f.model->tamper = [](ModelRunnerOutput* o) {
    o->logprobs[0].token_ids.resize(1);
    o->logprobs[0].logprobs.resize(1);
  };
  EXPECT_THROW(f.engine.step(), Error);
  f.model->tamper = nullptr;
  f.drain();
}

TEST(EngineRequests, ProposedTokensComeSeveralAStepWithTheirLogprobs) {
  std::vector<TokenId> tokens[2];
  int64_t num_steps[2];
  for (const bool speculates : {false, true}) {
    EngineConfig config = small_config();
    config.scheduler.num_speculative_tokens = speculates ? 3 : 0;
    config.scheduler.prompt_lookup_min = 1;
    Fixture f(config);
    Request r = request({25, 26, 27, 28, 29, 25, 26}, 40);
    r.params.top_p = 0.5f;  // a text that repeats itself: see fake_token()
    r.params.logprobs = 1;
    const RequestId id = f.engine.add_request(r);
    auto all = f.drain();
    size_t most = 0;
    for (const RequestOutput& output : all[{id, 0}]) {
      most = std::max(most, output.new_token_ids.size());
      ASSERT_EQ(output.logprobs.size(), output.new_token_ids.size());
      for (size_t i = 0; i < output.logprobs.size(); ++i) {
        EXPECT_EQ(output.logprobs[i].token_ids[0], output.new_token_ids[i]);
      }
    }
    tokens[speculates] = tokens_of(all[{id, 0}]);
    num_steps[speculates] = f.engine.stats().num_steps;
    const SchedulerStats stats = f.engine.stats().scheduler;
    EXPECT_EQ(stats.num_accepted_tokens > 0, speculates);
    EXPECT_GE(stats.num_draft_tokens, stats.num_accepted_tokens);
    EXPECT_EQ(most > 1, speculates);
    EXPECT_NEAR((all[{id, 0}].back().cumulative_logprob),
                cumulative_logprob(r.prompt_token_ids, tokens[speculates]), 1e-3);
  }
  EXPECT_EQ(tokens[0], tokens[1]);
  EXPECT_EQ(num_steps[0], 40);
  EXPECT_LT(num_steps[1], 40);
}

TEST(EngineRequests, PromptLogprobsGoOnWhenTheSampleThatComputesThePromptIsAborted) {
  EngineConfig config = small_config();
  config.scheduler.max_num_batched_tokens = 8;  // in chunks
  Fixture f(config);
  std::vector<TokenId> prompt(30);
  std::iota(prompt.begin(), prompt.end(), 1);
  Request r = sampled(prompt, 3, 4);
  r.params.prompt_logprobs = 0;
  const RequestId id = f.engine.add_request(r);
  std::vector<float> logprobs;
  const auto take = [&](const std::vector<RequestOutput>& outputs) {
    for (const RequestOutput& output : outputs) {
      for (const TokenLogprobs& entry : output.prompt_logprobs) {
        logprobs.push_back(entry.logprobs[0]);
      }
    }
  };
  take(f.engine.step().outputs);
  f.model->close();
  std::vector<RequestOutput> outputs;
  std::thread stepper([&] { outputs = f.engine.step().outputs; });
  f.model->wait_until_inside();
  EXPECT_TRUE(f.engine.abort(id, 0));
  f.model->open();
  stepper.join();
  take(outputs);
  while (f.engine.has_unfinished()) take(f.engine.step().outputs);
  EXPECT_EQ(logprobs, fake_completion(prompt, r.params, 0, {}, 64, kVocabSize).prompt_logprobs);
}

TEST(EngineRequests, KvEventsComeWithTheSteps) {
  EngineConfig config = small_config();
  config.scheduler.enable_kv_events = true;
  Fixture f(config);
  f.engine.add_request(request({1, 2, 3, 4, 5, 6, 7, 8, 9}, 2));
  std::vector<KvEvent> events;
  while (f.engine.has_unfinished()) {
    for (KvEvent& event : f.engine.step().kv_events) events.push_back(std::move(event));
  }
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[0].kind, KvEvent::Kind::kStored);
  EXPECT_EQ(events[0].token_ids, (std::vector<TokenId>{1, 2, 3, 4}));
  EXPECT_EQ(events[1].parent_hash, events[0].hash);
  EXPECT_TRUE(f.engine.step().kv_events.empty());
  EXPECT_TRUE(f.engine.reset_prefix_cache());
  events = f.engine.step().kv_events;
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0].kind, KvEvent::Kind::kCleared);
}

void expect_as_recorded(std::istream&& log) {
  const ReplayResult result = replay(log);
  EXPECT_EQ(result.divergence, "");
  EXPECT_TRUE(result.complete);
  EXPECT_GT(result.num_steps, 5);
}

TEST(EngineRequests, ItsSchedulersCallsCanBeRecordedAndReplayed) {
  const std::string path = testing::TempDir() + "engine_requests_test.log";
  for (const bool async_scheduling : {false, true}) {
    for (const bool to_file : {false, true}) {
      std::stringstream stream;
      {
        Fixture f(small_config(async_scheduling));
        if (to_file) {
          f.engine.record(path);
        } else {
          f.engine.record(&stream);
        }
        const RequestId id = f.engine.add_request(sampled({1, 2, 3, 4, 5}, 3));
        f.engine.add_request(request({1, 2, 3, 4, 5}));
        f.engine.step();
        f.engine.abort(id, 1);
        f.drain();
        EXPECT_EQ(error_of<InvalidArgument>([&] { f.engine.record(path); }),
                  "record() has to come before the first request");
        // Not only once the engine is gone: it may never go in good order.
        if (to_file) expect_as_recorded(std::ifstream(path, std::ios::binary));
      }
      if (!to_file) expect_as_recorded(std::move(stream));
    }
  }
  std::remove(path.c_str());
  Fixture f;
  EXPECT_EQ(error_of<InvalidArgument>([&] { f.engine.record("/nowhere/at/all"); }),
            "record(): cannot write /nowhere/at/all: No such file or directory");
  f.engine.add_request(request({1}));
  f.drain();
}

}  // namespace
}  // namespace fastpage
