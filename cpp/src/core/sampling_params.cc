#include "fastpage/sampling_params.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace fastpage {

namespace {

// The shortest decimal that reads back as the same float: 0.1, not 0.100000001.
std::string to_text(float value) {
  char text[32];
  for (int digits = 6; digits <= 9; ++digits) {
    std::snprintf(text, sizeof(text), "%.*g", digits, static_cast<double>(value));
    if (std::strtof(text, nullptr) == value) break;
  }
  return text;
}

std::string to_text(int32_t value) { return std::to_string(value); }

template <typename T>
void require(bool ok, const char* field, const std::string& rule, T value) {
  if (!ok)
    throw InvalidArgument(std::string(field) + " must be " + rule + ", got " + to_text(value));
}

void require_token(TokenId token, const char* field, int32_t vocab_size) {
  if (token >= 0 && token < vocab_size) return;
  throw InvalidArgument("token id " + std::to_string(token) + " in " + field +
                        " is outside the vocabulary of " + std::to_string(vocab_size));
}

void require_tokens(const std::vector<TokenId>& tokens, const char* field, int32_t vocab_size) {
  for (TokenId token : tokens) require_token(token, field, vocab_size);
}

}  // namespace

// Comparisons are written so that a NaN fails them.
void SamplingParams::validate(int32_t vocab_size) const {
  require(n >= 1 && n <= kMaxN, "n", "between 1 and " + std::to_string(kMaxN), n);
  require(temperature >= 0.0f, "temperature", ">= 0", temperature);
  require(std::isfinite(temperature), "temperature", "finite", temperature);
  require(top_p > 0.0f && top_p <= 1.0f, "top_p", "in (0, 1]", top_p);
  require(top_k >= -1, "top_k", ">= 1, or 0 or -1 for all tokens", top_k);
  require(min_p >= 0.0f && min_p <= 1.0f, "min_p", "in [0, 1]", min_p);
  require(repetition_penalty > 0.0f, "repetition_penalty", "> 0", repetition_penalty);
  require(std::isfinite(repetition_penalty), "repetition_penalty", "finite", repetition_penalty);
  require(presence_penalty >= -2.0f && presence_penalty <= 2.0f, "presence_penalty", "in [-2, 2]",
          presence_penalty);
  require(frequency_penalty >= -2.0f && frequency_penalty <= 2.0f, "frequency_penalty",
          "in [-2, 2]", frequency_penalty);
  for (const auto& [token, bias] : logit_bias) {
    require_token(token, "logit_bias", vocab_size);
    require(std::isfinite(bias), "logit_bias", "finite", bias);
  }
  require_tokens(allowed_token_ids, "allowed_token_ids", vocab_size);
  for (const auto& word : bad_words) {
    if (word.empty()) throw InvalidArgument("bad_words must not contain an empty sequence");
    require_tokens(word, "bad_words", vocab_size);
  }
  require(max_tokens >= 1 || max_tokens == kUntilMaxModelLen, "max_tokens", ">= 1", max_tokens);
  require(min_tokens >= 0, "min_tokens", ">= 0", min_tokens);
  require(max_tokens == kUntilMaxModelLen || min_tokens <= max_tokens, "min_tokens",
          "at most max_tokens (" + std::to_string(max_tokens) + ")", min_tokens);
  require_tokens(stop_token_ids, "stop_token_ids", vocab_size);
  const std::string logprobs_rule = "between 0 and " + std::to_string(kMaxLogprobs);
  require(logprobs >= kNoLogprobs && logprobs <= kMaxLogprobs, "logprobs", logprobs_rule, logprobs);
  require(prompt_logprobs >= kNoLogprobs && prompt_logprobs <= kMaxLogprobs, "prompt_logprobs",
          logprobs_rule, prompt_logprobs);
}

}  // namespace fastpage
