// A step's sampling rows as arrays: what a sampler on a device takes, which can follow no pointers.
#pragma once

#include <utility>
#include <vector>

#include "fastpage/input_batch.h"

namespace fastpage {

struct SamplingArrays {
  // One for each of the batch's sampling_rows.
  std::vector<int32_t> logits_rows;
  std::vector<float> temperature;
  std::vector<int32_t> top_k;  // 0 = all
  std::vector<float> top_p;
  std::vector<float> min_p;
  std::vector<int64_t> seeds;      // the bits of a uint64
  std::vector<int64_t> positions;  // tokens before the one to be drawn: the draw's counter
  std::vector<int32_t> num_logprobs;

  // What changes logits, in this order: each of the three is empty unless a row needs it. Tokens
  // outside the vocabulary have no logit and are to be passed over.
  std::vector<int32_t> allowed;  // [rows][(vocab_size + 31) / 32]: a bit for each token
  // Added: those of row i are [bias_start[i], bias_start[i + 1]), no token twice; -inf for tokens
  // that bad_words and min_tokens forbid.
  std::vector<int32_t> bias_start;  // [rows + 1]
  std::vector<int32_t> bias_ids;
  std::vector<float> bias;
  // Penalties: tokens of row i are [token_start[i], token_start[i + 1]), the first
  // num_prompt_tokens[i] of them the prompt's; none where nothing is penalized.
  std::vector<int32_t> token_start;  // [rows + 1]
  std::vector<int32_t> tokens;
  std::vector<int32_t> num_prompt_tokens;
  std::vector<float> repetition_penalty;
  std::vector<float> frequency_penalty;
  std::vector<float> presence_penalty;

  // One for each of the batch's prompt_logprob_rows.
  std::vector<int32_t> prompt_logits_rows;
  std::vector<int32_t> prompt_tokens;
  std::vector<int32_t> prompt_num_logprobs;

  // Sampling rows that the arrays cannot say: the Sampler's to sample, and why, naming the
  // parameter. In the arrays they are greedy and nothing changes their logits.
  std::vector<std::pair<int32_t, const char*>> unsupported;
};

// Whether any row's arrays depend on the values of its tokens (penalties, bad_words), and not on
// their number alone. Then the batch's future tokens have to be resolved before.
bool reads_tokens(const InputBatch& batch);

// vocab_size: of the logits.
SamplingArrays sampling_arrays(const InputBatch& batch, int32_t vocab_size);

}  // namespace fastpage
