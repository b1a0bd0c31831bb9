#include "core/sampling/logits_processors.h"

#include <algorithm>
#include <limits>

namespace fastpage::sampling {

namespace {

constexpr float kForbidden = -std::numeric_limits<float>::infinity();

Span<const TokenId> output_of(const SamplingRow& row) {
  return row.tokens.subspan(row.num_prompt_tokens, row.num_output_tokens());
}

bool below_min_tokens(const SamplingRow& row) {
  return row.num_output_tokens() < row.params->min_tokens;
}

// Ids outside the vocabulary have no logit and are passed over: a Scheduler without an Engine lets
// them through.
template <typename Fn>
void for_each_logit(Span<float> logits, Span<const TokenId> tokens, Fn fn) {
  for (TokenId token : tokens) {
    if (static_cast<size_t>(token) < logits.size()) fn(logits[token], token);
  }
}

void allow_only(Span<float> logits, Span<const TokenId> allowed, Scratch* scratch) {
  float* kept = scratch->values.data();
  for_each_logit(logits, allowed, [&](float& logit, TokenId token) { kept[token] = logit; });
  std::fill(logits.begin(), logits.end(), kForbidden);
  for_each_logit(logits, allowed, [&](float& logit, TokenId token) { logit = kept[token]; });
}

bool ends_with(Span<const TokenId> tokens, Span<const TokenId> suffix) {
  return tokens.size() >= suffix.size() &&
         std::equal(suffix.begin(), suffix.end(), tokens.end() - suffix.size());
}

void penalize(Span<float> logits, const SamplingRow& row, Scratch* scratch) {
  const SamplingParams& params = *row.params;
  int32_t* counts = scratch->counts.data();
  // Every token is penalized once, however often it occurs; its mark says that it has been.
  const auto repeated = [&](float& logit, TokenId token) {
    if (counts[token]++ > 0) return;
    logit = logit > 0.0f ? logit / params.repetition_penalty : logit * params.repetition_penalty;
  };
  const auto clear = [&](float&, TokenId token) { counts[token] = 0; };
  if (params.repetition_penalty != 1.0f) {
    for_each_logit(logits, row.tokens, repeated);
    for_each_logit(logits, row.tokens, clear);
  }
  if (params.frequency_penalty != 0.0f || params.presence_penalty != 0.0f) {
    const Span<const TokenId> output = output_of(row);
    for_each_logit(logits, output, [&](float&, TokenId token) { ++counts[token]; });
    for_each_logit(logits, output, [&](float& logit, TokenId token) {
      if (counts[token] == 0) return;
      logit -= params.frequency_penalty * static_cast<float>(counts[token]);
      logit -= params.presence_penalty;
      counts[token] = 0;
    });
  }
}

}  // namespace

bool needs_processing(const SamplingRow& row) {
  const SamplingParams& params = *row.params;
  return !params.allowed_token_ids.empty() || forbids_tokens(row) || !params.logit_bias.empty() ||
         params.has_penalties();
}

bool forbids_tokens(const SamplingRow& row) {
  return !row.params->bad_words.empty() || below_min_tokens(row);
}

void for_each_forbidden(const SamplingRow& row, const std::function<void(TokenId)>& fn) {
  const SamplingParams& params = *row.params;
  for (const std::vector<TokenId>& word : params.bad_words) {
    const Span<const TokenId> prefix(word.data(), word.size() - 1);
    if (ends_with(output_of(row), prefix)) fn(word.back());
  }
  if (!below_min_tokens(row)) return;
  for (const TokenId token : row.eos_token_ids) fn(token);
  for (const TokenId token : params.stop_token_ids) fn(token);
}

void process_logits(Span<float> logits, const SamplingRow& row, Scratch* scratch) {
  const SamplingParams& params = *row.params;
  if (!params.allowed_token_ids.empty()) allow_only(logits, params.allowed_token_ids, scratch);
  for_each_forbidden(row, [&](TokenId token) {
    for_each_logit(logits, {&token, 1}, [](float& logit, TokenId) { logit = kForbidden; });
  });
  for (const auto& pair : params.logit_bias) {
    for_each_logit(logits, {&pair.first, 1}, [&](float& logit, TokenId) { logit += pair.second; });
  }
  if (params.has_penalties()) penalize(logits, row, scratch);
}

}  // namespace fastpage::sampling
