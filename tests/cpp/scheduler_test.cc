#include "fastpage/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "scheduler_harness.h"

namespace fastpage {
namespace {

TEST(SchedulerConfig, NamesTheFieldThatIsWrong) {
  SchedulerConfig config = small_config();
  config.num_blocks = 0;
  try {
    Scheduler scheduler(config);
    FAIL();
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(std::string(e.what()), "num_blocks is 0: must be in [1, 536870911]");
  }
  for (int32_t SchedulerConfig::* field :
       {&SchedulerConfig::block_size, &SchedulerConfig::max_num_seqs,
        &SchedulerConfig::max_num_batched_tokens, &SchedulerConfig::max_model_len,
        &SchedulerConfig::max_num_waiting, &SchedulerConfig::max_num_waiting_tokens,
        &SchedulerConfig::long_prefill_token_threshold, &SchedulerConfig::max_num_partial_prefills,
        &SchedulerConfig::num_host_blocks, &SchedulerConfig::max_steps_in_flight,
        &SchedulerConfig::num_speculative_tokens}) {
    config = small_config();
    config.*field = -1;
    EXPECT_THROW(config.validate(), InvalidArgument);
  }
}

TEST(Admission, NamesTheNumbers) {
  SchedulerConfig config = small_config();
  config.num_blocks = 8;
  config.max_num_waiting = 1;
  Scheduler scheduler(config);
  EXPECT_EQ(error_of(&scheduler, request({})), "the prompt is empty: it needs at least one token");
  EXPECT_EQ(error_of(&scheduler, request(tokens_from(1, 50), 40)),
            "prompt 50 + max_tokens 40 > max_model_len 64");
  EXPECT_EQ(error_of(&scheduler, request(tokens_from(1, 64), -1)),
            "prompt 64 + 1 > max_model_len 64");
  EXPECT_EQ(error_of(&scheduler, request(tokens_from(1, 40), 6)),
            "prompt 40 + output 6 tokens needs 12 blocks, 8 exist: lower max_tokens or give the KV "
            "cache more memory");
  EXPECT_EQ(error_of(&scheduler, request({1}, 0)),
            "max_tokens is 0: must be at least 1, or -1 for as many as fit");
  // The last token's keys and values are never stored: 33 tokens fit into 8 blocks of 4.
  EXPECT_EQ(error_of(&scheduler, request(tokens_from(1, 32), 1)), "");
  EXPECT_EQ(error_of(&scheduler, request({1})),
            "exhausted: the queue is full: 1 waiting, max_num_waiting 1: try again later");
}

TEST(Schedule, AnyOfManyStopTokensEndsASequence) {
  for (const TokenId token : {0, 100, 137, 199, 200}) {
    Harness h(small_config());
    SequenceRequest r = request({1, 2});
    r.params.stop_token_ids = tokens_from(100, 100);
    std::reverse(r.params.stop_token_ids.begin(), r.params.stop_token_ids.end());
    h.add(std::move(r));
    EXPECT_EQ(h.step(token)[0].finish_reason,
              token == 200 ? FinishReason::kNone : FinishReason::kStop);
  }
}

TEST(Schedule, ChunksAPromptWithinTheBudget) {
  Harness h(small_config());
  const RequestId id = h.add(request(tokens_from(1, 37), 2));
  for (const int32_t n : {16, 16, 5}) {
    const SchedulerOutput& step = h.begin();
    ASSERT_EQ(step.sequences.size(), 1u);
    EXPECT_EQ(step.sequences[0].id, id);
    EXPECT_EQ(step.sequences[0].num_scheduled_tokens, n);
    EXPECT_EQ(step.sequences[0].num_sampling_rows, n == 5);
    const auto& updates = h.end(step);
    EXPECT_EQ(updates[0].new_token_ids.size(), n == 5);
  }
  EXPECT_EQ(h.begin().sequences[0].num_computed_tokens, 37);
}

TEST(Schedule, RunningFirstThenWaitingInTheOrderOfArrival) {
  Harness h(small_config());
  const RequestId a = h.add(request(tokens_from(1, 6)));
  h.step();
  const RequestId b = h.add(request(tokens_from(20, 10)));
  const RequestId c = h.add(request(tokens_from(40, 10)));
  const SchedulerOutput& step = h.begin();
  ASSERT_EQ(step.sequences.size(), 3u);
  EXPECT_EQ(step.sequences[0].id, a);
  EXPECT_EQ(step.sequences[1].id, b);
  EXPECT_EQ(step.sequences[2].id, c);
  EXPECT_EQ(step.sequences[0].num_scheduled_tokens, 1);
  EXPECT_EQ(step.sequences[1].num_scheduled_tokens, 10);
  EXPECT_EQ(step.sequences[2].num_scheduled_tokens, 5);  // what was left of 16
}

TEST(Schedule, SequencesAtOnceAreLimited) {
  Harness h(small_config());
  for (int i = 0; i < 6; ++i) h.add(request({1, 2}, 1));
  const SchedulerOutput& step = h.begin();
  EXPECT_EQ(step.sequences.size(), 4u);
  EXPECT_EQ(h.end(step).size(), 4u);
  EXPECT_EQ(h.begin().sequences.size(), 2u);
}

TEST(Schedule, ALongPromptLeavesATokenToEachRunningSequenceBehindIt) {
  SchedulerConfig config = small_config();
  config.policy = SchedulingPolicy::kPriority;
  Harness h(config);
  h.add(request({1, 2}, 20));
  h.add(request({3, 4}, 20));
  h.step();
  SequenceRequest urgent = request(tokens_from(1, 40), 2);
  urgent.priority = -1;
  const RequestId id = h.add(std::move(urgent));
  h.step();  // comes in behind those that run, with 14 tokens
  const SchedulerOutput& step = h.begin();
  ASSERT_EQ(step.sequences.size(), 3u);
  EXPECT_EQ(step.sequences[0].id, id);
  EXPECT_EQ(step.sequences[0].num_scheduled_tokens, 14);
  EXPECT_EQ(step.sequences[1].num_scheduled_tokens, 1);
  EXPECT_EQ(step.sequences[2].num_scheduled_tokens, 1);
}

TEST(Schedule, LongPrefillTokenThresholdCapsAChunk) {
  SchedulerConfig config = small_config();
  config.long_prefill_token_threshold = 5;
  Harness h(config);
  h.add(request(tokens_from(1, 12)));
  h.add(request(tokens_from(30, 4)));
  const SchedulerOutput& step = h.begin();
  EXPECT_EQ(step.sequences[0].num_scheduled_tokens, 5);
  EXPECT_EQ(step.sequences[1].num_scheduled_tokens, 4);
}

TEST(Schedule, PriorityPolicyAdmitsTheUrgentFirst) {
  for (const SchedulingPolicy policy : {SchedulingPolicy::kFcfs, SchedulingPolicy::kPriority}) {
    SchedulerConfig config = small_config();
    config.policy = policy;
    Harness h(config);
    std::vector<RequestId> ids;
    for (const int32_t priority : {2, 0, 1, 0}) {
      SequenceRequest r = request(tokens_from(1, 3));
      r.priority = priority;
      ids.push_back(h.add(std::move(r)));
    }
    const std::vector<int> order =
        policy == SchedulingPolicy::kFcfs ? std::vector<int>{0, 1, 2, 3} : std::vector{1, 3, 2, 0};
    const SchedulerOutput& step = h.begin();
    for (int i = 0; i < 4; ++i) EXPECT_EQ(step.sequences[i].id, ids[order[i]]) << i;
  }
}

// What the running need for tokens that they have already is theirs, computed or not.
TEST(Schedule, RoomForTheWholePromptIsAskedForOnAdmission) {
  for (const int32_t num_blocks_asked : {4, 5}) {
    SchedulerConfig config = small_config();
    config.num_blocks = 12;
    config.long_prefill_token_threshold = 8;
    Harness h(config);
    h.add(request(tokens_from(1, 32), 1));  // 8 blocks, 2 more in each step: 4 are left over
    h.step();
    h.add(request(tokens_from(100, num_blocks_asked * 4), 1));
    h.step();
    EXPECT_EQ(h.scheduler.stats().num_running, num_blocks_asked == 4 ? 2 : 1);
    h.run_until_idle();
    EXPECT_EQ(h.scheduler.stats().num_preemptions, 0);
  }
}

// Else whoever is let in with the last block is pushed out when anybody grows by one, its prompt
// computed in vain.
TEST(Schedule, AHundredthOfTheBlocksIsLeftToTheRunning) {
  for (const int32_t num_blocks_asked : {8, 9}) {
    SchedulerConfig config = small_config();
    config.num_blocks = 100;
    config.max_model_len = 400;
    config.max_num_batched_tokens = 400;
    Harness h(config);
    h.add(request(tokens_from(1, 360), 3));  // 90 blocks, then one more: 9 are left over
    h.step();
    h.add(request(tokens_from(1000, num_blocks_asked * 4), 3));
    h.step();
    EXPECT_EQ(h.scheduler.stats().num_running, num_blocks_asked == 8 ? 2 : 1);
    h.run_until_idle();
    EXPECT_EQ(h.scheduler.stats().num_preemptions, 0);
  }
}

TEST(Preemption, TheTailYieldsComesBackFirstAndFindsItsPrefix) {
  SchedulerConfig config = small_config();
  config.num_blocks = 6;
  Harness h(config);
  const RequestId a = h.add(request(tokens_from(1, 8), 12));
  const RequestId b = h.add(request(tokens_from(50, 7), 12));
  h.step();
  h.step();  // a: 9 computed in 3 blocks, b: 8 in 2 blocks
  h.step();  // b takes its third and the last block
  const RequestId c = h.add(request(tokens_from(80, 2), 2));
  while (h.scheduler.stats().num_preemptions == 0) h.step();
  EXPECT_EQ(h.scheduler.stats().num_running, 1);
  EXPECT_EQ(h.scheduler.stats().num_waiting, 2);

  std::vector<RequestId> finished;
  int32_t output_of_b = 0;
  bool b_is_back = false;
  while (h.scheduler.has_unfinished()) {
    const SchedulerOutput& step = h.begin();
    for (const ScheduledSequence& seq : step.sequences) {
      if (seq.id == c) {
        EXPECT_TRUE(b_is_back) << "c came in before b";
      }
      if (seq.id != b || b_is_back) continue;
      b_is_back = true;
      EXPECT_GT(seq.num_computed_tokens, 0) << "its prefix was not found again";
      EXPECT_EQ(seq.num_computed_tokens % 4, 0);
    }
    for (const SequenceUpdate& update : h.end(step)) {
      if (update.id == b) output_of_b = update.num_output_tokens;
      if (update.finish_reason != FinishReason::kNone) finished.push_back(update.id);
    }
  }
  EXPECT_EQ(output_of_b, 12);
  ASSERT_EQ(finished.size(), 3u);
  EXPECT_EQ(finished[0], a);
  EXPECT_EQ(h.scheduler.stats().num_free_blocks, 6);
}

TEST(PrefixCache, AHitIsAlignedAndLeavesATokenToCompute) {
  const std::pair<int32_t, int32_t> cases[] = {{3, 0}, {4, 0}, {5, 4}, {8, 4}, {9, 8}, {11, 8}};
  for (const auto& [length, hit] : cases) {
    Harness h(small_config());
    h.add(request(tokens_from(1, length), 1));
    h.run_until_idle();
    h.add(request(tokens_from(1, length), 1));
    const SchedulerOutput& step = h.begin();
    EXPECT_EQ(step.sequences[0].num_computed_tokens, hit) << length;
    EXPECT_EQ(step.sequences[0].num_scheduled_tokens, length - hit) << length;
    EXPECT_EQ(h.end(step)[0].num_cached_tokens, hit) << length;
    EXPECT_EQ(h.scheduler.stats().prefix_cache_hits, hit);
    EXPECT_EQ(h.scheduler.stats().prefix_cache_queries, 2 * length);
  }
}

TEST(PrefixCache, OutputTokensAreFoundByTheNextTurn) {
  Harness h(small_config());
  h.add(request(tokens_from(1, 6), 6));
  h.run_until_idle();  // says 99 six times; the last one is not computed
  std::vector<TokenId> next_turn = tokens_from(1, 6);
  next_turn.insert(next_turn.end(), 7, 99);
  h.add(request(next_turn, 1));
  EXPECT_EQ(h.begin().sequences[0].num_computed_tokens, 8);
}

TEST(PrefixCache, DifferentTokensBeforeABlockMakeItAnother) {
  Harness h(small_config());
  h.add(request(tokens_from(1, 12), 1));
  h.run_until_idle();
  std::vector<TokenId> other = tokens_from(1, 12);
  other[5] = 77;
  h.add(request(other, 1));
  EXPECT_EQ(h.begin().sequences[0].num_computed_tokens, 4);
}

TEST(PrefixCache, SaltsAndOffKeepPrefixesApart) {
  for (const bool caching : {true, false}) {
    SchedulerConfig config = small_config();
    config.enable_prefix_caching = caching;
    Harness h(config);
    h.add(request(tokens_from(1, 12), 1));
    h.run_until_idle();
    SequenceRequest r = request(tokens_from(1, 12), 1);
    if (caching) r.cache_salt = "tenant";
    h.add(std::move(r));
    EXPECT_EQ(h.begin().sequences[0].num_computed_tokens, 0);
  }
}

// Whoever reads the KV events knows hashes: the bytes of one, and the tokens after it, are no way
// in.
TEST(PrefixCache, NoSaltStandsForABlock) {
  SchedulerConfig config = small_config();
  config.enable_kv_events = true;
  Harness h(config);
  h.add(request(tokens_from(1, 12), 1));
  h.run_until_idle();
  std::vector<KvEvent> events;
  h.scheduler.take_kv_events(&events);
  const std::vector<TokenId> second = tokens_from(5, 4);
  SequenceRequest r = request(tokens_from(9, 8), 1);
  r.cache_salt.append(reinterpret_cast<const char*>(&events.at(0).hash), 16);
  r.cache_salt.append(reinterpret_cast<const char*>(second.data()), 16);
  h.add(std::move(r));
  EXPECT_EQ(h.begin().sequences[0].num_computed_tokens, 0);
}

// Invariant 5.
TEST(PrefixCache, NothingIsFoundBeforeItIsComputed) {
  Harness h(small_config());
  h.add(request(tokens_from(1, 7), 4));
  h.add(request(tokens_from(1, 7), 4));
  const SchedulerOutput& step = h.begin();
  ASSERT_EQ(step.sequences.size(), 2u);
  EXPECT_EQ(step.sequences[1].num_computed_tokens, 0);
  h.end(step);

  Harness failing(small_config());
  const RequestId id = failing.add(request(tokens_from(1, 7), 4));
  failing.scheduler.discard(failing.begin());
  failing.scheduler.abort(id);
  failing.add(request(tokens_from(1, 7), 4));
  EXPECT_EQ(failing.begin().sequences[0].num_computed_tokens, 0);
}

TEST(PrefixCache, ResetNeedsAnIdleScheduler) {
  Harness h(small_config());
  h.add(request(tokens_from(1, 9), 2));
  h.step();
  EXPECT_FALSE(h.scheduler.reset_prefix_cache());
  h.run_until_idle();
  EXPECT_TRUE(h.scheduler.reset_prefix_cache());
  h.add(request(tokens_from(1, 9), 2));
  EXPECT_EQ(h.begin().sequences[0].num_computed_tokens, 0);
}

TEST(PromptLogprobs, AreAskedForOncePerPosition) {
  Harness h(small_config());
  h.add(request(tokens_from(1, 20), 1));
  h.run_until_idle();  // now all of it is cached
  SequenceRequest r = request(tokens_from(1, 20), 2);
  r.params.prompt_logprobs = 3;
  h.add(std::move(r));
  int32_t position = 0;
  while (h.scheduler.has_unfinished()) {
    const SchedulerOutput& step = h.begin();
    for (const PromptLogprobRow& row : h.batch.prompt_logprob_rows) {
      EXPECT_EQ(row.position, ++position);
      EXPECT_EQ(row.token, 1 + position);
      EXPECT_EQ(row.num_logprobs, 3);
      EXPECT_EQ(h.batch.positions[h.batch.logits_indices[row.logits_row]], position - 1);
    }
    h.end(step);
  }
  EXPECT_EQ(position, 19);
}

TEST(Update, StopConditions) {
  struct Case {
    const char* name;
    int32_t max_tokens;
    int32_t min_tokens;
    bool ignore_eos;
    TokenId token;
    int32_t num_output_tokens;
    FinishReason reason;
    TokenId stop_token_id;
  };
  const Case cases[] = {
      {"max_tokens", 3, 0, false, 99, 3, FinishReason::kLength, -1},
      {"max_model_len", -1, 0, false, 99, 61, FinishReason::kLength, -1},
      {"eos", 9, 0, false, 0, 1, FinishReason::kStop, 0},
      {"eos ignored", 9, 0, true, 0, 9, FinishReason::kLength, -1},
      {"stop token", 9, 0, true, 55, 1, FinishReason::kStop, 55},
      {"eos as the last token", 1, 0, false, 0, 1, FinishReason::kStop, 0},
      {"min_tokens", 9, 4, false, 0, 5, FinishReason::kStop, 0},
      {"min_tokens and a stop token", 9, 2, false, 55, 3, FinishReason::kStop, 55},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.name);
    Harness h(small_config());
    SequenceRequest r = request({1, 2, 3}, c.max_tokens);
    r.params.min_tokens = c.min_tokens;
    r.params.ignore_eos = c.ignore_eos;
    r.params.stop_token_ids = {55, 56};
    h.add(std::move(r));
    SequenceUpdate last{};
    while (h.scheduler.has_unfinished()) last = h.step(c.token)[0];
    EXPECT_EQ(last.num_output_tokens, c.num_output_tokens);
    EXPECT_EQ(last.finish_reason, c.reason);
    EXPECT_EQ(last.stop_token_id, c.stop_token_id);
    EXPECT_EQ(h.scheduler.stats().num_free_blocks, 32);
  }
}

TEST(Update, RefusesWhatDoesNotBelongToTheStep) {
  Harness h(small_config());
  h.add(request({1, 2, 3}));
  const SchedulerOutput& step = h.begin();
  const std::vector<TokenId> two = {1, 2};
  EXPECT_THROW(h.scheduler.update(step, two), InvalidArgument);
  const SchedulerOutput copy = step;
  EXPECT_THROW(h.scheduler.update(copy, {two.data(), 1}), InvalidArgument);
  h.end(step);
  EXPECT_THROW(h.scheduler.update(step, {two.data(), 1}), InvalidArgument) << "a second time";
}

TEST(Prepare, LaysOutARaggedBatch) {
  SchedulerConfig config = small_config();
  config.enable_prefix_caching = false;
  Harness h(config);
  SequenceRequest first = request({10, 11, 12, 13, 14}, 8);
  first.seed = 42;
  first.params.ignore_eos = true;
  h.add(std::move(first));
  h.step(77);
  h.add(request({20, 21, 22}, 8));
  const SchedulerOutput& step = h.begin();
  const InputBatch& b = h.batch;
  EXPECT_EQ(b.step_id, step.step_id);
  EXPECT_EQ(b.num_seqs, 2);
  EXPECT_EQ(b.token_ids, (std::vector<TokenId>{77, 20, 21, 22}));
  EXPECT_EQ(b.positions, (std::vector<int32_t>{5, 0, 1, 2}));
  EXPECT_EQ(b.query_start_loc, (std::vector<int32_t>{0, 1, 4}));
  EXPECT_EQ(b.seq_lens, (std::vector<int32_t>{6, 3}));
  EXPECT_EQ(b.logits_indices, (std::vector<int32_t>{0, 3}));
  EXPECT_EQ(b.slot_mapping[0], b.block_table(0)[1] * 4 + 1);
  EXPECT_EQ(b.slot_mapping[3], b.block_table(1)[0] * 4 + 2);
  ASSERT_EQ(b.sampling_rows.size(), 2u);
  const SamplingRow& row = b.sampling_rows[0];
  EXPECT_EQ(row.seq, 0);
  EXPECT_EQ(row.logits_row, 0);
  EXPECT_EQ(row.seed, 42u);
  EXPECT_EQ(row.num_prompt_tokens, 5);
  EXPECT_EQ(row.num_output_tokens(), 1);
  EXPECT_TRUE(row.eos_token_ids.empty());
  EXPECT_EQ(b.sampling_rows[1].eos_token_ids.size(), 1u);
}

// Invariant 6.
TEST(Abort, FreesOnceAtAnyMoment) {
  Harness h(small_config());
  const RequestId waiting = h.add(request(tokens_from(1, 30)));
  EXPECT_TRUE(h.scheduler.abort(waiting));
  EXPECT_FALSE(h.scheduler.abort(waiting));
  EXPECT_FALSE(h.scheduler.abort(0));
  EXPECT_FALSE(h.scheduler.abort(~RequestId{0}));
  h.scheduler.check_integrity();

  const RequestId running = h.add(request(tokens_from(1, 30)));
  EXPECT_NE(running, waiting);
  h.step();
  EXPECT_FALSE(h.scheduler.abort(waiting)) << "its slot belongs to another now";
  EXPECT_TRUE(h.scheduler.abort(running));
  EXPECT_EQ(h.scheduler.stats().num_free_blocks, 32);
  h.scheduler.check_integrity();
}

TEST(Abort, DuringAStepDropsTheLateResult) {
  Harness h(small_config());
  const RequestId a = h.add(request({1, 2, 3}));
  const RequestId b = h.add(request({4, 5, 6}));
  const SchedulerOutput& step = h.begin();
  const SamplingRow& row = h.batch.sampling_rows[0];
  EXPECT_TRUE(h.scheduler.abort(a));
  h.add(request(tokens_from(30, 3)));  // must not be put where the step still looks
  EXPECT_EQ(row.tokens[2], 3);
  EXPECT_EQ(row.params->max_tokens, 8);
  const auto& updates = h.end(step);
  ASSERT_EQ(updates.size(), 1u);
  EXPECT_EQ(updates[0].id, b);
  EXPECT_EQ(updates[0].sampling_row, 1);
}

TEST(Abort, BetweenScheduleAndPrepareAsksForAnotherSchedule) {
  Harness h(small_config());
  const RequestId a = h.add(request({1, 2, 3}));
  h.add(request({4, 5, 6}));
  const SchedulerOutput& step = h.scheduler.schedule();
  h.scheduler.abort(a);
  EXPECT_THROW(h.scheduler.prepare(step, &h.batch), Error);
  h.scheduler.discard(step);
  EXPECT_EQ(h.begin().sequences.size(), 1u);
}

TEST(Schedule, ADiscardedStepIsTriedAgain) {
  Harness h(small_config());
  h.add(request(tokens_from(1, 6)));
  const SchedulerOutput& step = h.begin();
  EXPECT_THROW(h.scheduler.schedule(), InvalidArgument) << "one step is under way";
  h.scheduler.discard(step);
  h.scheduler.check_integrity();
  EXPECT_THROW(h.scheduler.discard(step), InvalidArgument) << "a second time";
  const SchedulerOutput& again = h.begin();
  ASSERT_EQ(again.sequences.size(), 1u);
  EXPECT_EQ(again.sequences[0].num_computed_tokens, 0);
  EXPECT_EQ(again.sequences[0].num_scheduled_tokens, 6);
}

TEST(Stats, CountWhatBlocksHoldAndWhatTheyCouldHold) {
  SchedulerConfig config = small_config();
  Harness h(config);
  h.add(request(tokens_from(1, 9), 4));
  h.step();  // 3 blocks, 9 tokens
  EXPECT_EQ(h.scheduler.stats().kv_slots_allocated, 12);
  EXPECT_EQ(h.scheduler.stats().kv_slots_used, 9);
  h.add(request(tokens_from(1, 9), 4));  // shares 2 full blocks, which count once
  h.step();                              // 3 + 1 blocks, 10 + 1 tokens
  EXPECT_EQ(h.scheduler.stats().kv_slots_allocated, 12 + 16);
  EXPECT_EQ(h.scheduler.stats().kv_slots_used, 9 + 11);
}

TEST(Scheduler, TheSameCallsGiveTheSameSteps) {
  SchedulerConfig config = small_config();
  config.num_blocks = 16;
  Harness a(config);
  Harness b(config);
  for (int i = 0; i < 200; ++i) {
    if (i % 3 == 0) {
      EXPECT_EQ(a.add(request(tokens_from(i % 5, 5 + i % 17), 5 + i % 7)),
                b.add(request(tokens_from(i % 5, 5 + i % 17), 5 + i % 7)));
    }
    const SchedulerOutput& step_a = a.scheduler.schedule();
    const SchedulerOutput& step_b = b.scheduler.schedule();
    ASSERT_EQ(step_a.sequences.size(), step_b.sequences.size());
    if (step_a.sequences.empty()) continue;
    a.scheduler.prepare(step_a, &a.batch);
    b.scheduler.prepare(step_b, &b.batch);
    ASSERT_EQ(a.batch.slot_mapping, b.batch.slot_mapping);
    ASSERT_EQ(a.batch.token_ids, b.batch.token_ids);
    a.end(step_a, i);
    b.end(step_b, i);
  }
}

TEST(Scheduler, PrepareRefusesAStepThatIsNotUnderWay) {
  Scheduler scheduler(small_config());
  scheduler.add_request(request({1, 2, 3}));
  const SchedulerOutput& step = scheduler.schedule();
  InputBatch batch;
  EXPECT_THROW(Scheduler(small_config()).prepare(step, &batch), InvalidArgument);
  scheduler.prepare(step, &batch);
  scheduler.update(step, std::vector<TokenId>{5});
  EXPECT_THROW(scheduler.prepare(step, &batch), InvalidArgument);
}

}  // namespace
}  // namespace fastpage
