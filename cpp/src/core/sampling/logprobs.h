// Log probabilities of one position.
#pragma once

#include "core/sampling/scratch.h"
#include "fastpage/input_batch.h"

namespace fastpage::sampling {

// What the logits of one position say of each of `tokens`; out: one for each, its vectors sized 1 +
// k beforehand, all the same: entry 0 is the token, the rest the k <= vocabulary most likely tokens
// in descending order, the lower id first on ties. The rank is 1 + the number of tokens strictly
// more likely. A NaN counts as -inf, as does a token outside the vocabulary, a +inf logit as
// certain; where nothing is possible every log probability is -inf.
void compute_logprobs(Span<const float> logits, Span<const TokenId> tokens, Scratch* scratch,
                      TokenLogprobs* out);

}  // namespace fastpage::sampling
