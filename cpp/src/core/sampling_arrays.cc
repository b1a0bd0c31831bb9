#include "fastpage/sampling_arrays.h"

#include <algorithm>
#include <limits>

#include "core/sampling/logits_processors.h"

namespace fastpage {

namespace {

constexpr float kForbidden = -std::numeric_limits<float>::infinity();

template <typename Row, typename Fn>
bool any(const std::vector<Row>& rows, Fn fn) {
  return std::any_of(rows.begin(), rows.end(), fn);
}

bool has_bias(const SamplingRow& row) {
  return !row.params->logit_bias.empty() || sampling::forbids_tokens(row);
}

bool names_a_token_twice(const SamplingRow& row) {
  std::vector<TokenId> ids;
  for (const auto& [token, bias] : row.params->logit_bias) ids.push_back(token);
  std::sort(ids.begin(), ids.end());
  return std::adjacent_find(ids.begin(), ids.end()) != ids.end();
}

// The others' order of additions, and so their sums' last bits, would be the device's own.
const char* why_unsupported(const SamplingRow& row) {
  return names_a_token_twice(row) ? "logit_bias names a token twice" : nullptr;
}

// What is done to the logits of a row that is not supported, and of one that asks for nothing.
const SamplingParams& nothing_asked() {
  static const SamplingParams params = [] {
    SamplingParams p;
    p.temperature = 0.0f;
    return p;
  }();
  return params;
}

void lay_out_draw(const SamplingRow& row, SamplingArrays* a) {
  const SamplingParams& p = *row.params;
  a->logits_rows.push_back(row.logits_row);
  a->temperature.push_back(p.temperature);
  a->top_k.push_back(std::max(p.top_k, 0));
  a->top_p.push_back(p.top_p);
  a->min_p.push_back(p.min_p);
  a->seeds.push_back(static_cast<int64_t>(row.seed));
  a->positions.push_back(static_cast<int64_t>(row.tokens.size()));
}

void lay_out_allowed(const SamplingRow& row, int32_t vocab_size, SamplingArrays* a) {
  const std::vector<TokenId>& allowed = row.params->allowed_token_ids;
  const size_t words = (static_cast<size_t>(vocab_size) + 31) / 32;
  const size_t begin = a->allowed.size();
  a->allowed.resize(begin + words, allowed.empty() ? -1 : 0);
  for (const TokenId token : allowed) {
    if (token < 0 || token >= vocab_size) continue;
    auto& word = a->allowed[begin + static_cast<size_t>(token) / 32];
    word = static_cast<int32_t>(static_cast<uint32_t>(word) | 1u << (token % 32));
  }
}

void lay_out_bias(const SamplingRow& row, SamplingArrays* a) {
  std::vector<TokenId> forbidden;
  sampling::for_each_forbidden(row, [&](TokenId token) { forbidden.push_back(token); });
  std::sort(forbidden.begin(), forbidden.end());
  forbidden.erase(std::unique(forbidden.begin(), forbidden.end()), forbidden.end());
  for (const TokenId token : forbidden) {
    a->bias_ids.push_back(token);
    a->bias.push_back(kForbidden);
  }
  for (const auto& [token, bias] : row.params->logit_bias) {
    if (std::binary_search(forbidden.begin(), forbidden.end(), token)) continue;
    a->bias_ids.push_back(token);
    a->bias.push_back(bias);
  }
  a->bias_start.push_back(static_cast<int32_t>(a->bias_ids.size()));
}

void lay_out_penalties(const SamplingRow& row, SamplingArrays* a) {
  const SamplingParams& p = *row.params;
  int32_t num_prompt = 0;
  if (p.has_penalties()) {
    // Of the prompt's tokens only repetition_penalty speaks.
    num_prompt = p.repetition_penalty != 1.0f ? row.num_prompt_tokens : 0;
    const TokenId* const output = row.tokens.begin() + row.num_prompt_tokens;
    a->tokens.insert(a->tokens.end(), output - num_prompt, row.tokens.end());
  }
  a->token_start.push_back(static_cast<int32_t>(a->tokens.size()));
  a->num_prompt_tokens.push_back(num_prompt);
  a->repetition_penalty.push_back(p.repetition_penalty);
  a->frequency_penalty.push_back(p.frequency_penalty);
  a->presence_penalty.push_back(p.presence_penalty);
}

}  // namespace

bool reads_tokens(const InputBatch& batch) {
  return any(batch.sampling_rows, [](const SamplingRow& row) {
    return row.params->has_penalties() || !row.params->bad_words.empty();
  });
}

SamplingArrays sampling_arrays(const InputBatch& batch, int32_t vocab_size) {
  SamplingArrays a;
  std::vector<SamplingRow> rows = batch.sampling_rows;
  for (size_t i = 0; i < rows.size(); ++i) {
    a.num_logprobs.push_back(rows[i].params->logprobs);
    if (const char* const reason = why_unsupported(rows[i])) {
      a.unsupported.emplace_back(static_cast<int32_t>(i), reason);
      rows[i].params = &nothing_asked();
    }
  }
  const bool any_allowed =
      any(rows, [](const SamplingRow& row) { return !row.params->allowed_token_ids.empty(); });
  const bool any_bias = any(rows, has_bias);
  const bool any_penalties =
      any(rows, [](const SamplingRow& row) { return row.params->has_penalties(); });
  if (any_bias) a.bias_start.push_back(0);
  if (any_penalties) a.token_start.push_back(0);
  for (const SamplingRow& row : rows) {
    lay_out_draw(row, &a);
    if (any_allowed) lay_out_allowed(row, vocab_size, &a);
    if (any_bias) lay_out_bias(row, &a);
    if (any_penalties) lay_out_penalties(row, &a);
  }
  for (const PromptLogprobRow& row : batch.prompt_logprob_rows) {
    a.prompt_logits_rows.push_back(row.logits_row);
    a.prompt_tokens.push_back(row.token);
    a.prompt_num_logprobs.push_back(row.num_logprobs);
  }
  return a;
}

}  // namespace fastpage
