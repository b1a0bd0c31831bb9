#include "fastpage/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>

#include "core/sampling/kernels.h"
#include "core/sampling/philox.h"
#include "core/sampling/threshold.h"
#include "fastpage/thread_pool.h"

namespace fastpage {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// The known answers that Random123 is published with.
TEST(PhiloxTest, KnownAnswers) {
  EXPECT_EQ(philox4x32_10({0, 0, 0, 0}, {0, 0}),
            (PhiloxCounter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox4x32_10({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}),
            (PhiloxCounter{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(
      philox4x32_10({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
      (PhiloxCounter{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(PhiloxTest, UniformUsesAllOfSeedAndPosition) {
  std::vector<double> draws;
  for (uint64_t seed : {uint64_t{0}, uint64_t{1}, uint64_t{1} << 32, ~uint64_t{0}}) {
    for (uint64_t position : {uint64_t{0}, uint64_t{1}, uint64_t{1} << 32}) {
      draws.push_back(philox_uniform(seed, position));
      EXPECT_GE(draws.back(), 0.0);
      EXPECT_LT(draws.back(), 1.0);
    }
  }
  std::sort(draws.begin(), draws.end());
  EXPECT_EQ(std::unique(draws.begin(), draws.end()), draws.end());
}

std::vector<float> random_logits(int64_t n, uint32_t seed, float spread = 4.0f) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0f, spread);
  std::vector<float> logits(n);
  for (float& logit : logits) logit = normal(engine);
  return logits;
}

TEST(SamplingKernelsTest, WeighIsExp) {
  std::vector<float> x, weights(20000), sums(sampling::num_chunks(20000));
  for (int i = 0; i < 20000; ++i) x.push_back(-static_cast<float>(i) * 0.005f);
  for (const sampling::Kernels* kernel : sampling::runnable_kernels()) {
    kernel->weigh(x.data(), 20000, 0.0f, 1.0f, weights.data(), sums.data());
    EXPECT_EQ(weights[0], 1.0f);
    EXPECT_EQ(weights[19999], 0.0f);
    for (int i = 0; i < 20000; ++i) {
      const double exact = std::exp(static_cast<double>(x[i]));
      const double error = exact < 0x1p-126 ? 0x1p-126 : exact * 3e-7 * (1 - x[i]);
      ASSERT_NEAR(weights[i], exact, error) << x[i];
    }
  }
}

// The same bits whatever the instruction set: a seed gives the same text on every machine.
TEST(SamplingKernelsTest, AllInstructionSetsAgreeBitwise) {
  const auto all = sampling::runnable_kernels();
  for (int64_t n : {1, 31, 32, 33, 1000, 1024, 1025, 5000, 49152}) {
    std::vector<float> x = random_logits(n, 7);
    if (n > 1000) x[17] = kNan, x[900] = -kInfinity;
    const auto run = [&](const sampling::Kernels& kernel) {
      std::vector<float> maxima(sampling::num_maxima(n)), weights(n), sums(sampling::num_chunks(n));
      std::vector<float> kept_sums(sums.size()), kept(n);
      std::vector<int32_t> indices(n, -1);
      const float greatest = kernel.maxima(x.data(), n, maxima.data());
      kernel.weigh(x.data(), n, greatest, 0.7f, weights.data(), sums.data());
      kernel.sum(weights.data(), n, 1e-3f, kept_sums.data());
      const int64_t size = kernel.gather(x.data(), n, 0.5f, 4.0f, kept.data(), indices.data());
      const sampling::Split split = kernel.split(weights.data(), n, 1e-3f);
      std::vector<double> result{greatest, static_cast<double>(size), split.mass,
                                 static_cast<double>(split.count),
                                 static_cast<double>(kernel.find(x.data(), n, 3.0f))};
      for (const auto* v : {&maxima, &weights, &sums, &kept_sums, &kept}) {
        result.insert(result.end(), v->begin(), v->end());
      }
      result.insert(result.end(), indices.begin(), indices.end());
      return result;
    };
    const std::vector<double> expected = run(*all[0]);
    for (const sampling::Kernels* kernel : all) {
      const std::vector<double> got = run(*kernel);
      ASSERT_EQ(std::memcmp(got.data(), expected.data(), got.size() * sizeof(double)), 0) << n;
    }
  }
}

TEST(ThresholdTest, KthGreatestIsThatOfSorting) {
  std::mt19937 engine(1);
  for (int trial = 0; trial < 300; ++trial) {
    const int64_t n = 1 + engine() % 3000;
    std::vector<float> x = random_logits(n, engine());
    if (trial % 3 == 0) {  // ties
      for (float& v : x) v = std::round(v);
    }
    for (int64_t i = 0; trial % 5 == 0 && i < n; i += 3) x[i] = i % 2 ? -kInfinity : -3.4e38f;
    std::vector<float> sorted = x, search(n);
    std::sort(sorted.begin(), sorted.end(), std::greater<float>());
    for (int64_t k : {int64_t{1}, n, 1 + static_cast<int64_t>(engine() % n)}) {
      ASSERT_EQ(sampling::kth_greatest(x.data(), n, k, sorted[0], search.data()), sorted[k - 1]);
    }
    ASSERT_EQ(sampling::kth_greatest(x.data(), n, n + 1, sorted[0], search.data()), -kInfinity);
  }
}

TEST(ThresholdTest, MassThresholdIsThatOfSorting) {
  std::mt19937 engine(2);
  for (int trial = 0; trial < 300; ++trial) {
    const int64_t n = 1 + engine() % 3000;
    std::vector<float> weights = random_logits(n, engine(), trial % 2 ? 0.1f : 3.0f), search(n);
    const float greatest = *std::max_element(weights.begin(), weights.end());
    // Powers of two, so that all sums are exact and ties are many.
    for (float& w : weights) w = std::exp2(std::max(std::round(w - greatest), -20.0f));
    std::vector<float> sorted = weights;
    std::sort(sorted.begin(), sorted.end(), std::greater<float>());
    const double total = std::accumulate(sorted.begin(), sorted.end(), 0.0);
    for (double share : {0.01, 0.5, 0.9, 0.999999}) {
      double reached = 0.0;
      size_t i = 0;
      while ((reached += sorted[i]) < share * total) ++i;
      ASSERT_EQ(sampling::mass_threshold(weights.data(), n, share * total, total, search.data()),
                sorted[i]);
    }
  }
}

// One row of logits under given parameters, without a model.
class SamplerTest : public testing::Test {
 protected:
  TokenId sample(std::vector<float> logits, const SamplingParams& params,
                 const std::vector<TokenId>& tokens = {}, uint64_t seed = 0) {
    const std::vector<std::vector<float>> rows{std::move(logits)};
    return sample_rows(rows, {params}, {tokens}, {seed}, nullptr).sampled_token_ids[0];
  }

  ModelRunnerOutput sample_rows(const std::vector<std::vector<float>>& rows,
                                const std::vector<SamplingParams>& params,
                                const std::vector<std::vector<TokenId>>& tokens,
                                const std::vector<uint64_t>& seeds, ThreadPool* pool) {
    const auto vocab_size = static_cast<int32_t>(rows[0].size());
    InputBatch batch;
    std::vector<float> logits;
    for (size_t i = 0; i < rows.size(); ++i) {
      const auto row = static_cast<int32_t>(i);
      batch.sampling_rows.push_back({row, row, &params[i], tokens[i], 0, seeds[i], eos_});
      logits.insert(logits.end(), rows[i].begin(), rows[i].end());
    }
    ModelRunnerOutput out;
    Sampler sampler(vocab_size, pool);
    sampler.begin(batch, &out);
    sampler.sample({logits.data(), static_cast<int64_t>(rows.size()), vocab_size}, 0, batch, &out);
    return out;
  }

  std::vector<TokenId> eos_;
};

SamplingParams greedy() {
  SamplingParams params;
  params.temperature = 0.0f;
  return params;
}

TEST_F(SamplerTest, GreedyTakesTheLowestIdOnTies) {
  std::vector<float> logits(3000, 1.0f);
  EXPECT_EQ(sample(logits, greedy()), 0);
  logits[2999] = logits[1500] = 2.0f;
  EXPECT_EQ(sample(logits, greedy()), 1500);
}

TEST_F(SamplerTest, DegenerateRowsYieldATokenAndLeaveOthersAlone) {
  const int64_t n = 1500;
  std::vector<float> plain = random_logits(n, 3), some_nan = plain;
  some_nan[5] = some_nan[1400] = kNan;
  some_nan[700] = 50.0f;
  std::vector<float> infinite = plain;
  infinite[800] = infinite[801] = kInfinity;
  const std::vector<std::vector<float>> rows{plain,
                                             std::vector<float>(n, -kInfinity),
                                             std::vector<float>(n, kNan),
                                             std::vector<float>(n, kInfinity),
                                             some_nan,
                                             infinite};
  for (float temperature : {0.0f, 1e-38f, 0.8f, 3e38f}) {
    SamplingParams params;
    params.temperature = temperature;
    params.top_p = 0.9f;
    params.logprobs = 3;
    const std::vector<SamplingParams> all(rows.size(), params);
    const auto out = sample_rows(rows, all, std::vector<std::vector<TokenId>>(rows.size()),
                                 std::vector<uint64_t>(rows.size(), 9), nullptr);
    EXPECT_EQ(out.sampled_token_ids[0], sample(plain, params, {}, 9));
    EXPECT_EQ(out.sampled_token_ids[1], 0);
    EXPECT_EQ(out.sampled_token_ids[2], 0);
    EXPECT_EQ(out.sampled_token_ids[3], 0);
    EXPECT_TRUE(out.sampled_token_ids[4] == 700 || temperature > 1.0f);
    EXPECT_EQ(out.sampled_token_ids[5], 800);
    for (const TokenLogprobs& entry : out.logprobs) {
      ASSERT_EQ(entry.logprobs.size(), 4u);
      for (float logprob : entry.logprobs) EXPECT_FALSE(std::isnan(logprob));
    }
    EXPECT_EQ(out.logprobs[5].rank, 1);
    EXPECT_FLOAT_EQ(out.logprobs[5].logprobs[0], -std::log(2.0f));
  }
}

TEST_F(SamplerTest, WhenAllIsForbiddenTheRawArgmaxIsTaken) {
  std::vector<float> logits{0.0f, 3.0f, 1.0f, 2.0f};
  eos_ = {1};
  SamplingParams params = greedy();
  params.min_tokens = 5;
  EXPECT_EQ(sample(logits, params), 3);
  params.allowed_token_ids = {1};
  EXPECT_EQ(sample(logits, params), 1);
  params.temperature = 1.0f;
  EXPECT_EQ(sample(logits, params), 1);
}

TEST_F(SamplerTest, SameTokensOnAnyNumberOfThreads) {
  std::vector<std::vector<float>> rows;
  std::vector<SamplingParams> params;
  std::vector<uint64_t> seeds;
  for (uint32_t i = 0; i < 17; ++i) {
    rows.push_back(random_logits(3000, i));
    SamplingParams p;
    p.temperature = i % 3 ? 1.5f : 0.0f;
    p.top_p = i % 4 ? 1.0f : 0.9f;
    p.top_k = i % 5 ? 0 : 40;
    p.frequency_penalty = i % 6 ? 0.0f : 0.5f;
    params.push_back(p);
    seeds.push_back(i);
  }
  const std::vector<std::vector<TokenId>> tokens(rows.size(), {1, 2, 3, 2});
  ThreadPool pool(3);
  const auto alone = sample_rows(rows, params, tokens, seeds, nullptr);
  const auto shared = sample_rows(rows, params, tokens, seeds, &pool);
  EXPECT_EQ(alone.sampled_token_ids, shared.sampled_token_ids);
}

// Samples of prompts, each prompt with one row of logits: as if each sample had a row of its own.
TEST_F(SamplerTest, RowsMayShareARowOfLogits) {
  const int32_t vocab_size = 1500;
  std::vector<SamplingParams> params(6);
  params[0].temperature = 0.0f;
  params[2].repetition_penalty = 1000.0f;
  params[3].top_p = 0.7f;
  params[3].logprobs = 3;
  params[4].logprobs = 0;
  params[5].allowed_token_ids = {7};
  std::vector<float> logits;
  for (uint32_t i = 0; i < params.size(); ++i) {
    const std::vector<float> row = random_logits(vocab_size, i, 1.0f);
    logits.insert(logits.end(), row.begin(), row.end());
  }
  logits[5 * vocab_size + 7] = -kInfinity;  // all is forbidden: the greatest raw logit
  logits[2 * vocab_size + 3] = 20.0f;       // certain for who has not had a 3
  const std::vector<float> before = logits;
  const std::vector<TokenId> tokens{1, 2, 3, 2};
  InputBatch batch;
  for (int32_t row = 0; row < 6; ++row) {
    for (uint64_t seed = 0; seed < 5; ++seed) {
      batch.sampling_rows.push_back({row, row, &params[row], tokens, 2, seed, eos_});
    }
    // The same logits after other tokens.
    batch.sampling_rows.push_back({row, row, &params[row], {tokens.data(), 2}, 2, 0, eos_});
  }
  const Matrix<const float> matrix(logits.data(), 6, vocab_size);
  ModelRunnerOutput expected;
  for (const SamplingRow& row : batch.sampling_rows) {
    InputBatch one;
    one.sampling_rows = {row};
    Sampler sampler(vocab_size);
    ModelRunnerOutput out;
    sampler.begin(one, &out);
    sampler.sample(matrix, 0, one, &out);
    expected.sampled_token_ids.push_back(out.sampled_token_ids[0]);
    expected.logprobs.push_back(out.logprobs.empty() ? TokenLogprobs() : out.logprobs[0]);
  }
  for (const int num_threads : {1, 2, 3, 5, 36}) {
    ThreadPool pool(num_threads);
    Sampler sampler(vocab_size, &pool);
    ModelRunnerOutput out;
    sampler.begin(batch, &out);
    sampler.sample(matrix, 0, batch, &out);
    EXPECT_EQ(out.sampled_token_ids, expected.sampled_token_ids);
    for (size_t i = 0; i < batch.sampling_rows.size(); ++i) {
      EXPECT_EQ(out.logprobs[i].token_ids, expected.logprobs[i].token_ids);
      EXPECT_EQ(out.logprobs[i].logprobs, expected.logprobs[i].logprobs);
      EXPECT_EQ(out.logprobs[i].rank, expected.logprobs[i].rank);
    }
  }
  EXPECT_EQ(logits, before);
  EXPECT_NE(expected.sampled_token_ids[6], expected.sampled_token_ids[7]) << "samples differ";
  EXPECT_NE(expected.sampled_token_ids[12], 3);
  EXPECT_EQ(expected.sampled_token_ids[17], 3);
}

TEST_F(SamplerTest, RowsOutOfOrderAreRefused) {
  const SamplingParams params = greedy();
  InputBatch batch;
  for (int32_t row : {1, 0}) batch.sampling_rows.push_back({row, row, &params, {}, 0, 0, {}});
  ModelRunnerOutput out;
  EXPECT_THROW(Sampler(10).begin(batch, &out), InvalidArgument);
}

TEST_F(SamplerTest, TokensOutsideTheVocabularyAreHarmless) {
  SamplingParams params = greedy();
  params.logprobs = 2;
  params.repetition_penalty = 1.5f;
  params.presence_penalty = 1.0f;
  params.min_tokens = 100;
  params.stop_token_ids = params.allowed_token_ids = {1, -7, 1 << 30};
  params.allowed_token_ids.push_back(2);
  params.logit_bias = {{-1, 1.0f}, {1 << 30, 1.0f}};
  eos_ = {1 << 30};
  EXPECT_EQ(sample({5.0f, 4.0f, 3.0f}, params, {-1, 1 << 30, 2}), 2);

  InputBatch batch;
  batch.prompt_logprob_rows = {{0, 0, 1, 1 << 30, 1}};
  std::vector<float> logits{1.0f, 2.0f};
  Sampler sampler(2);
  ModelRunnerOutput out;
  sampler.begin(batch, &out);
  sampler.sample({logits.data(), 1, 2}, 0, batch, &out);
  EXPECT_EQ(out.prompt_logprobs[0].logprobs[0], -kInfinity);
  EXPECT_EQ(out.prompt_logprobs[0].token_ids[1], 1);
}

TEST_F(SamplerTest, LogitsMayComeInParts) {
  const int32_t vocab_size = 200;
  const SamplingParams params = greedy();
  std::vector<float> logits = random_logits(5 * vocab_size, 11);
  InputBatch batch;
  for (int32_t row : {1, 2, 4}) batch.sampling_rows.push_back({row, row, &params, {}, 0, 0, {}});
  batch.prompt_logprob_rows = {{0, 0, 1, 7, 2}, {0, 3, 4, 8, 0}};
  Sampler sampler(vocab_size);
  ModelRunnerOutput whole, parts;
  sampler.begin(batch, &whole);
  sampler.sample({logits.data(), 5, vocab_size}, 0, batch, &whole);
  sampler.begin(batch, &parts);
  sampler.sample({logits.data(), 2, vocab_size}, 0, batch, &parts);
  sampler.sample({logits.data() + 2 * vocab_size, 3, vocab_size}, 2, batch, &parts);
  EXPECT_EQ(whole.sampled_token_ids, parts.sampled_token_ids);
  ASSERT_EQ(parts.prompt_logprobs.size(), 2u);
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(whole.prompt_logprobs[i].token_ids, parts.prompt_logprobs[i].token_ids);
    EXPECT_EQ(whole.prompt_logprobs[i].logprobs, parts.prompt_logprobs[i].logprobs);
  }
  EXPECT_EQ(parts.prompt_logprobs[0].token_ids.size(), 3u);
  EXPECT_EQ(parts.prompt_logprobs[1].token_ids.size(), 1u);
  EXPECT_TRUE(whole.logprobs.empty());
}

TEST(SamplingParamsTest, MessagesNameTheFieldAndTheValue) {
  const auto message = [](auto change) {
    SamplingParams params;
    change(params);
    try {
      params.validate(49152);
    } catch (const InvalidArgument& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  EXPECT_EQ(message([](SamplingParams&) {}), "");
  EXPECT_EQ(message([](SamplingParams& p) { p.temperature = -1; }),
            "temperature must be >= 0, got -1");
  EXPECT_EQ(message([](SamplingParams& p) { p.temperature = kNan; }),
            "temperature must be >= 0, got nan");
  EXPECT_EQ(message([](SamplingParams& p) { p.top_p = 0; }), "top_p must be in (0, 1], got 0");
  EXPECT_EQ(message([](SamplingParams& p) { p.min_p = 1.1f; }), "min_p must be in [0, 1], got 1.1");
  EXPECT_EQ(message([](SamplingParams& p) { p.n = 1000000000; }),
            "n must be between 1 and 1024, got 1000000000");
  EXPECT_EQ(message([](SamplingParams& p) { p.stop_token_ids = {70000}; }),
            "stop_token_ids: token id 70000 is outside the vocabulary of 49152");
  EXPECT_EQ(message([](SamplingParams& p) { p.bad_words = {{1}, {}}; }),
            "bad_words must not contain an empty sequence");
}

}  // namespace
}  // namespace fastpage
