#include "fastpage/executor.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <set>

#include "counting_allocator.h"
#include "small_model.h"

namespace fastpage {
namespace {

// Sequences of one block each, all computing their next token, greedily.
struct DecodeBatch {
  explicit DecodeBatch(int32_t num_seqs) {
    params.temperature = 0;
    batch.num_seqs = num_seqs;
    batch.block_table_stride = 1;
    batch.query_start_loc = {0};
    for (int32_t i = 0; i < num_seqs; ++i) {
      blocks.push_back(num_seqs - 1 - i);
      tokens.push_back(i);
      batch.query_start_loc.push_back(i + 1);
      batch.block_table_rows.push_back(i);
      batch.logits_indices.push_back(i);
      batch.sampling_rows.push_back({i, i, &params, Span<const TokenId>(), 0, 0, {}});
    }
    for (int32_t i = 0; i < num_seqs; ++i) {
      batch.sampling_rows[i].tokens = Span<const TokenId>(&tokens[i], 1);
    }
    batch.block_tables = blocks.data();
    batch.token_ids.resize(num_seqs);
    set_position(0);
  }
  void set_position(int32_t position) {
    batch.step_id = position;
    for (int32_t i = 0; i < batch.num_seqs; ++i) batch.token_ids[i] = (i + 17 * position) % 40;
    batch.positions.assign(batch.num_seqs, position);
    batch.seq_lens.assign(batch.num_seqs, position + 1);
    batch.slot_mapping.clear();
    for (BlockId block : blocks) batch.slot_mapping.push_back(block * 16 + position);
  }

