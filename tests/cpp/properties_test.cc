// The invariants of the core under random operations, with a model that notices every wrong block.
//
//  1. free + referenced = total; free <=> ref_count 0; ref_count = tables that hold the block.
//  2. Each written slot is unique, in a block with ref_count 1 that is not published yet.
//  3. Token and sequence budgets hold; a prefix hit is block-aligned and at most num_tokens - 1.
//  4. The output is the same for every chunk size, pool size, policy, order, with and without
//     caching and preemption: namely that of the model run on the bare tokens.
//  5. Tokens not yet computed are never published.
//  6. An abort at any moment frees exactly once; a late result is dropped.
//  7. Progress always: whatever was admitted finishes.
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>

#include "fake_model.h"
#include "fastpage/scheduler.h"

namespace fastpage {
namespace {

constexpr int32_t kVocabSize = 40;

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int32_t between(int32_t low, int32_t high) {
    return low + static_cast<int32_t>(engine_() % (static_cast<uint64_t>(high) - low + 1));
  }
  bool one_in(int32_t n) { return between(1, n) == 1; }
  template <typename T>
  T of(std::initializer_list<T> values) {
    return values.begin()[between(0, static_cast<int32_t>(values.size()) - 1)];
  }
  uint64_t word() { return engine_(); }

 private:
  std::mt19937_64 engine_;
};

// One request and all that was heard of it.
struct Told {
  SequenceRequest request;
  FakeCompletion expected;
  std::vector<TokenId> output;
  std::vector<float> prompt_logprobs;
  int32_t num_computed = 0;
};

class Driver {
 public:
  explicit Driver(const SchedulerConfig& config)
      : config_(config),
        scheduler_(config),
        model_(config.num_blocks, config.block_size, kVocabSize) {}

  // False if it was refused.
  bool add(SequenceRequest request) {
    Told told;
    told.request = request;
    RequestId id;
    try {
      id = scheduler_.add_request(std::move(request));
    } catch (const InvalidArgument&) {
      return false;
    }
    told.expected =
        fake_completion(told.request.prompt_token_ids, told.request.params, told.request.seed,
                        config_.eos_token_ids, config_.max_model_len, kVocabSize);
    EXPECT_TRUE(live_.emplace(id, std::move(told)).second) << "invariant 6: an id was given twice";
    return true;
  }

  void abort_one(Random* random) {
    if (live_.empty()) return;
    auto it = live_.begin();
    std::advance(it, random->between(0, static_cast<int32_t>(live_.size()) - 1));
    const RequestId id = it->first;
    live_.erase(it);
    ASSERT_TRUE(scheduler_.abort(id)) << "invariant 6";
    ASSERT_FALSE(scheduler_.abort(id)) << "invariant 6: freed twice";
    scheduler_.check_integrity();
  }

  // `aborts`: how many sequences are aborted while the model runs. `fails`: it never answers.
  void step(Random* random, int32_t aborts = 0, bool fails = false) {
    const SchedulerOutput& step = scheduler_.schedule();
    num_preempted += step.num_preempted;
    scheduler_.check_integrity();
    if (step.sequences.empty()) {
      ASSERT_FALSE(scheduler_.has_unfinished()) << "invariant 7: nothing moves";
      return;
    }
    ++num_steps;
    check_budgets(step);
    if (testing::Test::HasFatalFailure()) return;
    scheduler_.prepare(step, &batch_);
    check_written_slots();
    if (testing::Test::HasFatalFailure()) return;
    model_.execute(batch_);
    const ModelRunnerOutput& result = model_.wait(step.step_id);
    for (int32_t i = 0; i < aborts; ++i) abort_one(random);
    if (fails) return;
    collect_prompt_logprobs(step, result);
    for (const ScheduledSequence& seq : step.sequences) {
      const auto it = live_.find(seq.id);
      if (it != live_.end()) it->second.num_computed += seq.num_scheduled_tokens;
    }
    take_in(scheduler_.update(step, result.sampled_token_ids));
    scheduler_.check_integrity();
  }

