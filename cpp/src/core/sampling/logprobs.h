// Log probabilities of one position.
#pragma once

#include "core/sampling/scratch.h"
#include "fastpage/input_batch.h"

namespace fastpage::sampling {

// out's vectors are sized 1 + k beforehand: entry 0 is `token`, the rest the k <= vocabulary most
// likely tokens in descending order, the lower id first on ties. The rank is 1 + the number of
// tokens strictly more likely. A NaN counts as -inf, as does a token outside the vocabulary, a +inf
// logit as certain; where nothing is possible every log probability is -inf.
void compute_logprobs(Span<const float> logits, TokenId token, Scratch* scratch,
                      TokenLogprobs* out);

}  // namespace fastpage::sampling
