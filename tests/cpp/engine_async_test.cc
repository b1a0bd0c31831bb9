// Two steps under way: the same outputs, and no accident at which a request or a block is lost.
#include <gtest/gtest.h>

#include <atomic>
#include <numeric>
#include <random>

#include "engine_fixture.h"

namespace fastpage {
namespace {

// A bit of everything.
std::vector<Request> mixed_requests(uint32_t seed, int32_t count) {
  std::mt19937 random(seed);
  const auto below = [&](uint32_t n) { return static_cast<int32_t>(random() % n); };
  std::vector<Request> requests;
  for (int32_t i = 0; i < count; ++i) {
    std::vector<TokenId> prompt(1 + below(24));
    std::iota(prompt.begin(), prompt.end(), 1 + below(3));
    Request r = request(prompt, 1 + below(16));
    r.params.ignore_eos = below(2) == 0;
    if (below(2) == 0) {
      r.params.temperature = 1;
      r.params.seed = random();
      r.params.n = 1 + below(3);
      if (below(3) == 0) r.params.best_of = r.params.n + below(3);
    } else if (below(3) == 0) {
      r.params.beam_width = 1 + below(3);
    }
    if (r.params.beam_width == 0) {
      r.params.logprobs = below(3) - 1;
      r.params.prompt_logprobs = below(3) == 0 ? 0 : -1;
      if (below(4) == 0) r.params.stop_token_ids = {below(kVocabSize)};
    }
    requests.push_back(std::move(r));
  }
  return requests;
}

struct Result {
  std::vector<TokenId> tokens;
  FinishReason finish_reason = FinishReason::kNone;
  TokenId stop_token_id = -1;
  double cumulative_logprob = 0;
  float score = 0;
  std::vector<float> prompt_logprobs;