  void drain() {
    int64_t limit = num_steps + 1000;
    for (const auto& [id, told] : live_) {
      limit += 4 * static_cast<int64_t>(told.request.prompt_token_ids.size() +
                                        told.expected.tokens.size());
    }
    while (scheduler_.has_unfinished() && !testing::Test::HasFatalFailure()) {
      ASSERT_LT(num_steps, limit) << "invariant 7: it does not come to an end";
      step(nullptr);
    }
    ASSERT_TRUE(live_.empty()) << "invariant 7: somebody was forgotten";
    ASSERT_EQ(scheduler_.stats().num_free_blocks, config_.num_blocks) << "invariants 1 and 6";
  }

  Scheduler& scheduler() { return scheduler_; }
  size_t num_live() const { return live_.size(); }

  int64_t num_steps = 0;
  int64_t num_preempted = 0;
  int64_t num_hits = 0;
  int64_t num_finished = 0;

 private:
  void check_budgets(const SchedulerOutput& step) {
    int32_t num_tokens = 0;
    std::set<RequestId> ids;
    for (const ScheduledSequence& seq : step.sequences) {
      num_tokens += seq.num_scheduled_tokens;
      ASSERT_TRUE(ids.insert(seq.id).second) << "invariant 3: scheduled twice";
      ASSERT_EQ(live_.count(seq.id), 1u) << "invariant 6: scheduled after its end";
      Told& told = live_.at(seq.id);
      const int32_t num_known =
          static_cast<int32_t>(told.request.prompt_token_ids.size() + told.output.size());
      ASSERT_GE(seq.num_scheduled_tokens, 1) << "invariant 3";
      ASSERT_LE(seq.num_computed_tokens + seq.num_scheduled_tokens, num_known) << "invariant 3";
      if (config_.long_prefill_token_threshold > 0) {
        ASSERT_LE(seq.num_scheduled_tokens, config_.long_prefill_token_threshold);
      }
      if (seq.num_computed_tokens != told.num_computed) {
        // Admitted, for the first time or again.
        ASSERT_EQ(seq.num_computed_tokens % config_.block_size, 0) << "invariant 3: misaligned";
        ASSERT_TRUE(config_.enable_prefix_caching || seq.num_computed_tokens == 0);
        num_hits += seq.num_computed_tokens > 0;
      }
      ASSERT_EQ(seq.samples, seq.num_computed_tokens + seq.num_scheduled_tokens == num_known);
      told.num_computed = seq.num_computed_tokens;
    }
    ASSERT_EQ(num_tokens, step.num_scheduled_tokens);
    ASSERT_LE(num_tokens, config_.max_num_batched_tokens) << "invariant 3";
    ASSERT_LE(step.sequences.size(), static_cast<size_t>(config_.max_num_seqs)) << "invariant 3";
  }

  void check_written_slots() {
    std::set<int32_t> slots;
    for (const int32_t slot : batch_.slot_mapping) {
      ASSERT_TRUE(slots.insert(slot).second) << "invariant 2: slot " << slot << " written twice";
      const Block& block = scheduler_.blocks().pool().block(slot / config_.block_size);
      ASSERT_EQ(block.ref_count, 1) << "invariant 2: a shared block is written";
      ASSERT_FALSE(block.hash) << "invariants 2 and 5: a published block is written";
    }
  }

  void collect_prompt_logprobs(const SchedulerOutput& step, const ModelRunnerOutput& result) {
    for (size_t i = 0; i < result.prompt_logprobs.size(); ++i) {
      const PromptLogprobRow& row = batch_.prompt_logprob_rows[i];
      const auto it = live_.find(step.sequences[row.seq].id);
      if (it == live_.end()) continue;
      it->second.prompt_logprobs.push_back(result.prompt_logprobs[i].logprobs[0]);
      ASSERT_EQ(static_cast<size_t>(row.position), it->second.prompt_logprobs.size())
          << "a prompt logprob came twice, or was left out";
    }
  }