  SamplingParams params;
  std::vector<BlockId> blocks;
  std::vector<TokenId> tokens;
  InputBatch batch;
};

TEST(CpuExecutor, LogitsComeInSlices) {
  const auto executor = loaded(small_config());
  DecodeBatch decode(7);
  std::vector<std::pair<int32_t, int64_t>> slices;
  executor->forward(decode.batch, [&](int32_t first_row, Matrix<float> logits) {
    slices.emplace_back(first_row, logits.rows);
    EXPECT_EQ(logits.cols, kVocab);
    for (int64_t i = 0; i < logits.rows; ++i) EXPECT_TRUE(std::isfinite(logits.row(i)[0]));
  });
  EXPECT_EQ(slices, (std::vector<std::pair<int32_t, int64_t>>{{0, 4}, {4, 3}}));
}

TEST(CpuExecutor, RefusesMoreTokensThanItHasRoomFor) {
  const auto executor = loaded(small_config());
  DecodeBatch decode(33);
  EXPECT_THROW(executor->forward(decode.batch, [](int32_t, Matrix<float>) {}), InvalidArgument);
}

TEST(CpuExecutor, ASecondStepAllocatesNothing) {
  const auto executor = loaded(small_config());
  DecodeBatch decode(7);
  const CpuExecutor::LogitsSink sink = [](int32_t, Matrix<float>) {};
  executor->forward(decode.batch, sink);
  decode.set_position(1);
  const int64_t before = num_allocations.load();
  executor->forward(decode.batch, sink);
  EXPECT_EQ(num_allocations.load() - before, 0);
}

TEST(CpuExecutor, SizesOfTheCache) {
  EXPECT_EQ(CpuExecutor::kv_block_bytes({3, 2, 10}, DType::kBFloat16, 16),
            3u * 2 * 2 * 10 * 16 * 2);
  const auto executor = loaded(small_config());
  EXPECT_EQ(executor->kv_cache_bytes(), 8u * 2 * 4 * 16 * 4);
  EXPECT_EQ(executor->weight_bytes() % (4 * kHidden), 0u);
  EXPECT_GE(executor->weight_bytes(), 4u * kHidden * (16 + kVocab));
}

std::vector<TokenId> argmax(CpuExecutor& executor, const InputBatch& batch) {
  std::vector<TokenId> tokens;
  executor.forward(batch, [&](int32_t, Matrix<float> logits) {
    for (int64_t i = 0; i < logits.rows; ++i) {
      const float* row = logits.row(i);
      tokens.push_back(static_cast<TokenId>(std::max_element(row, row + kVocab) - row));
    }
  });
  return tokens;
}

// What is in a block of layer 0, keys and values.
std::vector<float> contents(const ops::KvCacheView& cache, BlockId block) {
  const int64_t size = cache.bytes_per_block() / static_cast<int64_t>(sizeof(float));
  const float* k = static_cast<const float*>(cache.k) + block * size;
  const float* v = static_cast<const float*>(cache.v) + block * size;
  std::vector<float> values(k, k + size);
  values.insert(values.end(), v, v + size);
  return values;
}

TEST(CpuExecutor, TransfersAreSwapOutsThenCopiesThenSwapIns) {
  ExecutorConfig config = small_config();
  config.num_host_kv_blocks = 3;
  const auto executor = loaded(config);
  EXPECT_EQ(executor->kv_host_cache_bytes(), 3u * 2 * 4 * 16 * 4);
  const ops::KvCacheView cache = executor->kv_cache(0);
  for (int64_t i = 0; i < 8 * cache.bytes_per_block() / static_cast<int64_t>(sizeof(float)); ++i) {
    static_cast<float*>(cache.k)[i] = static_cast<float>(i);
    static_cast<float*>(cache.v)[i] = -static_cast<float>(i);
  }
  const auto in_1 = contents(cache, 1), in_2 = contents(cache, 2), in_5 = contents(cache, 5);
  // 1 and 2 change places by way of the host; 5 goes to 6, and from there to 7.
  BlockTransfers transfers;
  transfers.swap_outs = {{1, 2}};
  transfers.block_copies = {{2, 1}, {5, 6}, {6, 7}};
  transfers.swap_ins = {{2, 2}};
  executor->apply_transfers(transfers);
  EXPECT_EQ(contents(cache, 1), in_2);
  EXPECT_EQ(contents(cache, 2), in_1);
  EXPECT_EQ(contents(cache, 6), in_5);
  EXPECT_EQ(contents(cache, 7), in_5);
  EXPECT_EQ(contents(executor->kv_host_cache(0), 2), in_1);
}

TEST(CpuExecutor, TransfersOutOfRangeAreRefused) {
  ExecutorConfig config = small_config();
  config.num_host_kv_blocks = 3;
  const auto executor = loaded(config);
  const auto none = loaded(small_config());
  EXPECT_EQ(none->kv_host_cache_bytes(), 0u);
  DecodeBatch decode(1);
  BlockTransfers& transfers = decode.batch.transfers;
  const auto refused = [&](CpuExecutor& by) {
    EXPECT_THROW(by.check_batch(decode.batch), InvalidArgument);
    EXPECT_THROW(by.apply_transfers(transfers), InvalidArgument);
    transfers.clear();
  };
  transfers.swap_outs = {{0, 0}};
  EXPECT_NO_THROW(executor->check_batch(decode.batch));
  refused(*none);
  transfers.swap_outs = {{8, 0}};
  refused(*executor);
  transfers.swap_outs = {{0, 3}};
  refused(*executor);
  static_cast<float*>(executor->kv_cache(0).k)[0] = 1.0f;
  transfers.swap_outs = {{0, 0}};
  transfers.swap_ins = {{0, -1}};
  refused(*executor);
  EXPECT_EQ(contents(executor->kv_host_cache(0), 0)[0], 0.0f) << "nothing is moved then";
  transfers.block_copies = {{0, 8}};
  refused(*executor);
  config.num_host_kv_blocks = -1;
  EXPECT_THROW(loaded(config), InvalidArgument);
}

TEST(CpuExecutor, AHostCacheThatDoesNotFitIsRefused) {
  ExecutorConfig config = small_config();
  config.num_host_kv_blocks = INT32_MAX;
  config.block_size = 1 << 14;
  EXPECT_THROW(loaded(config), ResourceExhausted);
}

TEST(ProgramRunner, NeedsAnExecutor) { EXPECT_THROW(ProgramRunner(nullptr), InvalidArgument); }

TEST(ProgramRunner, SamplesTheArgmaxOfItsLogitsAndCopiesBlocksFirst) {
  const auto executor = loaded(small_config());
  ProgramRunner runner(executor);
  DecodeBatch decode(3);
  runner.execute(decode.batch);
  EXPECT_EQ(runner.wait(0).sampled_token_ids.size(), 3u);
  EXPECT_THROW(runner.wait(1), InvalidArgument);

  // Sequence 0 goes on in a copy of its block: the same as in the block itself.
  constexpr int32_t kLast = 6;
  for (int32_t position = 1; position < kLast; ++position) {
    decode.set_position(position);
    argmax(*executor, decode.batch);
  }
  decode.set_position(kLast);
  const std::vector<TokenId> expected = argmax(*executor, decode.batch);
  const BlockId original = decode.blocks[0];
  decode.blocks[0] = 7;
  decode.set_position(kLast);
  EXPECT_NE(argmax(*executor, decode.batch), expected) << "an empty block must show";
  decode.batch.transfers.block_copies = {{original, 7}};
  runner.execute(decode.batch);
  EXPECT_EQ(runner.wait(kLast).sampled_token_ids, expected);
}

TEST(ProgramRunner, SwapsBlocksFirst) {
  ExecutorConfig config = small_config();
  config.num_host_kv_blocks = 2;
  const auto executor = loaded(config);
  ProgramRunner runner(executor);
  DecodeBatch decode(3);
  for (int32_t position = 0; position < 5; ++position) {
    decode.set_position(position);
    argmax(*executor, decode.batch);
  }
  decode.set_position(5);
  const std::vector<TokenId> expected = argmax(*executor, decode.batch);
  // Sequence 0 leaves its block, which becomes sequence 1's, and comes back in another one.
  decode.batch.transfers.swap_outs = {{decode.blocks[0], 1}};
  decode.batch.transfers.block_copies = {{decode.blocks[1], decode.blocks[0]}};
  decode.batch.transfers.swap_ins = {{7, 1}};
  decode.blocks[1] = decode.blocks[0];
  decode.blocks[0] = 7;
  decode.set_position(5);
  runner.execute(decode.batch);
  EXPECT_EQ(runner.wait(5).sampled_token_ids, expected);
}

// Sequences that continue with what is sampled, greedily: a batch laid out with the step before not
// known yet has -1 for it.
class Decoding {
 public:
  static constexpr int32_t kSeqs = 5;
  static constexpr int32_t kSteps = 15;  // of one block

