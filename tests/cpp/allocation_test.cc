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

// 300 steps cross block boundaries, where blocks are taken, hashed and published.
TEST(Allocation, ASteadyDecodeStepAllocatesNothing) {
  SchedulerConfig config;
  config.num_blocks = 4096;
  config.max_num_seqs = 64;
  Scheduler scheduler(config);
  for (int32_t i = 0; i < 64; ++i) {
    SequenceRequest request;
    request.prompt_token_ids.assign(20 + i, i);
    request.params.max_tokens = 400;
    scheduler.add_request(std::move(request));
  }
  InputBatch batch;
  std::vector<TokenId> tokens(64, 3);
  const auto step = [&] {
    const SchedulerOutput& output = scheduler.schedule();
    scheduler.prepare(output, &batch);
    scheduler.update(output, {tokens.data(), batch.sampling_rows.size()});
    return output.sequences.size();
  };
  for (int i = 0; i < 4; ++i) step();
  const int64_t before = num_allocations;
  for (int i = 0; i < 300; ++i) ASSERT_EQ(step(), 64u);
  EXPECT_EQ(num_allocations - before, 0);
}

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
