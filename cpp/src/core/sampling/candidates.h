// From a row of logits to a token.
#pragma once

#include "core/sampling/scratch.h"
#include "fastpage/sampling_params.h"

namespace fastpage::sampling {

// The greatest logit's token, the lowest id on ties; -1 if every logit is -inf or NaN.
TokenId argmax(Span<const float> logits, Scratch* scratch);

// The weights of the tokens that may be drawn from a row, in vocabulary order.
struct Distribution {
  const float* weights = nullptr;  // those below `threshold` are not drawn
  const TokenId* ids = nullptr;    // null: every token
  int64_t size = 0;
  float threshold = 0.0f;
  Span<const float> sums;  // by chunk, of the weights >= threshold
  TokenId certain = -1;    // if size is 0: the only token, -1 = there is none

  TokenId token(int64_t i) const { return ids ? ids[i] : static_cast<TokenId>(i); }
};

// Temperature, min_p, top_k and top_p. min_p, top_k and top_p each keep all tokens from some logit
// up, tied ones together: top_k all that are at least the k-th greatest, top_p all that have less
// than top_p of the (min_p and top_k kept) mass strictly above them. No token if every logit is
// -inf or NaN; +inf is certain, the lowest id first. Lies in `scratch`: valid until that is used
// again.
Distribution distribution(Span<const float> logits, const SamplingParams& params, Scratch* scratch);

// The token at `uniform` in [0, 1) of the cumulative distribution, or -1.
TokenId draw(const Distribution& distribution, double uniform);

// The tokens of the k greatest logits and of those tied with the last, in vocabulary order, with
// logits >= bound; fewer if others are -inf or NaN. Logits go to scratch->values, ids to
// scratch->ids; returns their number. scratch->maxima and `greatest` are those of `logits`.
int64_t gather_top_k(Span<const float> logits, float greatest, int64_t k, float bound,
                     Scratch* scratch);

}  // namespace fastpage::sampling
