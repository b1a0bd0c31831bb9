// A steady decode step allocates nothing on the heap, nor does choosing its tokens.
#include <gtest/gtest.h>

#include "counting_allocator.h"
#include "fastpage/sampler.h"
#include "fastpage/scheduler.h"

namespace fastpage {
namespace {

TEST(Allocation, TheCounterCounts) {
  const int64_t before = num_allocations;
  std::vector<int>* leak = new std::vector<int>(10);
  EXPECT_EQ(num_allocations - before, 2);
  delete leak;
}

// Steps as the engine makes them: as many in flight as there may be. The model says what a text of
// period 7 goes on with, so that drafts are right now and then.
class Steps {
 public:
  explicit Steps(const SchedulerConfig& config)
      : scheduler(config), batches_(config.max_steps_in_flight), tokens_(1024) {
    // As after its largest step: with speculation their sizes vary.
    for (InputBatch& batch : batches_) {
      batch.token_ids.reserve(tokens_.size());
      batch.positions.reserve(tokens_.size());
      batch.slot_mapping.reserve(tokens_.size());
      batch.logits_indices.reserve(tokens_.size());
      batch.sampling_rows.reserve(tokens_.size());
    }
  }

  void add(int32_t num_prompt_tokens, int32_t n) {
    SequenceRequest request;
    for (int32_t i = 0; i < num_prompt_tokens; ++i) request.prompt_token_ids.push_back(i % 7);
    request.params.max_tokens = 400;
    request.params.n = n;
    scheduler.add_request(std::move(request));
  }

  // Returns how many sequences were in it.
  size_t step() {
    while (num_in_flight_ < batches_.size()) {
      const SchedulerOutput& next = scheduler.schedule();
      if (next.sequences.empty()) break;
      scheduler.prepare(next, &batches_[num_steps_++ % batches_.size()]);
      in_flight_[num_in_flight_++] = &next;
    }
    const InputBatch& batch = batches_[(num_steps_ - num_in_flight_) % batches_.size()];
    const SchedulerOutput& oldest = *in_flight_[0];
    const size_t num_rows = batch.sampling_rows.size();
    for (size_t i = 0; i < num_rows; ++i) {
      tokens_[i] = static_cast<TokenId>((batch.sampling_rows[i].tokens.size() + i / 5) % 7);
    }
    const size_t num_sequences = oldest.sequences.size();
    if (num_in_flight_ > 1) {
      const InputBatch& next = batches_[(num_steps_ - 1) % batches_.size()];
      next.resolve({tokens_.data(), num_rows});
    }
    scheduler.update(oldest, {tokens_.data(), num_rows});
    in_flight_[0] = in_flight_[1];
    --num_in_flight_;
    return num_sequences;
  }

  Scheduler scheduler;

 private:
  std::vector<InputBatch> batches_;
  std::vector<TokenId> tokens_;
  const SchedulerOutput* in_flight_[2] = {};
  size_t num_in_flight_ = 0;
  size_t num_steps_ = 0;
};

struct Setting {
  const char* name;
  int32_t max_steps_in_flight = 1;
  int32_t num_speculative_tokens = 0;
  int32_t num_host_blocks = 0;
  int32_t n = 1;
};

class SteadyDecode : public testing::TestWithParam<Setting> {};

// The steps cross block boundaries, where blocks are taken, hashed and published.
TEST_P(SteadyDecode, AllocatesNothing) {
  SchedulerConfig config;
  config.num_blocks = 4096;
  config.max_num_seqs = 64;
  config.max_steps_in_flight = GetParam().max_steps_in_flight;
  config.num_speculative_tokens = GetParam().num_speculative_tokens;
  config.num_host_blocks = GetParam().num_host_blocks;
  Steps steps(config);
  for (int32_t i = 0; i < 64 / GetParam().n; ++i) steps.add(20 + i, GetParam().n);
  for (int i = 0; i < 8; ++i) steps.step();
  const int64_t before = num_allocations;
  const int num_steps = config.num_speculative_tokens > 0 ? 60 : 300;
  for (int i = 0; i < num_steps; ++i) ASSERT_EQ(steps.step(), 64u);
  EXPECT_EQ(num_allocations - before, 0);
  const SchedulerStats stats = steps.scheduler.stats();
  EXPECT_EQ(stats.num_accepted_tokens > 0, config.num_speculative_tokens > 0);
  EXPECT_EQ(stats.num_blocks_copied > 0, GetParam().n > 1);
}

std::ostream& operator<<(std::ostream& out, const Setting& setting) { return out << setting.name; }

INSTANTIATE_TEST_SUITE_P(Allocation, SteadyDecode,
                         testing::Values(Setting{"Plain"}, Setting{"TwoStepsInFlight", 2},
                                         Setting{"Speculation", 1, 3},
                                         Setting{"HostTier", 1, 0, 64},
                                         Setting{"Samples", 1, 0, 0, 4},
                                         Setting{"SamplesTwoStepsInFlight", 2, 0, 0, 4},
                                         Setting{"Everything", 2, 3, 64, 4}),
                         [](const auto& info) { return info.param.name; });

TEST(Allocation, SamplingAllocatesNothing) {
  const int32_t vocab_size = 5000;
  std::vector<SamplingParams> params(6);
  params[0].temperature = 0.0f;
  params[1].top_p = 0.9f;
  params[2].top_k = 50;
  params[3].min_p = 0.01f;
  params[4].top_k = 1000;
  params[4].top_p = 0.5f;
  params[5].frequency_penalty = params[5].repetition_penalty = 1.5f;
  const std::vector<TokenId> tokens{1, 2, 3};
  InputBatch batch;
  for (int32_t i = 0; i < 6; ++i) {
    batch.sampling_rows.push_back({i, i, &params[i], tokens, 1, 1, {}});
  }
  Sampler sampler(vocab_size);
  ModelRunnerOutput out;
  for (int step = 0; step < 3; ++step) {
    std::vector<float> logits(6 * vocab_size);
    for (size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(i * 7919 % 1009) / 99;
    const int64_t before = num_allocations;
    sampler.begin(batch, &out);
    sampler.sample({logits.data(), 6, vocab_size}, 0, batch, &out);
    EXPECT_TRUE(step == 0 || num_allocations == before) << num_allocations - before;
  }
}

}  // namespace
}  // namespace fastpage
