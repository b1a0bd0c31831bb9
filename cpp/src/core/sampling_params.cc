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
  const std::string named = std::string(field) + ": token id " + std::to_string(token);
  if (token < 0) throw InvalidArgument(named + " is negative");
  throw InvalidArgument(named + " is outside the vocabulary of " + std::to_string(vocab_size));
}

void require_tokens(const std::vector<TokenId>& tokens, const char* field, int32_t vocab_size) {
  for (TokenId token : tokens) require_token(token, field, vocab_size);
}

void forbid(bool wrong, const std::string& field, const std::string& remedy) {
  if (!wrong) return;
  throw InvalidArgument(field + " does not go with beam search: " + remedy +
                        ", or set beam_width to 0");
}

template <typename T>
void forbid_change(const char* field, T value, T neutral) {
  forbid(!(value == neutral), std::string(field) + "=" + to_text(value),
         "leave it at " + to_text(neutral));
}

// Beam search looks at the model's own probabilities, and at nothing else.
void validate_beam_search(const SamplingParams& p, int32_t vocab_size) {
  const std::string width = "beam_width (" + to_text(p.beam_width) + ")";
  require(p.n <= p.beam_width, "n", "at most " + width, p.n);
  require(p.beam_width <= vocab_size, "beam_width",
          "at most the vocabulary of " + to_text(vocab_size), p.beam_width);
  const auto num_stops = static_cast<int32_t>(p.stop_token_ids.size());
  require(num_stops <= SamplingParams::kMaxLogprobs - p.beam_width, "number of stop_token_ids",
          "at most " + to_text(SamplingParams::kMaxLogprobs) + " - " + width, num_stops);
  require(std::isfinite(p.length_penalty), "length_penalty", "finite", p.length_penalty);
  forbid(p.best_of != 0, "best_of=" + to_text(p.best_of), "leave it at 0");
  forbid(p.temperature != 0.0f && p.temperature != 1.0f, "temperature=" + to_text(p.temperature),
         "leave it at 1 or 0 (it is deterministic anyhow)");
  forbid_change("top_p", p.top_p, 1.0f);
  forbid(p.top_k > 0, "top_k=" + to_text(p.top_k), "leave it at 0");
  forbid_change("min_p", p.min_p, 0.0f);
  forbid_change("repetition_penalty", p.repetition_penalty, 1.0f);
  forbid_change("presence_penalty", p.presence_penalty, 0.0f);
  forbid_change("frequency_penalty", p.frequency_penalty, 0.0f);
  forbid(!p.logit_bias.empty(), "logit_bias", "leave it empty");
  forbid(!p.allowed_token_ids.empty(), "allowed_token_ids", "leave it empty");
  forbid(!p.bad_words.empty(), "bad_words", "leave it empty");
  forbid(p.logprobs != SamplingParams::kNoLogprobs, "logprobs=" + to_text(p.logprobs),
         "leave it unset (each output has its score)");
  forbid(p.prompt_logprobs != SamplingParams::kNoLogprobs,
         "prompt_logprobs=" + to_text(p.prompt_logprobs), "leave it unset");
}

// What says nothing without beam search is a mistake there.
void validate_no_beam_search(const SamplingParams& p) {
  if (p.length_penalty != 1.0f) {
    throw InvalidArgument("length_penalty=" + to_text(p.length_penalty) +
                          " needs beam search: set beam_width, or leave it at 1");
  }
  if (p.early_stopping != EarlyStopping::kNo) {
    throw InvalidArgument("early_stopping needs beam search: set beam_width, or leave it at False");
  }
}

}  // namespace

// Comparisons are written so that a NaN fails them.
void SamplingParams::validate(int32_t vocab_size) const {
  require(n >= 1 && n <= kMaxN, "n", "between 1 and " + std::to_string(kMaxN), n);
  require(best_of == 0 || (best_of >= n && best_of <= kMaxN), "best_of",
          "between n (" + std::to_string(n) + ") and " + std::to_string(kMaxN) + ", or 0 for n",
          best_of);
  require(beam_width >= 0 && beam_width <= kMaxBeamWidth, "beam_width",
          "between n and " + to_text(kMaxBeamWidth) + ", or 0 for no beam search", beam_width);
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
  if (beam_width > 0) {
    validate_beam_search(*this, vocab_size);
  } else {
    validate_no_beam_search(*this);
    if (best_of > n && greedy()) {
      throw InvalidArgument(
          "best_of=" + std::to_string(best_of) + " with temperature=0 draws " +
          "the same output again and again: set temperature > 0, or best_of to 0");
    }
  }
}

}  // namespace fastpage
