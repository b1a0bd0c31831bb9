// From a row of logits to a token.
#pragma once

#include "core/sampling/scratch.h"
#include "fastpage/sampling_params.h"

namespace fastpage::sampling {

// The greatest logit's token, the lowest id on ties; -1 if every logit is -inf or NaN.
TokenId argmax(Span<const float> logits, Scratch* scratch);

// Temperature, min_p, top_k and top_p, then the token at `uniform` in [0, 1) of the cumulative
// distribution over what they keep, in vocabulary order. min_p, top_k and top_p each keep all
// tokens from some logit up, tied ones together: top_k all that are at least the k-th greatest,
// top_p all that have less than top_p of the (min_p and top_k kept) mass strictly above them. -1 if
// every logit is -inf or NaN; +inf is certain. Overwrites `logits`.
TokenId draw(Span<float> logits, const SamplingParams& params, double uniform, Scratch* scratch);

// The tokens of the k greatest logits and of those tied with the last, in vocabulary order, with
// logits >= bound; fewer if others are -inf or NaN. Logits go to scratch->values, ids to
// scratch->ids; returns their number. scratch->maxima and `greatest` are those of `logits`.
int64_t gather_top_k(Span<const float> logits, float greatest, int64_t k, float bound,
                     Scratch* scratch);

}  // namespace fastpage::sampling
