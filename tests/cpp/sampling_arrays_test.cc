#include "fastpage/sampling_arrays.h"

#include <gtest/gtest.h>

#include <limits>

namespace fastpage {
namespace {

constexpr float kForbidden = -std::numeric_limits<float>::infinity();

// Each row with the prompt 1 2 3, the output 4 4 and the end of sequence 9.
struct Rows {
  explicit Rows(std::vector<SamplingParams> p) : params(std::move(p)) {
    for (size_t i = 0; i < params.size(); ++i) {
      const auto seq = static_cast<int32_t>(i);
      batch.sampling_rows.push_back({seq, seq, &params[i], tokens, 3, uint64_t{1} << 63, eos});
    }
  }
  std::vector<TokenId> tokens = {1, 2, 3, 4, 4}, eos = {9};
  std::vector<SamplingParams> params;
  InputBatch batch;
};

TEST(SamplingArraysTest, NothingIsLaidOutThatNobodyAsksFor) {
  const Rows rows({SamplingParams(), SamplingParams()});
  EXPECT_FALSE(reads_tokens(rows.batch));
  const SamplingArrays a = sampling_arrays(rows.batch, 40);
  EXPECT_EQ(a.logits_rows, (std::vector<int32_t>{0, 1}));
  EXPECT_EQ(a.positions, (std::vector<int64_t>{5, 5}));
  EXPECT_EQ(a.seeds[0], std::numeric_limits<int64_t>::min());
  EXPECT_TRUE(a.allowed.empty() && a.bias_start.empty() && a.token_start.empty());
  EXPECT_TRUE(a.unsupported.empty());
}

TEST(SamplingArraysTest, EveryRowHasItsPart) {
  SamplingParams allowed, biased, repeated, frequent;
  allowed.allowed_token_ids = {0, 31, 33, 39, 40, -1};  // the last two are no tokens
  biased.logit_bias = {{7, 1.5f}, {9, 2.0f}};
  biased.bad_words = {{4, 4, 8}, {4, 8}, {3, 6}, {9}};
  biased.min_tokens = 3;
  repeated.repetition_penalty = 1.5f;
  frequent.frequency_penalty = 0.5f;
  const Rows rows({SamplingParams(), allowed, biased, repeated, frequent});
  EXPECT_TRUE(reads_tokens(rows.batch));
  const SamplingArrays a = sampling_arrays(rows.batch, 40);
  EXPECT_EQ(a.allowed, (std::vector<int32_t>{-1, -1, static_cast<int32_t>(0x80000001u), 0x82, -1,
                                             -1, -1, -1, -1, -1}));
  EXPECT_EQ(a.bias_start, (std::vector<int32_t>{0, 0, 0, 3, 3, 3}));
  EXPECT_EQ(a.bias_ids, (std::vector<int32_t>{8, 9, 7}));  // the prompt's 3 makes no bad word
  EXPECT_EQ(a.bias, (std::vector<float>{kForbidden, kForbidden, 1.5f}));
  EXPECT_EQ(a.token_start, (std::vector<int32_t>{0, 0, 0, 0, 5, 7}));
  EXPECT_EQ(a.tokens, (std::vector<int32_t>{1, 2, 3, 4, 4, 4, 4}));
  EXPECT_EQ(a.num_prompt_tokens, (std::vector<int32_t>{0, 0, 0, 3, 0}));
}

TEST(SamplingArraysTest, WhatCannotBeSaidIsNamed) {
  SamplingParams twice;
  twice.logit_bias = {{7, 1.5f}, {3, 1.0f}, {7, 2.0f}};
  twice.logprobs = 2;
  const Rows rows({SamplingParams(), twice});
  const SamplingArrays a = sampling_arrays(rows.batch, 40);
  ASSERT_EQ(a.unsupported.size(), 1u);
  EXPECT_EQ(a.unsupported[0].first, 1);
  EXPECT_STREQ(a.unsupported[0].second, "logit_bias names a token twice");
  EXPECT_EQ(a.temperature, (std::vector<float>{1.0f, 0.0f}));
  EXPECT_TRUE(a.bias_start.empty());
  EXPECT_EQ(a.num_logprobs[1], 2);
}

}  // namespace
}  // namespace fastpage
