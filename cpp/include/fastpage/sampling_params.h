// How the tokens of one request are chosen, and when it ends. Names and defaults are vLLM's.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "fastpage/types.h"

namespace fastpage {

// When beam search stops looking for better beams (the names and rules are transformers').
enum class EarlyStopping : uint8_t {
  kNo,     // once the best running beam, were it to end now, could not get among the finished ones
  kYes,    // once beam_width beams are finished
  kNever,  // only when no running beam can get among the finished ones, however long it grows
};

struct SamplingParams {
  static constexpr int32_t kUntilMaxModelLen = -1;
  static constexpr int32_t kNoLogprobs = -1;

  int32_t n = 1;                    // samples of the same prompt, 1..kMaxN
  int32_t best_of = 0;              // draw that many (>= n), return the n most likely; 0 = n
  float temperature = 1.0f;         // 0 = greedy
  float top_p = 1.0f;               // (0, 1]
  int32_t top_k = 0;                // 0 or -1 = all
  float min_p = 0.0f;               // [0, 1], relative to the most likely token
  float repetition_penalty = 1.0f;  // > 0; prompt and output tokens
  float presence_penalty = 0.0f;    // [-2, 2]; output tokens
  float frequency_penalty = 0.0f;   // [-2, 2]; output tokens
  std::vector<std::pair<TokenId, float>> logit_bias;
  std::vector<TokenId> allowed_token_ids;       // empty = every token
  std::vector<std::vector<TokenId>> bad_words;  // token sequences that must not appear
  int32_t max_tokens = 16;                      // >= 1, or kUntilMaxModelLen
  int32_t min_tokens = 0;                       // no EOS or stop token before that many
  std::vector<TokenId> stop_token_ids;
  bool ignore_eos = false;
  std::optional<uint64_t> seed;           // unset: the engine gives each request one of its own
  int32_t logprobs = kNoLogprobs;         // 0 = the chosen token's only; k = and the k most likely
  int32_t prompt_logprobs = kNoLogprobs;  // the same for the prompt's tokens

  // Beam search (deterministic: temperature must be 0, or 1, its default, and nothing else may
  // change the logits; no logprobs) keeps beam_width beams and returns the n best; 0 = no beam
  // search. Without it the other two must be left as they are.
  int32_t beam_width = 0;       // 0, or n..kMaxBeamWidth
  float length_penalty = 1.0f;  // score = sum of logprobs / num_output_tokens ^ length_penalty
  EarlyStopping early_stopping = EarlyStopping::kNo;

  static constexpr int32_t kMaxN = 1024;
  static constexpr int32_t kMaxBeamWidth = 64;
  static constexpr int32_t kMaxLogprobs = 1024;

  // Sequences that are computed for a request.
  int32_t num_samples() const { return beam_width > 0 ? beam_width : best_of > n ? best_of : n; }
  bool greedy() const { return temperature == 0.0f; }
  bool has_penalties() const {
    return repetition_penalty != 1.0f || presence_penalty != 0.0f || frequency_penalty != 0.0f;
  }

  // Throws InvalidArgument that names the field, its value and what is allowed (NaN is never
  // allowed). vocab_size bounds every token id.
  void validate(int32_t vocab_size) const;
};

}  // namespace fastpage