  bool operator==(const Result& o) const {
    return tokens == o.tokens && finish_reason == o.finish_reason &&
           stop_token_id == o.stop_token_id && cumulative_logprob == o.cumulative_logprob &&
           score == o.score && prompt_logprobs == o.prompt_logprobs;
  }
};

std::map<std::pair<RequestId, int32_t>, Result> results(const Outputs& all) {
  std::map<std::pair<RequestId, int32_t>, Result> out;
  for (const auto& [key, outputs] : all) {
    Result& result = out[key];
    result.tokens = tokens_of(outputs);
    result.finish_reason = outputs.back().finish_reason;
    result.stop_token_id = outputs.back().stop_token_id;
    result.cumulative_logprob = outputs.back().cumulative_logprob;
    result.score = outputs.back().score;
    for (const RequestOutput& output : outputs) {
      for (const TokenLogprobs& entry : output.prompt_logprobs) {
        result.prompt_logprobs.push_back(entry.logprobs[0]);
      }
    }
  }
  return out;
}

TEST(EngineAsync, OutputsAreThoseOfTheSynchronousEngine) {
  int64_t num_preemptions = 0;
  int64_t num_swapped_in = 0;
  for (uint32_t seed = 0; seed < 60; ++seed) {
    const std::vector<Request> requests = mixed_requests(seed, 12);
    std::map<std::pair<RequestId, int32_t>, Result> expected;
    for (const bool async_scheduling : {false, true}) {
      EngineConfig config = small_config(async_scheduling);
      config.scheduler.num_blocks = 22 + seed % 3 * 6;
      config.scheduler.num_host_blocks = seed % 2 * 16;
      config.scheduler.swap_cost_per_block = 0.1f;
      config.scheduler.max_num_batched_tokens = 16;
      config.scheduler.num_speculative_tokens = seed % 4 == 0 ? 2 : 0;
      Fixture f(config);
      Outputs all;
      int64_t last_step = 0;
      const auto step = [&] {
        StepOutput output = f.engine.step();
        if (output.step_id >= 0) {
          ASSERT_GT(output.step_id, last_step) << "steps end in their order";
          last_step = output.step_id;
        }
        for (RequestOutput& o : output.outputs) all[{o.request_id, o.index}].push_back(o);
        f.engine.check_integrity();
      };
      for (const Request& r : requests) {
        f.engine.add_request(r);
        if (seed % 2 == 0) step();
      }
      for (int i = 0; f.engine.has_unfinished(); ++i) {
        ASSERT_LT(i, 1000);
        step();
      }
      const SchedulerStats stats = f.engine.stats().scheduler;
      EXPECT_EQ(stats.num_free_blocks, stats.num_blocks);
      if (async_scheduling) {
        EXPECT_EQ(results(all), expected) << "seed " << seed;
        if (config.scheduler.num_speculative_tokens == 0) {
          EXPECT_GT(f.model->num_future_tokens, 10u) << "it did not run ahead";
        }
        num_preemptions += stats.num_preemptions;
        num_swapped_in += stats.num_blocks_swapped_in;
      } else {
        expected = results(all);
        ASSERT_GE(expected.size(), 12u);
      }
    }
  }
  EXPECT_GT(num_preemptions, 20);
  EXPECT_GT(num_swapped_in, 5);
}

TEST(EngineAsync, NeedsARunnerThatTakesTwoSteps) {
  const auto model = std::make_shared<GatedModel>(small_config());
  EXPECT_EQ(error_of<InvalidArgument>([&] { Engine(small_config(true), model); }),
            "async_scheduling needs a model runner that takes two steps at a time, and this one "
            "takes one: turn async_scheduling off");
}

TEST(EngineAsync, ThePipelineFillsAndDrains) {
  Fixture f(small_config(true));
  Request r = request({1, 2, 3}, 20);
  const auto reply = fake_completion(r.prompt_token_ids, r.params, 0, {}, 64, kVocabSize).tokens;
  // Not known before it comes, unlike max_tokens: a step too many is under way then.
  r.params.stop_token_ids = {reply[3]};
  ASSERT_EQ(std::count(reply.begin(), reply.begin() + 4, reply[3]), 1);
  f.engine.add_request(r);
  for (int64_t i = 0; i < 4; ++i) {
    const StepOutput output = f.engine.step();
    EXPECT_EQ(output.step_id, f.model->waited_for.back());
    ASSERT_EQ(output.outputs.size(), 1u);
    EXPECT_EQ(output.outputs[0].new_token_ids, std::vector<TokenId>{reply[i]});
  }
  EXPECT_TRUE(f.engine.has_unfinished()) << "the step that was one too many";
  const StepOutput late = f.engine.step();
  EXPECT_GT(late.step_id, 0);
  EXPECT_TRUE(late.outputs.empty()) << "a late result came through";
  EXPECT_FALSE(f.engine.has_unfinished());
  EXPECT_EQ(f.engine.step().step_id, -1);
  f.engine.check_integrity();
  EXPECT_EQ(f.engine.stats().scheduler.num_free_blocks, 32);

  // What ends by its length is known to end.
  const int64_t num_steps = f.engine.stats().num_steps;
  f.engine.add_request(request({1, 2, 3}, 4));
  f.drain();
  EXPECT_EQ(f.engine.stats().num_steps, num_steps + 4);
}

TEST(EngineAsync, SchedulesWhileTheModelComputes) {
  Fixture f(small_config(true));
  f.engine.add_request(request({1, 2, 3}, 20));
  f.model->close();
  StepOutput output;
  std::thread stepper([&] { output = f.engine.step(); });
  f.model->wait_until_inside();
  // The second step can be scheduled although the first has not got past the gate.
  while (f.engine.stats().scheduler.kv_slots_used < 3 + 4) std::this_thread::yield();
  f.model->open();
  stepper.join();
  EXPECT_EQ(output.outputs.size(), 1u);
  f.drain();
}

TEST(EngineAsync, AddsAndAbortsWhileStepsAreUnderWay) {
  Fixture f(small_config(true));
  const Request r = request({1, 2, 3, 4, 5}, 20);
  const RequestId a = f.engine.add_request(r);
  const RequestId b = f.engine.add_request(r);
  Outputs all;
  const auto take = [&](const StepOutput& output) {
    for (const RequestOutput& o : output.outputs) all[{o.request_id, o.index}].push_back(o);
  };
  take(f.engine.step());
  EXPECT_TRUE(f.engine.abort(a)) << "between two calls of step(), one step is under way";
  f.engine.check_integrity();
  f.model->close();
  StepOutput output;
  std::thread stepper([&] { output = f.engine.step(); });
  f.model->wait_until_inside();
  const RequestId c = f.engine.add_request(r);
  const RequestId d = f.engine.add_request(r);
  EXPECT_TRUE(f.engine.abort(d));
  f.model->open();
  stepper.join();
  take(output);
  for (auto& [key, outputs] : f.drain()) {
    all[key].insert(all[key].end(), outputs.begin(), outputs.end());
  }
  const auto expected = fake_completion(r.prompt_token_ids, r.params, 0, {}, 64, kVocabSize).tokens;
  EXPECT_EQ(tokens_of(all[{b, 0}]), expected);
  EXPECT_EQ(tokens_of(all[{c, 0}]), expected);
  EXPECT_EQ(tokens_of(all[{a, 0}]).size(), 1u) << "a late result came through";
  EXPECT_EQ((all[{a, 0}].back().finish_reason), FinishReason::kAbort);
  ASSERT_EQ((all[{d, 0}].size()), 1u);
  EXPECT_EQ((all[{d, 0}].back().finish_reason), FinishReason::kAbort);
}

TEST(EngineAsync, AFailureInWaitCostsTheRequestsOfBothSteps) {
  for (const bool both_fail : {false, true}) {
    EngineConfig config = small_config(true);
    config.scheduler.max_num_seqs = 2;
    Fixture f(config);
    const Request r = request({1, 2, 3, 4, 5}, 10);
    const RequestId first = f.engine.add_request(r);
    f.engine.step();
    const RequestId second = f.engine.add_request(r);  // in the later one of the two only
    const RequestId waiting = f.engine.add_request(r);
    const int64_t failing = f.model->waited_for.back() + 1;
    (both_fail ? f.model->fail_in_wait = true : f.model->fail_in_wait_for = failing);
    EXPECT_EQ(error_of<std::runtime_error>([&] { f.engine.step(); }), "out of luck");
    EXPECT_EQ(f.model->waited_for.back(), failing + 1) << "the step after it is not left behind";
    f.model->fail_in_wait = false;
    f.model->fail_in_wait_for = -1;
    f.engine.check_integrity();
    EXPECT_EQ(f.engine.stats().scheduler.num_free_blocks, 32);
    auto all = f.drain();
    for (const RequestId id : {first, second}) {
      ASSERT_EQ((all[{id, 0}].size()), 1u);
      EXPECT_EQ((all[{id, 0}][0].finish_reason), FinishReason::kAbort);
    }
    EXPECT_EQ(tokens_of(all[{waiting, 0}]),
              fake_completion(r.prompt_token_ids, r.params, 0, {}, 64, kVocabSize).tokens);
  }
}

TEST(EngineAsync, AFailureInExecuteCostsTheRequestsOfThatStepOnly) {
  EngineConfig config = small_config(true);
  config.scheduler.max_num_batched_tokens = 5;
  Fixture f(config);
  const Request r = request({1, 2, 3, 4, 5}, 1);
  const RequestId first = f.engine.add_request(r);
  const RequestId second = f.engine.add_request(r);
  const RequestId third = f.engine.add_request(r);
  EXPECT_EQ((f.engine.step().outputs[0].request_id), first);
  f.model->fail_in_execute = true;  // of the third one's step, while the second one's is under way
  EXPECT_EQ(error_of<std::runtime_error>([&] { f.engine.step(); }), "out of luck");
  f.model->fail_in_execute = false;
  f.engine.check_integrity();
  auto all = f.drain();
  EXPECT_EQ((all[{second, 0}].back().finish_reason), FinishReason::kLength);
  EXPECT_EQ((all[{third, 0}].back().finish_reason), FinishReason::kAbort);
}

TEST(EngineAsync, ARunnerThatAnswersNonsenseFailsLikeOneThatThrows) {
  Fixture f(small_config(true));
  f.engine.add_request(request({1, 2, 3}));
  f.model->tamper = [](ModelRunnerOutput* o) { o->sampled_token_ids[0] = kVocabSize; };
  EXPECT_EQ(error_of<Error>([&] { f.engine.step(); }),
            "the model runner returned token 50, not in [0, 50)");
  f.model->tamper = nullptr;
  f.engine.add_request(request({1, 2, 3}));
  f.drain();
}

// The engine waits for what the runner has begun, which points into it.
TEST(EngineAsync, AnEngineMayEndWithAStepUnderWay) {
  const EngineConfig config = small_config(true);
  const auto model = std::make_shared<GatedModel>(config);
  {
    Engine engine(config, model);
    engine.add_request(request({1, 2, 3}, 20));
    engine.step();
  }
  EXPECT_EQ(model->waited_for.size(), 2u);
}

// The tables that a batch points to are its own: what schedule() does meanwhile does not show.
class TableReader : public GatedModel {
 public:
  using GatedModel::GatedModel;

