// The invariants of the core (see scheduler_driver.h) under random operations.
//
// Environment: FASTPAGE_PROPERTY_STEPS, scheduler steps in all (200000 if unset); and
// FASTPAGE_PROPERTY_SEED, the only seed to run.
#include <gtest/gtest.h>

#include <cstdlib>
#include <sstream>

#include "fastpage/replay.h"
#include "scheduler_driver.h"

namespace fastpage {
namespace {

constexpr int32_t kNumShards = 16;  // for a test runner with several cores

int64_t from_environment(const char* name, int64_t fallback) {
  const char* value = std::getenv(name);
  return value == nullptr ? fallback : std::atoll(value);
}

// What a run came to; a failure names its seed and settings.
void run_random_operations(uint64_t seed, DriverCounts* counts) {
  SeededChoices choices(seed);
  const SchedulerConfig config = random_config(&choices);
  const bool lazy = choices.one_in(2);
  const bool recorded = choices.one_in(16);
  const int32_t max_live = choices.of({1, 4, 20});
  SCOPED_TRACE("seed " + std::to_string(seed) + ": " + describe(config) +
               (lazy ? ", lazy model" : ""));
  try {
    std::stringstream log;
    SchedulerDriver driver(config, lazy);
    if (recorded) driver.record(&log);
    for (int32_t i = 0; i < 300; ++i) driver.call_something(&choices, max_live);
    driver.drain();
    counts->add(driver.counts());
    if (!recorded) return;
    driver.record(nullptr);
    const ReplayResult result = replay(log);
    ASSERT_EQ(result.divergence, "");
    ASSERT_TRUE(result.complete);
    ASSERT_GE(result.num_steps, driver.counts().steps);
  } catch (const std::exception& e) {
    FAIL() << e.what();
  }
}

class Properties : public testing::TestWithParam<int32_t> {};

TEST_P(Properties, InvariantsHoldUnderRandomOperations) {
  DriverCounts counts;
  if (const int64_t seed = from_environment("FASTPAGE_PROPERTY_SEED", -1); seed >= 0) {
    if (GetParam() == 0) run_random_operations(seed, &counts);
    return;
  }
  const int64_t num_steps = from_environment("FASTPAGE_PROPERTY_STEPS", 200000) / kNumShards;
  for (uint64_t seed = GetParam(); counts.steps < num_steps; seed += kNumShards) {
    run_random_operations(seed, &counts);
    if (HasFatalFailure()) return;
  }
  std::printf("%s\n", counts.text().c_str());
  // Nothing of what is to be tested is left out.
  EXPECT_GT(counts.overlapped, 0);
  EXPECT_GT(counts.discards, 0);
  EXPECT_GT(counts.births, 0);
  EXPECT_GT(counts.forks, 0);
  EXPECT_GT(counts.beam_searches, 0);
  EXPECT_GT(counts.hits, 0);
  EXPECT_GT(counts.kv_events, 0);
  EXPECT_GT(counts.stats.num_preemptions_swap, 0);
  EXPECT_GT(counts.stats.num_preemptions, counts.stats.num_preemptions_swap);
  EXPECT_GT(counts.stats.num_blocks_swapped_in, 0);
  EXPECT_GT(counts.stats.num_blocks_copied, 0);
  EXPECT_GT(counts.stats.num_accepted_tokens, 0);
  EXPECT_GT(counts.stats.num_draft_tokens, counts.stats.num_accepted_tokens);
}

INSTANTIATE_TEST_SUITE_P(Shard, Properties, testing::Range(0, kNumShards));

// Invariant 4, spelled out: one set of requests under every combination of settings, each compared
// with the model run on bare tokens.
class EverySetting : public testing::TestWithParam<int32_t> {};  // tokens a step

std::vector<SequenceRequest> the_requests() {
  SeededChoices choices(11);
  std::vector<SequenceRequest> requests;
  for (int i = 0; i < 14; ++i) {
    requests.push_back(random_request(&choices, 32));
    SamplingParams& params = requests.back().params;
    if (i % 5 == 4) {
      params = SamplingParams();
      make_beam_search(&choices, &params);
    } else {
      params.n = 1 + i % 3;
      params.best_of = 0;
      params.beam_width = 0;
      params.top_p = i % 2 == 0 ? 0.5f : 1.0f;
    }
    params.max_tokens = 4 + 2 * i;
  }
  return requests;
}

void run_the_requests(const SchedulerConfig& config, DriverCounts* counts) {
  SCOPED_TRACE(describe(config));
  try {
    SchedulerDriver driver(config, config.max_steps_in_flight == 2);
    for (SequenceRequest& request : the_requests()) {
      ASSERT_TRUE(driver.add(std::move(request)));
      driver.begin();
      if (driver.num_in_flight() > 0 && driver.num_live() % 2 == 0) driver.finish();
    }
    driver.drain();
    counts->add(driver.counts());
  } catch (const std::exception& e) {
    FAIL() << e.what();
  }
}

TEST_P(EverySetting, GivesTheSameOutput) {
  DriverCounts counts;
  SchedulerConfig config;
  config.block_size = 4;
  config.max_num_seqs = 8;
  config.max_num_batched_tokens = GetParam();
  config.max_model_len = 72;
  config.eos_token_ids = {0};
  for (const int32_t num_blocks : {48, 60, 1000}) {
    for (const bool caching : {false, true}) {
      for (const auto& [num_host_blocks, swap_cost] :
           {std::pair{0, 1.0f}, {5, 0.0f}, {100, 0.0f}, {100, 1e9f}}) {
        for (const int32_t max_steps_in_flight : {1, 2}) {
          for (const int32_t num_speculative_tokens : {0, 3}) {
            for (const auto policy : {SchedulingPolicy::kFcfs, SchedulingPolicy::kPriority}) {
              config.num_blocks = num_blocks;
              config.enable_prefix_caching = caching;
              config.num_host_blocks = num_host_blocks;
              config.swap_cost_per_block = swap_cost;
              config.max_steps_in_flight = max_steps_in_flight;
              config.num_speculative_tokens = num_speculative_tokens;
              config.prompt_lookup_min = 1;
              config.policy = policy;
              run_the_requests(config, &counts);
              if (HasFatalFailure()) return;
            }
          }
        }
      }
    }
  }
  std::printf("%s\n", counts.text().c_str());
  EXPECT_GT(counts.stats.num_blocks_swapped_in, 0);
  EXPECT_GT(counts.stats.num_blocks_copied, 0);
  EXPECT_GT(counts.overlapped, 0);
  EXPECT_GT(counts.hits, 0);
  if (GetParam() == 1) return;  // nobody runs beside anybody, and there is no room for drafts
  EXPECT_GT(counts.stats.num_preemptions_swap, 0);
  EXPECT_GT(counts.stats.num_preemptions, counts.stats.num_preemptions_swap);
  EXPECT_GT(counts.stats.num_accepted_tokens, 0);
}

INSTANTIATE_TEST_SUITE_P(TokensPerStep, EverySetting, testing::Values(1, 7, 16, 512));

}  // namespace
}  // namespace fastpage