  explicit Decoding(int32_t max_steps_in_flight)
      : runner(loaded(small_config()), max_steps_in_flight) {}

  // Step `position`, its tokens those of `known`, or of the step before.
  InputBatch& lay_out(int32_t position, const std::vector<TokenId>* known) {
    DecodeBatch& decode = batches[position % 2];
    decode.set_position(position);
    decode.batch.future_tokens.clear();
    for (int32_t i = 0; i < kSeqs; ++i) {
      decode.tokens[i] = decode.batch.token_ids[i] = known ? (*known)[i] : -1;
      if (!known) decode.batch.future_tokens.push_back({i, i, &decode.tokens[i]});
    }
    return decode.batch;
  }

  void expect_resolved(int32_t position, const std::vector<TokenId>& sampled) {
    EXPECT_EQ(batches[position % 2].batch.token_ids, sampled);
    EXPECT_EQ(batches[position % 2].tokens, sampled);
  }

  const std::vector<TokenId> first{3, 1, 4, 1, 5};
  DecodeBatch batches[2] = {DecodeBatch(kSeqs), DecodeBatch(kSeqs)};
  ProgramRunner runner;
};

std::vector<std::vector<TokenId>> decoded_one_by_one() {
  Decoding decoding(1);
  std::vector<std::vector<TokenId>> sampled{decoding.first};
  for (int32_t i = 0; i < Decoding::kSteps; ++i) {
    decoding.runner.execute(decoding.lay_out(i, &sampled.back()));
    sampled.push_back(decoding.runner.wait(i).sampled_token_ids);
  }
  return sampled;
}

TEST(ProgramRunner, TwoStepsInFlightGiveTheSameTokens) {
  const auto expected = decoded_one_by_one();
  EXPECT_GT(std::set<std::vector<TokenId>>(expected.begin(), expected.end()).size(), 5u);
  Decoding decoding(2);
  EXPECT_EQ(decoding.runner.max_steps_in_flight(), 2);
  decoding.runner.execute(decoding.lay_out(0, &decoding.first));
  decoding.runner.execute(decoding.lay_out(1, nullptr));
  for (int32_t i = 0; i < Decoding::kSteps; ++i) {
    const ModelRunnerOutput& output = decoding.runner.wait(i);
    if (i + 1 < Decoding::kSteps) decoding.expect_resolved(i + 1, expected[i + 1]);
    if (i + 2 < Decoding::kSteps) decoding.runner.execute(decoding.lay_out(i + 2, nullptr));
    EXPECT_EQ(output.step_id, i) << "valid until the next wait()";
    EXPECT_EQ(output.sampled_token_ids, expected[i + 1]);
  }
}

// ... and whatever the order in which the caller and the runner come to their ends.
TEST(ProgramRunner, FutureTokensMayBeKnownWhenTheStepIsBegun) {
  const auto expected = decoded_one_by_one();
  Decoding decoding(2);
  decoding.runner.execute(decoding.lay_out(0, &decoding.first));
  for (int32_t i = 0; i < Decoding::kSteps; ++i) {
    const ModelRunnerOutput& output = decoding.runner.wait(i);
    if (i + 1 < Decoding::kSteps) {
      decoding.runner.execute(decoding.lay_out(i + 1, nullptr));
      decoding.expect_resolved(i + 1, expected[i + 1]);
    }
    EXPECT_EQ(output.sampled_token_ids, expected[i + 1]);
  }
}

TEST(ProgramRunner, StepsInFlightAllocateNothing) {
  Decoding decoding(2);
  decoding.runner.execute(decoding.lay_out(0, &decoding.first));
  int64_t before = 0;
  for (int32_t i = 0; i + 1 < Decoding::kSteps; ++i) {
    if (i == 6) before = num_allocations.load();
    decoding.runner.execute(decoding.lay_out(i + 1, nullptr));
    decoding.runner.wait(i);
  }
  EXPECT_EQ(num_allocations.load() - before, 0);
  decoding.runner.wait(Decoding::kSteps - 1);
}

TEST(ProgramRunner, AFailedStepFailsThoseThatNeedItsTokensAndNoOther) {
  for (const int32_t in_flight : {1, 2}) {
    Decoding decoding(in_flight);
    const auto expected = decoded_one_by_one();
    DecodeBatch too_large(33);
    too_large.batch.step_id = 100;
    const auto run = [&](const InputBatch& first, const InputBatch& second) {
      decoding.runner.execute(first);
      if (in_flight == 2) decoding.runner.execute(second);
      EXPECT_THROW(decoding.runner.wait(100), InvalidArgument);
      if (in_flight == 1) decoding.runner.execute(second);
    };
    run(too_large.batch, decoding.lay_out(0, nullptr));
    EXPECT_THROW(decoding.runner.wait(0), Error);
    EXPECT_THROW(decoding.runner.wait(0), Error) << "still";
    run(too_large.batch, decoding.lay_out(0, &decoding.first));
    EXPECT_EQ(decoding.runner.wait(0).sampled_token_ids, expected[1]);
  }
}

TEST(ProgramRunner, FutureTokensOfNoStep) {
  Decoding decoding(2);
  decoding.runner.execute(decoding.lay_out(0, nullptr));
  EXPECT_THROW(decoding.runner.wait(0), Error) << "there is no step before";
  decoding.runner.execute(decoding.lay_out(1, &decoding.first));
  InputBatch& batch = decoding.lay_out(2, nullptr);
  batch.future_tokens.back().sampling_row = Decoding::kSeqs;
  decoding.runner.execute(batch);
  EXPECT_EQ(decoding.runner.wait(1).sampled_token_ids.size(), size_t{Decoding::kSeqs});
  EXPECT_THROW(decoding.runner.wait(2), Error) << "the step before sampled fewer";
  EXPECT_EQ(batch.token_ids, std::vector<TokenId>(Decoding::kSeqs, -1));
}

TEST(ProgramRunner, NoMoreStepsThanItIsMadeFor) {
  EXPECT_THROW(ProgramRunner(loaded(small_config()), 0), InvalidArgument);
  EXPECT_THROW(ProgramRunner(loaded(small_config()), 3), InvalidArgument);
  for (const int32_t in_flight : {1, 2}) {
    Decoding decoding(in_flight);
    DecodeBatch one_more(1);
    one_more.batch.step_id = 50;
    for (int32_t i = 0; i < in_flight; ++i) {
      decoding.runner.execute(decoding.lay_out(i, &decoding.first));
    }
    EXPECT_THROW(decoding.runner.execute(one_more.batch), InvalidArgument);
    EXPECT_THROW(decoding.runner.wait(50), InvalidArgument);
    decoding.runner.wait(0);
    EXPECT_NO_THROW(decoding.runner.execute(one_more.batch));
    decoding.runner.wait(50);
  }
}

TEST(ProgramRunner, MayBeDestroyedWithStepsInFlight) {
  for (int round = 0; round < 20; ++round) {
    Decoding decoding(2);
    decoding.runner.execute(decoding.lay_out(0, &decoding.first));
    if (round % 2 == 0) decoding.runner.execute(decoding.lay_out(1, nullptr));
  }
}

// A child of fork() has no thread but the one that forked.
TEST(ProgramRunner, ComputesInTheCallersThreadInAChildOfFork) {
  const auto expected = decoded_one_by_one();
  Decoding decoding(2);
  auto unused = std::make_unique<ProgramRunner>(loaded(small_config()), 2);
  decoding.runner.execute(decoding.lay_out(0, &decoding.first));
  const pid_t child = fork();
  if (child == 0) {
    alarm(600);  // rather than hang
    unused.reset();
    bool ok = false;
    try {
      decoding.runner.wait(0);
    } catch (const Error&) {
      ok = true;
    }
    decoding.runner.execute(decoding.lay_out(0, &decoding.first));
    decoding.runner.execute(decoding.lay_out(1, nullptr));
    ok = ok && decoding.runner.wait(0).sampled_token_ids == expected[1];
    ok = ok && decoding.runner.wait(1).sampled_token_ids == expected[2];
    _exit(ok ? 0 : 1);
  }
  ASSERT_GT(child, 0);
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  EXPECT_EQ(decoding.runner.wait(0).sampled_token_ids, expected[1]);
}

}  // namespace
}  // namespace fastpage