  void execute(const InputBatch& batch) override {
    GatedModel::execute(batch);
    batches_[batch.step_id] = {&batch, tables(batch)};
  }
  const ModelRunnerOutput& wait(int64_t step_id) override {
    const auto& [batch, before] = batches_.at(step_id);
    EXPECT_EQ(tables(*batch), before);
    return GatedModel::wait(step_id);
  }

 private:
  static std::vector<std::vector<BlockId>> tables(const InputBatch& batch) {
    std::vector<std::vector<BlockId>> out;
    for (int32_t seq = 0; seq < batch.num_seqs; ++seq) {
      const BlockId* table = batch.block_table(seq);
      out.emplace_back(table, table + (batch.seq_lens[seq] + 3) / 4);
    }
    return out;
  }

  std::map<int64_t, std::pair<const InputBatch*, std::vector<std::vector<BlockId>>>> batches_;
};

TEST(EngineAsync, BatchesStayAsTheyAreWhileTheyAreUnderWay) {
  EngineConfig config = small_config(true);
  config.scheduler.num_blocks = 16;
  config.scheduler.max_num_seqs = 4;
  Engine engine(config, std::make_shared<TableReader>(config));
  for (const Request& r : mixed_requests(1, 40)) engine.add_request(r);
  for (int i = 0; engine.has_unfinished(); ++i) {
    ASSERT_LT(i, 1000);
    engine.step();
  }
  EXPECT_GT(engine.stats().scheduler.num_preemptions, 0);
}

TEST(EngineAsync, SurvivesManyThreads) {
  Fixture f(small_config(true));
  constexpr int kThreads = 3;
  constexpr int kRequests = 60;
  std::mutex mutex;
  std::map<RequestId, Request> asked;
  std::map<RequestId, std::map<int32_t, std::vector<RequestOutput>>> heard;
  std::atomic<int> num_adding{kThreads};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      int i = 0;
      for (const Request& r : mixed_requests(100 + t, kRequests)) {
        const RequestId id = f.engine.add_request(r);
        {
          std::lock_guard<std::mutex> lock(mutex);
          asked.emplace(id, r);
        }
        if (++i % 4 == 0) f.engine.abort(id);
        if (i % 5 == 0) f.engine.abort(id, 0);
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
        for (const RequestOutput& o : output.outputs) heard[o.request_id][o.index].push_back(o);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  f.engine.check_integrity();
  EXPECT_EQ(f.engine.stats().scheduler.num_free_blocks, 32);
  ASSERT_EQ(heard.size(), asked.size());
  for (const auto& [id, r] : asked) {
    ASSERT_EQ(heard[id].size(), static_cast<size_t>(r.params.n));
    for (const auto& [index, outputs] : heard[id]) {
      int32_t num_ends = 0;
      for (const RequestOutput& o : outputs) num_ends += o.finish_reason != FinishReason::kNone;
      EXPECT_EQ(num_ends, 1);
    }
  }
}

}  // namespace
}  // namespace fastpage
