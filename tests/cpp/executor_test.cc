#include "fastpage/executor.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "counting_allocator.h"

namespace fastpage {
namespace {

constexpr int64_t kVocab = 40;
constexpr int64_t kHidden = 8;  // 2 heads of 4, 1 KV head

// One layer without residuals, so that attention decides alone.
Program one_layer() {
  Program p;
  const auto value = [&](OpKind kind, std::vector<Operand> inputs, Rows rows, int64_t cols,
                         std::map<std::string, AttrValue> attrs = {}) {
    const Operand y{p.add_activation("", rows, cols), 0, cols};
    p.add_op({kind, std::move(inputs), {y}, std::move(attrs)});
    return y;
  };
  const BufferId table = p.add_weight("embed", {kVocab, kHidden});
  const Operand x = value(OpKind::kEmbed, {{table}}, Rows::kTokens, kHidden);
  const Operand normed = value(OpKind::kNorm, {x, {p.add_weight("norm", {kHidden})}}, Rows::kTokens,
                               kHidden, {{"kind", std::string("rms")}, {"eps", 1e-5}});
  const Operand qkv =
      value(OpKind::kLinear, {normed, {p.add_weight("qkv", {16, kHidden})}}, Rows::kTokens, 16);
  const Operand qk =
      value(OpKind::kRotary, {{qkv.buffer, 0, 12}, {p.add_weight("cos_sin", {64, 4})}},
            Rows::kTokens, 12, {{"head_dim", int64_t{4}}, {"style", std::string("neox")}});
  p.add_op(
      {OpKind::kWriteCache, {{qk.buffer, 8, 4}, {qkv.buffer, 12, 4}}, {}, {{"layer", int64_t{0}}}});
  const Operand heads = value(OpKind::kAttend, {{qk.buffer, 0, 8}}, Rows::kTokens, 8,
                              {{"layer", int64_t{0}},
                               {"num_heads", int64_t{2}},
                               {"num_kv_heads", int64_t{1}},
                               {"head_dim", int64_t{4}},
                               {"scale", 0.5}});
  const Operand wanted = value(OpKind::kGatherRows, {heads}, Rows::kLogits, kHidden);
  p.set_output(value(OpKind::kLinear, {wanted, {table}}, Rows::kLogits, kVocab).buffer);
  return p;
}

std::shared_ptr<CpuExecutor> loaded(const ExecutorConfig& config) {
  auto executor =
      std::make_shared<CpuExecutor>(one_layer(), config, std::make_shared<ThreadPool>(2));
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (const Buffer& buffer : executor->program().buffers()) {
    if (buffer.kind != Buffer::Kind::kWeight) continue;
    TensorView view;
    view.ndim = static_cast<int32_t>(buffer.shape.size());
    for (int32_t i = 0; i < view.ndim; ++i) view.shape[i] = buffer.shape[i];
    view.strides = {view.ndim == 2 ? buffer.shape[1] : 1, 1};
    std::vector<float> values(static_cast<size_t>(view.numel()));
    for (float& v : values) v = 0.3f * normal(random);  // keeps the softmax flat
    view.data = values.data();
    executor->load_weight(buffer.name, view);
  }
  executor->finish_loading();
  return executor;
}

ExecutorConfig small_config() {
  ExecutorConfig config;
  config.weight_dtype = DType::kFloat32;
  config.kv_cache_dtype = DType::kFloat32;
  config.num_kv_blocks = 8;
  config.max_num_tokens = 32;
  config.max_num_logits = 4;
  return config;
}

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
  decode.batch.block_copies = {{original, 7}};
  runner.execute(decode.batch);
  EXPECT_EQ(runner.wait(kLast).sampled_token_ids, expected);
}

}  // namespace
}  // namespace fastpage