  void take_in(const std::vector<SequenceUpdate>& updates) {
    for (const SequenceUpdate& update : updates) {
      const auto it = live_.find(update.id);
      ASSERT_NE(it, live_.end()) << "invariant 6: news of somebody who is gone";
      Told& told = it->second;
      if (update.has_new_token) told.output.push_back(update.new_token_id);
      ASSERT_EQ(static_cast<size_t>(update.num_output_tokens), told.output.size());
      const size_t n = told.output.size();
      ASSERT_LE(n, told.expected.tokens.size()) << "invariant 4: it does not end where it should";
      ASSERT_TRUE(n == 0 || told.output[n - 1] == told.expected.tokens[n - 1])
          << "invariant 4: output token " << n - 1 << " of request " << update.id;
      if (update.finish_reason == FinishReason::kNone) continue;
      ASSERT_EQ(told.output, told.expected.tokens) << "invariant 4";
      ASSERT_EQ(update.finish_reason, told.expected.finish_reason) << "invariant 4";
      ASSERT_EQ(told.prompt_logprobs, told.expected.prompt_logprobs) << "invariant 4";
      live_.erase(it);
      ++num_finished;
    }
  }

  SchedulerConfig config_;
  Scheduler scheduler_;
  FakeModel model_;
  InputBatch batch_;
  std::map<RequestId, Told> live_;
};

SchedulerConfig random_config(Random* random) {
  SchedulerConfig config;
  config.block_size = random->of({1, 2, 3, 4, 4, 8, 16});
  config.max_model_len = random->between(8, 96);
  // From too small for some to far too large.
  const int32_t longest = (config.max_model_len + config.block_size - 1) / config.block_size;
  config.num_blocks = std::max(1, longest * random->between(5, random->of({10, 20, 30, 200})) / 10);
  config.max_num_seqs = random->between(1, random->of({3, 8, 24}));
  config.max_num_batched_tokens = random->between(1, random->of({4, 32, 128}));
  config.long_prefill_token_threshold = random->one_in(3) ? random->between(1, 12) : 0;
  config.enable_prefix_caching = !random->one_in(4);
  config.policy = random->of({SchedulingPolicy::kFcfs, SchedulingPolicy::kPriority});
  config.hash_key_lo = random->word();
  config.hash_key_hi = random->word();
  config.eos_token_ids = {0, 1};
  return config;
}

// Prompts share prefixes of all lengths: each continues one of a few lines, for a while.
SequenceRequest random_request(Random* random, int32_t max_length) {
  SequenceRequest request;
  const int32_t line = random->between(0, 2);
  const int32_t shared = random->between(0, max_length);
  const int32_t length = random->one_in(2) ? std::max(1, shared) : random->between(1, max_length);
  for (int32_t i = 0; i < length; ++i) {
    request.prompt_token_ids.push_back(i < shared ? (line * 7 + i * 3) % kVocabSize
                                                  : random->between(0, kVocabSize - 1));
  }
  SamplingParams& params = request.params;
  params.max_tokens = random->one_in(8) ? -1 : random->between(1, max_length);
  params.temperature = random->of({0.0f, 1.0f});
  params.ignore_eos = !random->one_in(3);
  params.min_tokens = random->one_in(3) ? random->between(0, 6) : 0;
  if (random->one_in(4)) params.stop_token_ids = {5, 6};
  if (random->one_in(6)) params.prompt_logprobs = 0;
  request.seed = random->word();
  request.priority = random->between(-2, 2);
  if (random->one_in(8)) request.cache_salt = "tenant";
  return request;
}

void run_random_operations(uint64_t seed, int32_t num_operations, int64_t* num_steps,
                           int64_t* num_preempted, int64_t* num_hits) {
  SCOPED_TRACE("seed " + std::to_string(seed));
  Random random(seed);
  const SchedulerConfig config = random_config(&random);
  Driver driver(config);
  const int32_t max_live = random.of({1, 4, 40});
  for (int32_t i = 0; i < num_operations; ++i) {
    const int32_t dice = random.between(0, 99);
    if (dice < 30 && static_cast<int32_t>(driver.num_live()) < max_live) {
      driver.add(random_request(&random, std::max(1, config.max_model_len * 2 / 3)));
    } else if (dice < 33) {
      driver.abort_one(&random);
    } else if (dice < 34) {
      const bool idle = driver.scheduler().stats().num_free_blocks == config.num_blocks;
      ASSERT_EQ(driver.scheduler().reset_prefix_cache(), idle);
    } else {
      driver.step(&random, random.one_in(20) ? random.between(1, 2) : 0, random.one_in(40));
    }
    if (testing::Test::HasFatalFailure()) return;
  }
  driver.drain();
  *num_steps += driver.num_steps;
  *num_preempted += driver.num_preempted;
  *num_hits += driver.num_hits;
}

// A failure names its seed.
TEST(Properties, InvariantsHoldUnderRandomOperations) {
  int64_t num_steps = 0;
  int64_t num_preempted = 0;
  int64_t num_hits = 0;
  for (uint64_t seed = 1; seed <= 3000; ++seed) {
    ASSERT_NO_FATAL_FAILURE(run_random_operations(seed, 200, &num_steps, &num_preempted, &num_hits))
        << "seed " << seed;
  }
  RecordProperty("steps", std::to_string(num_steps));
  std::printf("%lld steps, %lld preemptions, %lld prefix hits\n", static_cast<long long>(num_steps),
              static_cast<long long>(num_preempted), static_cast<long long>(num_hits));
  EXPECT_GT(num_steps, 200000);
  EXPECT_GT(num_preempted, 5000);
  EXPECT_GT(num_hits, 20000);
}

// Invariant 4, spelled out: one set of requests under every combination of settings.
TEST(Properties, OutputIsTheSameForEverySetting) {
  int64_t num_preempted = 0;
  int64_t num_hits = 0;
  for (const int32_t num_batched_tokens : {1, 7, 16, 512}) {
    for (const int32_t num_blocks : {24, 25, 30, 1000}) {
      for (const bool caching : {false, true}) {
        for (const auto policy : {SchedulingPolicy::kFcfs, SchedulingPolicy::kPriority}) {
          for (const uint64_t arrival : {0, 1, 2}) {
            SchedulerConfig config;
            config.num_blocks = num_blocks;
            config.block_size = 4;
            config.max_num_seqs = 8;
            config.max_num_batched_tokens = num_batched_tokens;
            config.max_model_len = 96;
            config.enable_prefix_caching = caching;
            config.policy = policy;
            config.eos_token_ids = {0};
            Driver driver(config);
            Random random(11);  // the same requests each time
            std::vector<SequenceRequest> requests;
            for (int i = 0; i < 20; ++i) requests.push_back(random_request(&random, 48));
            Random order(arrival);
            if (arrival > 0) {
              std::shuffle(requests.begin(), requests.end(), std::mt19937_64(arrival));
            }
            for (SequenceRequest& request : requests) {
              ASSERT_TRUE(driver.add(std::move(request)));
              if (arrival == 2 && order.one_in(2)) driver.step(nullptr);
            }
            driver.drain();
            ASSERT_EQ(driver.num_finished, 20);
            num_preempted += driver.num_preempted;
            num_hits += driver.num_hits;
          }
        }
      }
    }
  }
  EXPECT_GT(num_preempted, 0);
  EXPECT_GT(num_hits, 0);
}

}  // namespace
}  // namespace fastpage
