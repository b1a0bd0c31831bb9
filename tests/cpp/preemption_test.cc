// Who has to make room for whom, what becomes of it, and how prompts share a step.
#include <gtest/gtest.h>

#include "scheduler_harness.h"

namespace fastpage {
namespace {

// Runs a and b in 6 blocks, which are too few for both: b is pushed out. Returns how many of its
// tokens are there when it comes back.
int32_t tokens_found_on_return(float swap_cost, int32_t num_host_blocks, SchedulerStats* stats) {
  SchedulerConfig config = small_config();
  config.num_blocks = 6;
  config.num_host_blocks = num_host_blocks;
  config.swap_cost_per_block = swap_cost;
  Harness h(config);
  h.add(request(tokens_from(1, 8), 13));
  const RequestId b = h.add(request(tokens_from(50, 7), 12));
  while (h.scheduler.stats().num_preemptions == 0) h.step();
  *stats = h.scheduler.stats();
  while (true) {
    const SchedulerOutput& step = h.begin();
    for (const ScheduledSequence& seq : step.sequences) {
      if (seq.id != b) continue;
      stats->num_blocks_swapped_in = h.scheduler.stats().num_blocks_swapped_in;
      EXPECT_EQ(stats->num_blocks_swapped_in, static_cast<int64_t>(step.transfers.swap_ins.size()));
      return seq.num_computed_tokens;
    }
    h.end(step);
  }
}

// Two published blocks of 4 tokens go: 8 tokens to compute again (and a little attention).
TEST(SwapRule, BlocksGoToTheHostIfThatIsCheaperThanComputingThemAgain) {
  SchedulerStats stats;
  EXPECT_EQ(tokens_found_on_return(3.9f, 16, &stats), 8);
  EXPECT_EQ(stats.num_preemptions, 1);
  EXPECT_EQ(stats.num_preemptions_swap, 1);
  EXPECT_GT(stats.num_blocks_swapped_in, 0);

  EXPECT_LT(tokens_found_on_return(4.1f, 16, &stats), 8);
  EXPECT_EQ(stats.num_preemptions, 1);
  EXPECT_EQ(stats.num_preemptions_swap, 0);
  EXPECT_EQ(stats.num_blocks_swapped_in, 0);

  EXPECT_LT(tokens_found_on_return(0.0f, 0, &stats), 8) << "there is no host tier";
  EXPECT_EQ(stats.num_preemptions_swap, 0);
}

// It cannot come back before that step's result is known. Somebody else who took its blocks
// meanwhile would be the next to be pushed out.
TEST(Preemption, WhoIsPushedOutWhileAStepComputesItIsNotOvertaken) {
  SchedulerConfig config = small_config();
  config.num_blocks = 6;
  config.max_steps_in_flight = 2;
  Harness h(config);
  const RequestId stays = h.add(request(tokens_from(1, 8), 12));
  const RequestId goes = h.add(request(tokens_from(50, 7), 12));
  const SchedulerOutput* under_way = &h.begin();
  while (h.scheduler.stats().num_free_blocks > 0) {
    const SchedulerOutput& next = h.begin();
    h.end(*under_way);
    under_way = &next;
  }
  h.add(request({80, 81}, 2));
  while (true) {
    const SchedulerOutput& next = h.begin();
    if (next.num_preempted > 0) break;
    h.end(*under_way);
    under_way = &next;
  }
  EXPECT_EQ(under_way->sequences.back().id, goes);
  EXPECT_EQ(h.scheduler.stats().num_free_blocks, 2);
  EXPECT_EQ(h.scheduler.stats().num_running, 1);
  h.end(*under_way);
  const SchedulerOutput& later = h.begin();
  ASSERT_EQ(later.sequences.size(), 1u)
      << "who was pushed out comes back first, and needs 3 blocks";
  EXPECT_EQ(later.sequences[0].id, stays);
}

SequenceRequest with_priority(int32_t priority, SequenceRequest r) {
  r.priority = priority;
  return r;
}

SchedulerConfig priority_config(int32_t num_blocks) {
  SchedulerConfig config = small_config();
  config.policy = SchedulingPolicy::kPriority;
  config.num_blocks = num_blocks;
  return config;
}

TEST(Priority, TheMoreUrgentPushesOutTheLeastUrgentThatRuns) {
  Harness h(priority_config(8));
  const RequestId middle = h.add(with_priority(1, request(tokens_from(1, 8), 12)));
  const RequestId least = h.add(with_priority(2, request(tokens_from(20, 8), 12)));
  h.step();
  h.step();  // three blocks each
  const RequestId urgent = h.add(with_priority(0, request(tokens_from(40, 12), 4)));
  const SchedulerOutput& step = h.begin();
  EXPECT_EQ(step.num_preempted, 1);
  ASSERT_EQ(step.sequences.size(), 2u);
  EXPECT_EQ(step.sequences[0].id, urgent);
  EXPECT_EQ(step.sequences[1].id, middle);
  int32_t num_output_tokens = 0;
  const SchedulerOutput* next = &step;
  while (true) {
    for (const SequenceUpdate& update : h.end(*next)) {
      if (update.id == least) num_output_tokens = update.num_output_tokens;
    }
    if (!h.scheduler.has_unfinished()) break;
    next = &h.begin();
  }
  EXPECT_EQ(num_output_tokens, 12) << "what was pushed out comes back";
}

// Blocks that several of those share who go come free as well.
TEST(Priority, TheMoreUrgentPushesOutAllSamplesOfARequest) {
  Harness h(priority_config(8));
  SequenceRequest samples = with_priority(1, request(tokens_from(1, 16), 4));
  samples.params.n = 2;
  h.add(std::move(samples));
  h.step();
  h.step();  // four blocks of both, and one of each
  const RequestId urgent = h.add(with_priority(0, request(tokens_from(40, 20), 8)));
  const SchedulerOutput& step = h.begin();
  EXPECT_EQ(step.num_preempted, 2);
  ASSERT_EQ(step.sequences.size(), 1u);
  EXPECT_EQ(step.sequences[0].id, urgent);
}

TEST(Priority, NobodyIsPushedOutInVain) {
  Harness h(priority_config(8));
  h.add(with_priority(0, request(tokens_from(1, 15), 2)));   // 4 blocks
  h.add(with_priority(2, request(tokens_from(20, 3), 12)));  // 1 block
  h.step();
  h.step();
  h.add(with_priority(0, request(tokens_from(40, 21), 4)));  // 6 blocks: 4 without the second
  const SchedulerOutput& step = h.begin();
  EXPECT_EQ(step.num_preempted, 0);
  EXPECT_EQ(step.sequences.size(), 1u);
}

TEST(Priority, FirstComeFirstServedPushesNobodyOutForANewcomer) {
  SchedulerConfig config = priority_config(8);
  config.policy = SchedulingPolicy::kFcfs;
  Harness h(config);
  h.add(with_priority(1, request(tokens_from(1, 8), 3)));
  h.add(with_priority(2, request(tokens_from(20, 8), 3)));
  h.step();
  h.step();
  h.add(with_priority(0, request(tokens_from(40, 12), 4)));
  EXPECT_EQ(h.begin().num_preempted, 0);
}

TEST(Priority, WhoIsMoreUrgentKeepsItsBlocksWhenTheyRunOut) {
  Harness h(priority_config(6));
  const RequestId late_but_urgent_prompt = [&] {
    h.add(with_priority(1, request(tokens_from(1, 8), 12)));
    return h.add(with_priority(0, request(tokens_from(50, 7), 12)));
  }();
  while (h.scheduler.stats().num_preemptions == 0) h.step();
  const SchedulerOutput& step = h.begin();
  ASSERT_EQ(step.sequences.size(), 1u);
  EXPECT_EQ(step.sequences[0].id, late_but_urgent_prompt);
}

TEST(PartialPrefills, AreCappedAndWhatFitsGoesPastThem) {
  SchedulerConfig config = small_config();
  config.max_num_partial_prefills = 1;
  config.long_prefill_token_threshold = 6;
  Harness h(config);
  const RequestId first = h.add(request(tokens_from(1, 20), 2));
  const RequestId second = h.add(request(tokens_from(30, 20), 2));
  const RequestId small = h.add(request(tokens_from(60, 5), 2));
  const SchedulerOutput& step = h.begin();
  ASSERT_EQ(step.sequences.size(), 2u);
  EXPECT_EQ(step.sequences[0].id, first);
  EXPECT_EQ(step.sequences[0].num_scheduled_tokens, 6);
  EXPECT_EQ(step.sequences[1].id, small);
  EXPECT_EQ(step.sequences[1].num_scheduled_tokens, 5);
  h.end(step);
  for (int i = 0; i < 2; ++i) {
    for (const SequenceUpdate& update : h.step()) EXPECT_NE(update.id, second);
  }
  const SchedulerOutput& last_chunk = h.begin();  // of the first: the place is free again
  ASSERT_EQ(last_chunk.sequences.size(), 2u);
  EXPECT_EQ(last_chunk.sequences[0].num_scheduled_tokens, 2);
  EXPECT_EQ(last_chunk.sequences[1].id, second);
}

// First come, first served: who needs many blocks at once is not overtaken for ever by those that
// need few.
TEST(Fairness, AStreamOfShortRequestsDoesNotStarveALongOne) {
  for (const int32_t max_num_partial_prefills : {0, 1}) {
    SchedulerConfig config = small_config();
    config.num_blocks = 14;
    config.max_num_partial_prefills = max_num_partial_prefills;
    config.enable_prefix_caching = false;
    Harness h(config);
    for (int i = 0; i < 3; ++i) h.add(request({1, 2, 3}, 6));
    h.step();
    const RequestId long_one = h.add(request(tokens_from(1, 48), 2));  // 12 blocks of 14
    int num_steps = 0;
    for (bool finished = false; !finished; ++num_steps) {
      h.add(request({1, 2, 3}, 6));
      h.add(request({4, 5, 6}, 6));
      for (const SequenceUpdate& update : h.step()) {
        finished |= update.id == long_one && update.finish_reason == FinishReason::kLength;
      }
      ASSERT_LT(num_steps, 40);
    }
    EXPECT_GE(num_steps, 4) << "it has 48 tokens, 16 a step, and those before it had to end";
  }
}

TEST(PartialPrefills, AShortPromptIsNotHeldUpByALongOne) {
  SchedulerConfig config = small_config();
  config.long_prefill_token_threshold = 4;
  Harness h(config);
  const RequestId running = h.add(request({1, 2}, 30));
  h.step();
  h.add(request(tokens_from(1, 40), 2));
  for (int i = 0; i < 10; ++i) {
    bool got_a_token = false;
    for (const SequenceUpdate& update : h.step()) {
      got_a_token |= update.id == running && update.new_token_ids.size() == 1;
    }
    EXPECT_TRUE(got_a_token) << "step " << i;
  }
}

}  // namespace
}  // namespace fastpage
