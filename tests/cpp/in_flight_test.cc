// Two steps under way, steps that are discarded, and several tokens a step.
#include <gtest/gtest.h>

#include "core/prompt_lookup.h"
#include "scheduler_harness.h"

namespace fastpage {
namespace {

SchedulerConfig async_config() {
  SchedulerConfig config = small_config();
  config.max_steps_in_flight = 2;
  return config;
}

std::vector<TokenId> copy(Span<const TokenId> tokens) { return {tokens.begin(), tokens.end()}; }

TEST(TwoSteps, TheSecondHasAPlaceholderForWhatTheFirstSamples) {
  Harness h(async_config());
  InputBatch next;
  h.add(request({1, 2, 3}, 4));
  h.add(request({4, 5}, 4));
  const SchedulerOutput& first = h.begin();
  EXPECT_TRUE(h.batch.future_tokens.empty());
  const SchedulerOutput& second = h.begin(&next);
  EXPECT_EQ(next.token_ids, (std::vector<TokenId>{-1, -1}));
  EXPECT_EQ(next.positions, (std::vector<int32_t>{3, 2}));
  ASSERT_EQ(next.future_tokens.size(), 2u);
  EXPECT_EQ(next.future_tokens[1].index, 1);
  EXPECT_EQ(next.future_tokens[1].sampling_row, 1);
  EXPECT_THROW(h.scheduler.schedule(), InvalidArgument) << "two are under way";
  EXPECT_THROW(h.scheduler.update(second, std::vector<TokenId>{1, 2}), InvalidArgument)
      << "it is not the oldest";

  const std::vector<TokenId> sampled = {70, 71};
  next.resolve(sampled);
  EXPECT_EQ(next.token_ids, sampled);
  EXPECT_EQ(copy(next.sampling_rows[1].tokens), (std::vector<TokenId>{4, 5, 71}));
  const auto& updates = h.scheduler.update(first, sampled);
  EXPECT_EQ(copy(updates[0].new_token_ids), std::vector<TokenId>{70});
  EXPECT_EQ(updates[0].num_output_tokens, 1);
  h.scheduler.check_integrity();
  EXPECT_EQ(h.end(second, 72)[1].num_output_tokens, 2);
}

TEST(TwoSteps, NothingIsScheduledPastTheLastToken) {
  Harness h(async_config());
  h.add(request({1, 2, 3}, 2));
  const SchedulerOutput& first = h.begin();
  const SchedulerOutput& second = h.begin();
  h.end(first);
  EXPECT_TRUE(h.begin().sequences.empty()) << "the token under way is its last";
  EXPECT_EQ(h.end(second)[0].finish_reason, FinishReason::kLength);
  EXPECT_FALSE(h.scheduler.has_unfinished());
}

TEST(TwoSteps, WhatEndedInTheFirstIsDroppedFromTheSecond) {
  Harness h(async_config());
  const RequestId a = h.add(request({1, 2, 3}, 8));
  h.add(request({4, 5}, 8));
  const SchedulerOutput& first = h.begin();
  const SchedulerOutput& second = h.begin();
  const std::vector<TokenId> eos_for_a = {0, 99};
  EXPECT_EQ(h.scheduler.update(first, eos_for_a)[0].finish_reason, FinishReason::kStop);
  EXPECT_EQ(h.scheduler.stats().num_running, 1);
  EXPECT_FALSE(h.scheduler.abort(a));
  h.scheduler.check_integrity();
  EXPECT_EQ(h.end(second).size(), 1u);
}

TEST(TwoSteps, AnAbortDropsBothResults) {
  Harness h(async_config());
  const RequestId a = h.add(request({1, 2, 3}, 8));
  const RequestId b = h.add(request({4, 5}, 8));
  const SchedulerOutput& first = h.begin();
  const SchedulerOutput& second = h.begin();
  h.scheduler.abort(a);
  h.scheduler.check_integrity();
  ASSERT_EQ(h.end(first).size(), 1u);
  const auto& updates = h.end(second);
  ASSERT_EQ(updates.size(), 1u);
  EXPECT_EQ(updates[0].id, b);
}

TEST(Discard, OfTheSecondStepLeavesTheFirst) {
  Harness h(async_config());
  h.add(request(tokens_from(1, 5), 4));
  const SchedulerOutput& first = h.begin();
  const SchedulerOutput& second = h.begin();
  h.scheduler.discard(second);
  h.scheduler.check_integrity();
  EXPECT_EQ(h.end(first, 70)[0].num_output_tokens, 1);
  const SchedulerOutput& again = h.begin();
  EXPECT_EQ(again.sequences[0].num_computed_tokens, 5);
  EXPECT_EQ(h.batch.token_ids, std::vector<TokenId>{70});
}

TEST(Discard, OfTheFirstStepTakesTheSecondWithIt) {
  Harness h(async_config());
  h.add(request(tokens_from(1, 5), 4));
  const SchedulerOutput& first = h.begin();
  const SchedulerOutput& second = h.begin();
  h.scheduler.discard(first);
  h.scheduler.check_integrity();
  EXPECT_THROW(h.scheduler.discard(second), InvalidArgument);
  EXPECT_THROW(h.scheduler.update(second, std::vector<TokenId>{1}), InvalidArgument);
  const SchedulerOutput& again = h.begin();
  EXPECT_EQ(again.sequences[0].num_computed_tokens, 0);
  EXPECT_EQ(h.batch.token_ids, tokens_from(1, 5));
  EXPECT_TRUE(h.batch.future_tokens.empty());
}

// What a step was to swap in or to copy is not there if the step never was.
TEST(Discard, TakesBackWhatReliesOnItsTransfers) {
  SchedulerConfig config = small_config();
  config.num_blocks = 4;
  config.num_host_blocks = 8;
  Harness h(config);
  h.add(request(tokens_from(1, 13), 2));
  h.run_until_idle();
  h.add(request(tokens_from(40, 13), 2));
  h.run_until_idle();  // pushed the first one's blocks out to the host
  h.add(request(tokens_from(1, 13), 2));
  const SchedulerOutput& step = h.begin();
  ASSERT_GT(step.transfers.swap_ins.size(), 0u);
  h.scheduler.discard(step);
  h.scheduler.check_integrity();
  EXPECT_EQ(h.scheduler.stats().num_running, 0) << "its blocks hold nothing";
  const SchedulerOutput& again = h.begin();
  EXPECT_EQ(static_cast<size_t>(again.sequences[0].num_computed_tokens),
            4 * again.transfers.swap_ins.size());
  h.end(again);
}

// Found by the property tests: such blocks were promised to a newcomer, who then had none.
TEST(Discard, LeavesBlocksForProposedTokensToTheirOwner) {
  SchedulerConfig config = async_config();
  config.num_blocks = 4;
  config.max_num_batched_tokens = 8;
  config.long_prefill_token_threshold = 6;
  Harness h(config);
  const RequestId id = h.add(request(tokens_from(1, 12), 4));
  EXPECT_TRUE(h.scheduler.propose(id, 0, std::vector<TokenId>{99, 99}));
  const SchedulerOutput& first = h.begin();
  EXPECT_EQ(h.begin().sequences[0].num_sampling_rows, 3);
  EXPECT_EQ(h.scheduler.stats().num_free_blocks, 0);
  h.scheduler.discard(first);
  h.add(request({7}, 2));
  EXPECT_EQ(h.begin().sequences.size(), 1u);
}

TEST(PromptLookup, TheLongestMatchWinsThenTheLatest) {
  const auto find = [](std::vector<TokenId> tokens, int32_t min, int32_t max) {
    return look_up_continuation(tokens, min, max);
  };
  //         0  1  2  3  4  5  6  7  8
  EXPECT_EQ(find({1, 2, 3, 9, 2, 3, 8, 2, 3}, 1, 4), 6) << "equal ones: the latest";
  EXPECT_EQ(find({1, 2, 3, 9, 7, 3, 8, 2, 3}, 1, 4), 3) << "the longer one, though earlier";
  EXPECT_EQ(find({1, 2, 3, 9, 7, 3, 8, 2, 3}, 1, 1), 6) << "no longer than max";
  EXPECT_EQ(find({1, 2, 3, 9, 7, 3, 8, 5, 3}, 2, 4), -1) << "none as long as min";
  EXPECT_EQ(find({4, 4, 4}, 1, 4), 2) << "it may overlap the end";
  EXPECT_EQ(find({4}, 1, 4), -1);
  EXPECT_EQ(find({1, 2, 1, 2}, 2, 2), 2);
}

TEST(Speculation, ProposesWhatFollowedTheLastTime) {
  SchedulerConfig config = small_config();
  config.num_speculative_tokens = 3;
  Harness h(config);
  h.add(request({5, 6, 7, 8, 9, 5, 6}, 8));
  const SchedulerOutput& step = h.begin();
  ASSERT_EQ(step.sequences.size(), 1u);
  EXPECT_EQ(step.sequences[0].num_sampling_rows, 1);
  h.end(step, 7);
  const SchedulerOutput& next = h.begin();
  EXPECT_EQ(next.sequences[0].num_sampling_rows, 4);
  EXPECT_EQ(h.batch.token_ids, (std::vector<TokenId>{7, 8, 9, 5}));
  EXPECT_EQ(h.batch.positions, (std::vector<int32_t>{7, 8, 9, 10}));
  EXPECT_EQ(copy(h.batch.sampling_rows[2].tokens),
            (std::vector<TokenId>{5, 6, 7, 8, 9, 5, 6, 7, 8, 9}));
  EXPECT_EQ(h.batch.sampling_rows[2].logits_row, 2);
}

// A model that says 99 to everything.
TEST(Speculation, KeepsThePrefixThatIsSampledAgain) {
  Harness h(small_config());
  const RequestId id = h.add(request({1, 2, 3}, 20));
  h.step();
  EXPECT_TRUE(h.scheduler.propose(id, 0, std::vector<TokenId>{1, 1}));
  EXPECT_TRUE(h.scheduler.propose(id, 0, std::vector<TokenId>{99, 99, 5, 99})) << "replaces";
  const SchedulerOutput& step = h.begin();
  EXPECT_EQ(step.sequences[0].num_scheduled_tokens, 5);
  EXPECT_EQ(step.sequences[0].num_sampling_rows, 5);
  EXPECT_FALSE(h.scheduler.propose(id, 0, std::vector<TokenId>{1})) << "it is in a step";
  const auto& updates = h.end(step);
  EXPECT_EQ(copy(updates[0].new_token_ids), (std::vector<TokenId>{99, 99, 99}));
  EXPECT_EQ(updates[0].num_output_tokens, 4);
  const SchedulerStats stats = h.scheduler.stats();
  EXPECT_EQ(stats.num_draft_tokens, 4);
  EXPECT_EQ(stats.num_accepted_tokens, 2);
  const SchedulerOutput& next = h.begin();
  EXPECT_EQ(next.sequences[0].num_computed_tokens, 6) << "the wrong ones are computed again";
  EXPECT_EQ(next.sequences[0].num_sampling_rows, 1) << "a proposal is used once";
  h.end(next);
}

TEST(Speculation, EndsWhereTheOutputDoes) {
  Harness h(small_config());
  const RequestId id = h.add(request({1, 2, 3}, 4));
  h.step();
  h.scheduler.propose(id, 0, std::vector<TokenId>{99, 99, 99, 99, 99, 99});
  const SchedulerOutput& step = h.begin();
  EXPECT_EQ(step.sequences[0].num_sampling_rows, 3) << "three more tokens are allowed";
  const auto& updates = h.end(step);
  EXPECT_EQ(updates[0].new_token_ids.size(), 3u);
  EXPECT_EQ(updates[0].finish_reason, FinishReason::kLength);

  const RequestId other = h.add(request({1, 2, 3}, 8));
  h.step();
  h.scheduler.propose(other, 0, std::vector<TokenId>{99, 0, 99});
  const std::vector<TokenId> sampled = {99, 0, 99, 99};
  const SchedulerOutput& stops = h.begin();
  const auto& last = h.scheduler.update(stops, sampled);
  EXPECT_EQ(copy(last[0].new_token_ids), (std::vector<TokenId>{99, 0}));
  EXPECT_EQ(last[0].finish_reason, FinishReason::kStop);
  EXPECT_EQ(last[0].stop_token_id, 0);
  EXPECT_EQ(h.scheduler.stats().num_free_blocks, 32);
}

TEST(Speculation, TakesOnlyWhatIsLeftOfTheBudget) {
  Harness h(small_config());  // 16 tokens a step
  const RequestId id = h.add(request({1, 2, 3}, 40));
  h.add(request({4, 5, 6}, 40));
  h.step();
  h.scheduler.propose(id, 0, std::vector<TokenId>(30, 99));
  const SchedulerOutput& step = h.begin();
  EXPECT_EQ(step.num_scheduled_tokens, 16);
  ASSERT_EQ(step.sequences.size(), 2u);
  EXPECT_EQ(step.sequences[0].num_sampling_rows, 15);
  h.end(step);
}

TEST(Speculation, AProposalIsForOneThatIsThereAndNotForBeams) {
  Harness h(small_config());
  EXPECT_FALSE(h.scheduler.propose(12345, 0, std::vector<TokenId>{1}));
  const RequestId id = h.add(request({1, 2, 3}, 8));
  EXPECT_FALSE(h.scheduler.propose(id, 1, std::vector<TokenId>{1}));
  EXPECT_FALSE(h.scheduler.propose(id, -1, std::vector<TokenId>{1}));
  SequenceRequest beams = request({1, 2, 3}, 8);
  beams.params.beam_width = 2;
  const RequestId search = h.add(std::move(beams));
  EXPECT_THROW(h.scheduler.propose(search, 0, std::vector<TokenId>{1}), InvalidArgument);
}

}  // namespace
}  // namespace fastpage
