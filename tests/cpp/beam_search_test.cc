// BeamSearch against what transformers' beam search returned for the same model (recorded cases),
// and what those cannot show: rows of other runners, vocabularies too small, stop reasons.
#include "core/beam_search.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "beam_search_cases.h"

namespace fastpage {
namespace {

constexpr int32_t kVocabSize = 40;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

using Tokens = std::vector<TokenId>;
// Logprobs of every token behind prompt + output.
using Model = std::function<std::vector<float>(const Tokens& tokens)>;

// The k most likely tokens behind an entry that must not be looked at.
TokenLogprobs candidates_of(const std::vector<float>& logprobs, int32_t k) {
  Tokens order(logprobs.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](TokenId a, TokenId b) { return logprobs[a] > logprobs[b]; });
  TokenLogprobs row;
  row.token_ids.push_back(order.back());
  row.logprobs.push_back(1e6f);
  for (int32_t i = 0; i < std::min<int32_t>(k, order.size()); ++i) {
    row.token_ids.push_back(order[i]);
    row.logprobs.push_back(logprobs[order[i]]);
  }
  return row;
}

struct Result {
  std::vector<BeamHypothesis> best;
  int32_t num_steps = 0;
};

Result search(const SamplingParams& params, const Tokens& prompt, const Model& model,
              Span<const TokenId> eos_token_ids = {}) {
  const auto num_prompt_tokens = static_cast<int32_t>(prompt.size());
  BeamSearch beam_search(params, eos_token_ids, num_prompt_tokens,
                         num_prompt_tokens + params.max_tokens);
  std::vector<Tokens> outputs(1);
  Result result;
  while (!outputs.empty()) {
    std::vector<Span<const TokenId>> views(outputs.begin(), outputs.end());
    std::vector<TokenLogprobs> rows;
    for (const Tokens& output : outputs) {
      Tokens tokens = prompt;
      tokens.insert(tokens.end(), output.begin(), output.end());
      rows.push_back(candidates_of(model(tokens), beam_search.num_candidates()));
    }
    std::vector<Tokens> next;
    for (const BeamContinuation& beam : beam_search.step(views, rows)) {
      next.push_back(outputs[beam.parent]);
      next.back().push_back(beam.token);
    }
    outputs = std::move(next);
    if (++result.num_steps > params.max_tokens) {
      ADD_FAILURE() << "goes on behind max_tokens";
      break;
    }
  }
  result.best = beam_search.best(params.n);
  return result;
}

SamplingParams beam_params(int32_t beam_width, int32_t max_tokens) {
  SamplingParams params;
  params.n = params.beam_width = beam_width;
  params.max_tokens = max_tokens;
  return params;
}

// ---- the recorded cases

uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

std::vector<float> hash_logits(const BeamSearchCase& c, const Tokens& tokens) {
  uint64_t state = c.seed;
  for (TokenId token : tokens) state = mix(state + token + 1);
  std::vector<float> logits(kVocabSize);
  for (TokenId token = 0; token < kVocabSize; ++token) {
    const uint64_t bits = mix(state + token + 1) >> 40;
    logits[token] = c.levels ? -static_cast<float>(bits % c.levels + 1) / 4
                             : static_cast<float>(bits) / (1 << 21);
  }
  for (TokenId token : c.stop_token_ids) logits[token] += c.stop_logit;
  return logits;
}

std::vector<float> log_softmax(std::vector<float> logits) {
  double sum = 0;
  for (float logit : logits) sum += std::exp(static_cast<double>(logit));
  for (float& logit : logits) logit = static_cast<float>(logit - std::log(sum));
  return logits;
}

SamplingParams params_of(const BeamSearchCase& c) {
  SamplingParams params = beam_params(c.beam_width, c.max_tokens);
  params.length_penalty = c.length_penalty;
  params.early_stopping = c.early_stopping;
  params.min_tokens = c.min_tokens;
  params.stop_token_ids = c.stop_token_ids;
  return params;
}

void expect_recorded(const BeamSearchCase& c, const std::vector<BeamHypothesis>& best) {
  ASSERT_LE(best.size(), c.expected.size());
  for (size_t i = 0; i < best.size(); ++i) {
    EXPECT_EQ(best[i].token_ids, c.expected[i].token_ids) << "hypothesis " << i;
    EXPECT_NEAR(best[i].score, c.expected[i].score, 1e-5) << "hypothesis " << i;
    const TokenId last = best[i].token_ids.back();
    const auto& stops = c.stop_token_ids;
    const bool stopped = std::find(stops.begin(), stops.end(), last) != stops.end();
    EXPECT_EQ(best[i].finish_reason, stopped ? FinishReason::kStop : FinishReason::kLength);
    EXPECT_EQ(best[i].stop_token_id, stopped ? last : -1);
  }
}

TEST(BeamSearch, SameHypothesesAndScoresAsTransformers) {
  int num_ended_early = 0;
  for (size_t i = 0; i < beam_search_cases().size(); ++i) {
    SCOPED_TRACE("case " + std::to_string(i));
    const BeamSearchCase& c = beam_search_cases()[i];
    const Model model = [&](const Tokens& tokens) {
      return c.levels ? hash_logits(c, tokens) : log_softmax(hash_logits(c, tokens));
    };
    for (int32_t n = 1; n <= c.beam_width; n += std::max(c.beam_width - 1, 1)) {
      SamplingParams params = params_of(c);
      params.n = n;
      const Result result = search(params, c.prompt_token_ids, model);
      ASSERT_EQ(result.best.size(), static_cast<size_t>(n));
      expect_recorded(c, result.best);
      num_ended_early += n == 1 && result.num_steps < c.max_tokens;
    }
  }
  // Else the rules about the end would not have been looked at.
  EXPECT_GE(num_ended_early, 30);
}

// EOS tokens are stop tokens unless ignore_eos says otherwise; each counts once.
TEST(BeamSearch, EosTokens) {
  for (const BeamSearchCase& c : beam_search_cases()) {
    if (c.stop_token_ids.size() < 2) continue;
    const Model model = [&](const Tokens& tokens) {
      return c.levels ? hash_logits(c, tokens) : log_softmax(hash_logits(c, tokens));
    };
    const Tokens eos_token_ids = c.stop_token_ids;
    SamplingParams params = params_of(c);
    params.stop_token_ids = {eos_token_ids[0]};
    expect_recorded(c, search(params, c.prompt_token_ids, model, eos_token_ids).best);
    params.stop_token_ids = eos_token_ids;
    params.ignore_eos = true;
    const Tokens others = {0, 1, 2, 3};
    expect_recorded(c, search(params, c.prompt_token_ids, model, others).best);
  }
}

TEST(BeamSearch, NumberOfCandidates) {
  SamplingParams params = beam_params(4, 8);
  params.stop_token_ids = {7, 9, 7};
  const Tokens eos_token_ids = {9, 11};
  EXPECT_EQ(BeamSearch(params, eos_token_ids, 3, 11).num_candidates(), 4 + 3);
  params.ignore_eos = true;
  EXPECT_EQ(BeamSearch(params, eos_token_ids, 3, 11).num_candidates(), 4 + 2);
}

// ---- what no recorded case shows

// kNever looks ahead to where the score would be best: a negative penalty makes it worse with every
// token. Looking ahead to max_tokens the search would end before it finds {1, 1, 0}.
TEST(BeamSearch, NeverWithNegativeLengthPenalty) {
  const Model model = [&](const Tokens& tokens) -> std::vector<float> {
    if (tokens == Tokens{2}) return {-1.0f, -0.125f, -20.0f};
    if (tokens == Tokens{2, 1}) return {-0.0625f, -0.125f, -20.0f};
    if (tokens == Tokens{2, 1, 1}) return {-0.0625f, -20.0f, -20.0f};
    return {-20.0f, -20.0f, -20.0f};
  };
  SamplingParams params = beam_params(2, 10);
  params.length_penalty = -1.0f;
  params.early_stopping = EarlyStopping::kNever;
  params.stop_token_ids = {0};
  const Result result = search(params, {2}, model);
  EXPECT_EQ(result.num_steps, 3);
  EXPECT_EQ(result.best[0].token_ids, (Tokens{1, 0}));
  EXPECT_EQ(result.best[0].score, -0.1875f * 2);
  EXPECT_EQ(result.best[1].token_ids, (Tokens{1, 1, 0}));
  EXPECT_EQ(result.best[1].score, -0.3125f * 3);
}

// A running beam that is only as good as the worst finished one is no reason to go on.
TEST(BeamSearch, EqualIsNotBetter) {
  const Model model = [&](const Tokens& tokens) -> std::vector<float> {
    if (tokens == Tokens{2}) return {-0.5f, -0.5f, -20.0f};
    return {-0.125f, -20.0f, -20.0f};
  };
  SamplingParams params = beam_params(1, 10);
  params.stop_token_ids = {0};
  const Result result = search(params, {2}, model);
  EXPECT_EQ(result.num_steps, 1);
  EXPECT_EQ(result.best[0].token_ids, Tokens{0});
}

// The widest search there can be over 3 tokens finds all 9 outputs of length 2, in their order.
TEST(BeamSearch, TinyVocabulary) {
  const std::vector<float> logprobs = {-0.5f, -1.25f, -2.0f};
  const Model model = [&](const Tokens&) { return logprobs; };
  const Result result = search(beam_params(9, 2), {0}, model);
  EXPECT_EQ(result.num_steps, 2);
  std::vector<Tokens> outputs;
  for (const BeamHypothesis& h : result.best) {
    outputs.push_back(h.token_ids);
    EXPECT_EQ(h.score, (logprobs[h.token_ids[0]] + logprobs[h.token_ids[1]]) / 2);
  }
  EXPECT_EQ(outputs, (std::vector<Tokens>{
                         {0, 0}, {0, 1}, {1, 0}, {0, 2}, {1, 1}, {2, 0}, {1, 2}, {2, 1}, {2, 2}}));
}

TEST(BeamSearch, FewerHypothesesThanAskedFor) {
  const Model model = [&](const Tokens&) { return std::vector<float>{-0.5f, -1.0f}; };
  const Result result = search(beam_params(4, 1), {0}, model);
  ASSERT_EQ(result.best.size(), 4u);
  EXPECT_EQ(result.best[0].token_ids, Tokens{0});
  for (int i = 1; i < 4; ++i) EXPECT_EQ(result.best[i].token_ids, Tokens{1});
}

TEST(BeamSearch, NothingButStopTokens) {
  const Model model = [&](const Tokens&) { return std::vector<float>{-0.5f, -1.0f}; };
  SamplingParams params = beam_params(2, 8);
  params.min_tokens = 4;
  params.stop_token_ids = {0, 1};
  const Result result = search(params, {0}, model);
  EXPECT_EQ(result.num_steps, 1);
  EXPECT_EQ(result.best[0].token_ids, Tokens{0});
  EXPECT_EQ(result.best[0].stop_token_id, 0);
  EXPECT_EQ(result.best[1].token_ids, Tokens{1});
}

// Whatever a runner brings, the search ends, with an order among what it found.
TEST(BeamSearch, LogprobsThatAreNone) {
  for (float odd : {-kInfinity, std::numeric_limits<float>::quiet_NaN(), 0.0f}) {
    for (float length_penalty : {0.0f, 1.0f, -300.0f, 300.0f}) {
      const Model model = [&](const Tokens&) { return std::vector<float>(kVocabSize, odd); };
      SamplingParams params = beam_params(3, 8);
      params.length_penalty = length_penalty;
      params.stop_token_ids = {kVocabSize - 1};
      const Result result = search(params, {0}, model);
      ASSERT_EQ(result.best.size(), 3u);
      for (const BeamHypothesis& h : result.best) {
        EXPECT_EQ(h.token_ids.size(), 8u);
        EXPECT_FALSE(std::isnan(h.score));
      }
    }
  }
}

}  // namespace
}  // namespace fastpage
