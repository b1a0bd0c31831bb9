// What changes logits before a token is chosen, greedily or not.
#pragma once

#include <functional>

#include "core/sampling/scratch.h"
#include "fastpage/input_batch.h"

namespace fastpage::sampling {

// Whether process_logits() may change anything.
bool needs_processing(const SamplingRow& row);

// The tokens that bad_words and min_tokens forbid now, some more than once; whether there may be
// any.
bool forbids_tokens(const SamplingRow& row);
void for_each_forbidden(const SamplingRow& row, const std::function<void(TokenId)>& fn);

// allowed_token_ids, bad_words, min_tokens, logit_bias, then the repetition (prompt and output
// tokens), frequency and presence penalties (output tokens). A bad word's last token is forbidden
// once the output ends with the tokens before it; as in vLLM, the prompt does not count.
void process_logits(Span<float> logits, const SamplingRow& row, Scratch* scratch);

}  // namespace fastpage::sampling
