// Several sequences of one request: samples of one prompt, forks, beams.
#include <gtest/gtest.h>

#include <set>

#include "scheduler_harness.h"

namespace fastpage {
namespace {

SequenceRequest samples(int32_t n, std::vector<TokenId> prompt, int32_t max_tokens = 8) {
  SequenceRequest r = request(std::move(prompt), max_tokens);
  r.params.n = n;
  return r;
}

TEST(SampleSeed, IsTheRequestsOwnForTheFirstAndDiffersForEach) {
  EXPECT_EQ(sample_seed(42, 0), 42u);
  std::set<uint64_t> seeds;
  for (uint64_t seed = 0; seed < 100; ++seed) {
    for (int32_t index = 0; index < 10; ++index) seeds.insert(sample_seed(seed << 32, index));
  }
  EXPECT_EQ(seeds.size(), 1000u);
}

TEST(Samples, ComputeTheirPromptOnce) {
  Harness h(small_config());
  SequenceRequest r = samples(3, tokens_from(1, 6));
  r.seed = 7;
  const RequestId id = h.add(std::move(r));
  const SchedulerOutput& step = h.begin();
  ASSERT_EQ(step.sequences.size(), 1u);
  EXPECT_EQ(step.num_scheduled_tokens, 6);
  EXPECT_EQ(step.sequences[0].num_sampling_rows, 3);
  ASSERT_EQ(h.batch.sampling_rows.size(), 3u);
  EXPECT_EQ(h.batch.num_logits(), 1);
  for (int32_t i = 0; i < 3; ++i) {
    EXPECT_EQ(h.batch.sampling_rows[i].logits_row, 0);
    EXPECT_EQ(h.batch.sampling_rows[i].seed, sample_seed(7, i));
  }
  const std::vector<TokenId> sampled = {10, 11, 12};
  const auto& updates = h.scheduler.update(step, sampled);
  ASSERT_EQ(updates.size(), 3u);
  for (int32_t i = 0; i < 3; ++i) {
    EXPECT_EQ(updates[i].id, id);
    EXPECT_EQ(updates[i].index, i);
    EXPECT_EQ(updates[i].seq, 0);
    EXPECT_EQ(updates[i].sampling_row, i);
    EXPECT_EQ(updates[i].new_token_ids[0], 10 + i);
  }
  h.scheduler.check_integrity();
}

// 6 tokens in blocks of 4: the second block is partly filled. Of three holders two take a copy, and
// the last writes in place.
TEST(Samples, CopyABlockWhenTheyWriteIt) {
  Harness h(small_config());
  h.add(samples(3, tokens_from(1, 6)));
  h.step();
  EXPECT_EQ(h.scheduler.stats().num_free_blocks, 30);
  const SchedulerOutput& step = h.begin();
  ASSERT_EQ(step.sequences.size(), 3u);
  ASSERT_EQ(step.transfers.block_copies.size(), 2u);
  EXPECT_EQ(step.transfers.block_copies[0].src, step.transfers.block_copies[1].src);
  EXPECT_NE(step.transfers.block_copies[0].dst, step.transfers.block_copies[1].dst);
  EXPECT_EQ(h.batch.block_table(2)[1], step.transfers.block_copies[0].src);
  h.end(step);
  EXPECT_EQ(h.scheduler.stats().num_free_blocks, 28) << "one shared block, three of their own";
  EXPECT_EQ(h.scheduler.stats().num_blocks_copied, 2);
  EXPECT_TRUE(h.begin().transfers.empty()) << "once";
}

TEST(Samples, CopyNothingWhereABlockEnds) {
  Harness h(small_config());
  h.add(samples(3, tokens_from(1, 8)));
  h.run_until_idle();
  EXPECT_EQ(h.scheduler.stats().num_blocks_copied, 0);
}

TEST(Samples, WaitForARowWhereNoneIsFree) {
  SchedulerConfig config = small_config();
  config.max_num_seqs = 2;
  Harness h(config);
  h.add(samples(5, tokens_from(1, 6), 4));
  EXPECT_EQ(h.step().size(), 5u) << "all of them have their first token";
  EXPECT_EQ(h.scheduler.stats().num_running, 2);
  EXPECT_EQ(h.scheduler.stats().num_waiting, 3);
  std::vector<int32_t> num_tokens(5, 1);
  while (h.scheduler.has_unfinished()) {
    for (const SequenceUpdate& update : h.step()) num_tokens[update.index] += 1;
  }
  EXPECT_EQ(num_tokens, (std::vector<int32_t>{4, 4, 4, 4, 4}));
  EXPECT_EQ(h.scheduler.stats().num_free_blocks, 32);
}

TEST(Samples, EndOneByOne) {
  Harness h(small_config());
  const RequestId id = h.add(samples(4, tokens_from(1, 6)));
  EXPECT_TRUE(h.scheduler.abort(id, 0)) << "another goes on with the prompt";
  EXPECT_FALSE(h.scheduler.abort(id, 0));
  EXPECT_FALSE(h.scheduler.abort(id, 4));
  EXPECT_TRUE(h.scheduler.abort(id, 2));
  h.scheduler.check_integrity();
  std::vector<int32_t> indices;
  for (const SequenceUpdate& update : h.step()) indices.push_back(update.index);
  EXPECT_EQ(indices, (std::vector<int32_t>{1, 3}));
  EXPECT_TRUE(h.scheduler.abort(id, 3));
  EXPECT_EQ(h.begin().sequences.size(), 1u);
  EXPECT_TRUE(h.scheduler.abort(id, 1));
  EXPECT_FALSE(h.scheduler.abort(id)) << "nothing of it is left";
  EXPECT_FALSE(h.scheduler.has_unfinished());
}

// Found by the property tests: the rows were those of all samples, and taken for those of the rest.
TEST(Samples, WhoGoesOnWithThePromptKeepsItsOwnToken) {
  for (const bool prepared : {false, true}) {
    Harness h(small_config());
    const RequestId id = h.add(samples(2, tokens_from(1, 6)));
    const SchedulerOutput& step = h.scheduler.schedule();
    if (prepared) h.scheduler.prepare(step, &h.batch);
    h.scheduler.abort(id, 0);
    if (!prepared) h.scheduler.prepare(step, &h.batch);
    ASSERT_EQ(h.batch.sampling_rows.size(), 2u);
    EXPECT_EQ(h.batch.sampling_rows[1].seed, sample_seed(0, 1));
    const std::vector<TokenId> sampled = {10, 11};
    const auto& updates = h.scheduler.update(step, sampled);
    ASSERT_EQ(updates.size(), 1u);
    EXPECT_EQ(updates[0].index, 1);
    EXPECT_EQ(updates[0].sampling_row, 1);
    EXPECT_EQ(updates[0].new_token_ids[0], 11);
    h.scheduler.check_integrity();
  }
}

TEST(Fork, ContinuesWhatASampleHasSoFar) {
  Harness h(small_config());
  const RequestId id = h.add(request(tokens_from(1, 6)));
  h.step();
  h.step(55);
  const int32_t child = h.scheduler.fork(id, 0, 1234);
  h.scheduler.check_integrity();
  EXPECT_EQ(child, 1);
  EXPECT_EQ(h.scheduler.stats().num_free_blocks, 30) << "it shares all blocks";
  const SchedulerOutput& step = h.begin();
  ASSERT_EQ(step.sequences.size(), 2u);
  EXPECT_EQ(step.sequences[1].index, 1);
  EXPECT_EQ(step.sequences[1].num_computed_tokens, 7);
  EXPECT_EQ(step.transfers.block_copies.size(), 1u);
  EXPECT_EQ(h.batch.token_ids, (std::vector<TokenId>{55, 55}));
  EXPECT_EQ(h.batch.sampling_rows[1].seed, 1234u);
  EXPECT_EQ(h.end(step)[1].num_output_tokens, 3);
}

std::string fork_error(Scheduler* scheduler, RequestId id, int32_t index) {
  try {
    scheduler->fork(id, index, 0);
  } catch (const InvalidArgument& e) {
    return e.what();
  }
  return "";
}

TEST(Fork, SaysWhyNot) {
  Harness h(small_config());
  const RequestId id = h.add(request({1, 2, 3}));
  const std::string of_it = "fork of sample 0 of request " + std::to_string(id) + ": ";
  EXPECT_EQ(fork_error(&h.scheduler, id, 0), of_it + "its first token is not out yet");
  const SchedulerOutput& step = h.begin();
  EXPECT_EQ(fork_error(&h.scheduler, id, 0), of_it + "it is in a step under way: update() first");
  h.end(step);
  EXPECT_EQ(fork_error(&h.scheduler, 9, 0),
            "fork of sample 0 of request 9: there is no such request");
  EXPECT_NE(fork_error(&h.scheduler, id, 1).find("there is no such sample"), std::string::npos);
  EXPECT_NE(fork_error(&h.scheduler, id, -1).find("there is no such sample"), std::string::npos);
  SequenceRequest beams = request({1, 2, 3});
  beams.params.beam_width = 2;
  EXPECT_NE(fork_error(&h.scheduler, h.add(std::move(beams)), 0).find("beams cannot be forked"),
            std::string::npos);
}

TEST(Admission, OfSamplesNamesTheNumbers) {
  SchedulerConfig config = small_config();
  config.num_blocks = 8;
  config.max_num_waiting = 4;
  Scheduler scheduler(config);
  const auto beams = [](int32_t width, std::vector<TokenId> prompt, int32_t max_tokens) {
    SequenceRequest r = request(std::move(prompt), max_tokens);
    r.params.beam_width = width;
    return r;
  };
  EXPECT_EQ(error_of(&scheduler, samples(0, {1})), "n is 0: must be in [1, 1024]");
  EXPECT_EQ(error_of(&scheduler, samples(1025, {1})), "n is 1025: must be in [1, 1024]");
  EXPECT_EQ(error_of(&scheduler, samples(5, {1})),
            "n is 5: more than max_num_waiting 4 can never queue up");
  EXPECT_EQ(error_of(&scheduler, beams(65, {1}, 2)), "beam_width is 65: must be in [0, 64]");
  EXPECT_EQ(error_of(&scheduler, beams(5, {1}, 2)),
            "beam_width is 5: more than max_num_seqs 4 can never run at once");
  EXPECT_EQ(error_of(&scheduler, beams(3, {1, 2, 3, 4}, 12)),
            "prompt 4 + output 12 tokens x 3 beams needs 10 blocks, 8 exist: lower max_tokens or "
            "give the KV cache more memory");
  EXPECT_EQ(error_of(&scheduler, samples(3, {1})), "");
  EXPECT_EQ(error_of(&scheduler, samples(2, {1})),
            "exhausted: the queue is full: 3 waiting, max_num_waiting 4: try again later");
  EXPECT_EQ(error_of(&scheduler, samples(1, {1})), "");
}

// Candidates that make every beam go on with the two tokens `best` and `best` + 1.
std::vector<TokenLogprobs> candidates(const InputBatch& batch, TokenId best) {
  std::vector<TokenLogprobs> out;
  for (const SamplingRow& row : batch.sampling_rows) {
    TokenLogprobs each{{best}, {-0.5f}, 1};
    for (int32_t i = 0; i < row.params->logprobs; ++i) {
      each.token_ids.push_back(best + i);
      each.logprobs.push_back(-0.5f - static_cast<float>(i));
    }
    out.push_back(std::move(each));
  }
  return out;
}

TEST(Beams, SayNothingUntilTheSearchIsOverThenAllOfTheBest) {
  Harness h(small_config());
  SequenceRequest r = request(tokens_from(1, 6), 3);
  r.params.beam_width = 3;
  r.params.n = 2;
  r.tag = 17;
  const RequestId id = h.add(std::move(r));
  EXPECT_FALSE(h.scheduler.abort(id, 0)) << "beams cannot be aborted one by one";
  for (int i = 0; i < 3; ++i) {
    const SchedulerOutput& step = h.begin();
    EXPECT_EQ(step.sequences.size(), i == 0 ? 1u : 3u);
    const std::vector<TokenId> sampled(h.batch.sampling_rows.size(), 1);
    EXPECT_THROW(h.scheduler.update(step, sampled), InvalidArgument) << "without logprobs";
    const auto& updates = h.scheduler.update(step, sampled, candidates(h.batch, 10 * (i + 1)));
    h.scheduler.check_integrity();
    if (i < 2) {
      for (const SequenceUpdate& update : updates) EXPECT_TRUE(update.new_token_ids.empty());
      continue;
    }
    ASSERT_EQ(updates.size(), 2u);
    for (int32_t rank = 0; rank < 2; ++rank) {
      EXPECT_EQ(updates[rank].index, rank);
      EXPECT_EQ(updates[rank].tag, 17u);
      EXPECT_EQ(updates[rank].sampling_row, -1);
      EXPECT_EQ(updates[rank].num_output_tokens, 3);
      EXPECT_EQ(updates[rank].finish_reason, FinishReason::kLength);
    }
    EXPECT_EQ(updates[0].new_token_ids[0], 10);
    EXPECT_EQ(updates[0].new_token_ids[2], 30);
    EXPECT_FLOAT_EQ(updates[0].score, -0.5f);
    EXPECT_LT(updates[1].score, updates[0].score);
  }
  EXPECT_FALSE(h.scheduler.has_unfinished());
  EXPECT_EQ(h.scheduler.stats().num_free_blocks, 32);
}

// Beams that have their candidates wait for those that have not, however many they are.
TEST(Beams, GoOnWhenMostOfThemWerePushedOutWithTheirCandidates) {
  SchedulerConfig config = small_config();
  config.policy = SchedulingPolicy::kPriority;
  config.num_blocks = 80;
  config.max_num_seqs = 40;
  config.max_num_batched_tokens = 34;
  config.max_model_len = 400;
  Harness h(config);
  SequenceRequest r = request(tokens_from(1, 4));
  r.params.beam_width = 36;
  r.priority = 1;
  h.add(std::move(r));
  const auto step = [&](int i) {
    const SchedulerOutput& step = h.begin();
    if (step.sequences.empty()) return;
    const std::vector<TokenId> sampled(h.batch.sampling_rows.size(), 1);
    h.scheduler.update(step, sampled, candidates(h.batch, 100 * (i + 1)));
    h.scheduler.check_integrity();
  };
  step(0);
  step(1);  // 34 of the 36
  EXPECT_EQ(h.scheduler.stats().num_running, 36);
  h.add(request(tokens_from(1000, 313), 3));
  for (int i = 2; h.scheduler.has_unfinished(); ++i) {
    ASSERT_LT(i, 100) << h.scheduler.stats().num_waiting << " wait for ever";
    step(i);
  }
  EXPECT_EQ(h.scheduler.stats().num_preemptions, 36);
}

TEST(Beams, AreAbortedTogether) {
  Harness h(small_config());
  SequenceRequest r = request(tokens_from(1, 6), 8);
  r.params.beam_width = 3;
  const RequestId id = h.add(std::move(r));
  const SchedulerOutput& first = h.begin();
  h.scheduler.update(first, std::vector<TokenId>{1}, candidates(h.batch, 10));
  const SchedulerOutput& step = h.begin();
  EXPECT_EQ(step.sequences.size(), 3u);
  EXPECT_TRUE(h.scheduler.abort(id));
  EXPECT_FALSE(h.scheduler.abort(id));
  h.scheduler.check_integrity();
  EXPECT_TRUE(h.end(step).empty());
  EXPECT_EQ(h.scheduler.stats().num_free_blocks, 32);
}

}  // namespace
}  // namespace fastpage
