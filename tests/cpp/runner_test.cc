// The whole core on a ProgramRunner: what is in flight meanwhile changes no token.
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <utility>

#include "fastpage/engine.h"
#include "small_model.h"

namespace fastpage {
namespace {

struct Setting {
  bool async_scheduling = false;
  int32_t num_host_blocks = 0;
  int32_t num_speculative_tokens = 0;
};

std::unique_ptr<Engine> make_engine(const Setting& setting) {
  ExecutorConfig executor = small_config();
  executor.num_host_kv_blocks = setting.num_host_blocks;
  EngineConfig config;
  config.vocab_size = kVocab;
  config.random_hash_key = false;
  config.async_scheduling = setting.async_scheduling;
  config.scheduler.num_blocks = executor.num_kv_blocks;
  config.scheduler.num_host_blocks = setting.num_host_blocks;
  config.scheduler.block_size = executor.block_size;
  config.scheduler.max_num_seqs = 5;
  config.scheduler.max_num_batched_tokens = 16;
  config.scheduler.max_model_len = 64;  // the rows of the rotary table
  config.scheduler.num_speculative_tokens = setting.num_speculative_tokens;
  config.scheduler.eos_token_ids = {0};
  return std::make_unique<Engine>(
      config, std::make_shared<ProgramRunner>(loaded(executor), setting.async_scheduling ? 2 : 1));
}

Request request(uint32_t number) {
  std::mt19937 random(number);
  Request request;
  request.prompt_token_ids.resize(1 + random() % 35);
  for (TokenId& token : request.prompt_token_ids) token = 1 + random() % 5;
  request.params.temperature = number % 3 == 0 ? 0.0f : 0.7f;
  request.params.seed = number;
  request.params.n = number % 4 == 1 ? 3 : 1;
  request.params.max_tokens = 1 + random() % 28;
  request.params.logprobs = number % 5 == 0 ? 2 : SamplingParams::kNoLogprobs;
  if (number % 7 == 2) request.params.frequency_penalty = 0.5f;
  return request;
}

using Tokens = std::map<std::pair<uint32_t, int32_t>, std::vector<TokenId>>;

// What becomes of 40 requests, five steps apart, more than the cache holds at once. Some are
// aborted on the way: they are left out.
Tokens run(const Setting& setting, SchedulerStats* stats) {
  const auto engine = make_engine(setting);
  std::map<RequestId, uint32_t> numbers;
  Tokens tokens;
  uint32_t next = 0;
  for (int step = 0; next < 40 || engine->has_unfinished(); ++step) {
    if (next < 40 && step % 2 == 0) numbers[engine->add_request(request(next))] = next, ++next;
    if (step % 9 == 8) {
      const RequestId id = std::next(numbers.begin(), numbers.size() - 1)->first;
      if (numbers[id] % 8 == 6) engine->abort(id);
    }
    for (const RequestOutput& output : engine->step().outputs) {
      std::vector<TokenId>& all = tokens[{numbers[output.request_id], output.index}];
      all.insert(all.end(), output.new_token_ids.begin(), output.new_token_ids.end());
    }
    engine->check_integrity();
  }
  *stats = engine->stats().scheduler;
  for (auto it = tokens.begin(); it != tokens.end();) {
    it = it->first.first % 8 == 6 ? tokens.erase(it) : std::next(it);
  }
  return tokens;
}

TEST(Runner, StepsInFlightSwapsAndSpeculationChangeNoToken) {
  SchedulerStats stats;
  const Tokens expected = run({}, &stats);
  EXPECT_EQ(expected.size(), 35u + 2 * 10);
  EXPECT_GT(stats.num_preemptions, 0);
  EXPECT_GT(stats.num_blocks_copied, 0);
  for (const bool async_scheduling : {false, true}) {
    for (const int32_t num_host_blocks : {0, 6}) {
      for (const int32_t num_speculative_tokens : {0, 3}) {
        const Setting setting{async_scheduling, num_host_blocks, num_speculative_tokens};
        EXPECT_EQ(run(setting, &stats), expected)
            << async_scheduling << " " << num_host_blocks << " " << num_speculative_tokens;
        EXPECT_EQ(stats.num_blocks_swapped_in > 0, num_host_blocks > 0);
        EXPECT_EQ(stats.num_draft_tokens > 0, num_speculative_tokens > 0);
      }
    }
  }
}

TEST(Runner, TellsHowFarItIsOpByOp) {
  for (const bool async_scheduling : {false, true}) {
    const auto engine = make_engine({async_scheduling, 0, 0});
    EXPECT_EQ(engine->progress(), 0);
    engine->add_request(request(1));
    while (engine->has_unfinished()) engine->step();
    EXPECT_GT(engine->progress(), 5 * engine->stats().num_steps);
  }
}

TEST(Runner, AnEngineMayEndWithStepsInFlight) {
  for (uint32_t i = 0; i < 8; ++i) {
    const auto engine = make_engine({true, 0, 0});
    for (uint32_t number = 0; number < 4; ++number) engine->add_request(request(number + i));
    for (uint32_t step = 0; step < i; ++step) engine->step();
  }
}

}  // namespace
}  // namespace fastpage
