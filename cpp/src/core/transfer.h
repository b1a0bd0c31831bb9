// The fields of what both the log of a scheduler's calls and the engine channel transfer.
#pragma once

#include "core/archive.h"
#include "fastpage/input_batch.h"
#include "fastpage/sampling_params.h"

namespace fastpage {

template <>
inline constexpr EarlyStopping kLastOf<EarlyStopping> = EarlyStopping::kNever;

template <typename Archive>
void transfer(Archive& archive, SamplingParams& params) {
  auto& [n, best_of, temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty,
         frequency_penalty, logit_bias, allowed_token_ids, bad_words, max_tokens, min_tokens,
         stop_token_ids, ignore_eos, seed, logprobs, prompt_logprobs, beam_width, length_penalty,
         early_stopping] = params;
  archive(n, best_of, temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty,
          frequency_penalty, logit_bias, allowed_token_ids, bad_words, max_tokens, min_tokens,
          stop_token_ids, ignore_eos, seed, logprobs, prompt_logprobs, beam_width, length_penalty,
          early_stopping);
}

template <typename Archive>
void transfer(Archive& archive, TokenLogprobs& row) {
  auto& [token_ids, logprobs, rank] = row;
  archive(token_ids, logprobs, rank);
}

}  // namespace fastpage
