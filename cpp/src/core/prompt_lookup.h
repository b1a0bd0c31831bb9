// Speculation without a model: what followed the last time that the text went like this.
#pragma once

#include "fastpage/types.h"

namespace fastpage {

// Prompt lookup (Saxena 2023): the end of `tokens` of at most max_ngram tokens is looked for
// earlier in them; the longest match of at least min_ngram tokens wins, of equal ones the latest.
// Returns the position of the token that followed it, or -1.
int32_t look_up_continuation(Span<const TokenId> tokens, int32_t min_ngram, int32_t max_ngram);

}  // namespace fastpage
