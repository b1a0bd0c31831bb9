#include "core/prompt_lookup.h"

namespace fastpage {

int32_t look_up_continuation(Span<const TokenId> tokens, int32_t min_ngram, int32_t max_ngram) {
  const int32_t last = static_cast<int32_t>(tokens.size()) - 1;
  int32_t best_length = min_ngram - 1;
  int32_t best = -1;
  for (int32_t end = last - 1; end >= best_length; --end) {
    if (tokens[end] != tokens[last]) continue;
    int32_t length = 1;
    while (length < max_ngram && length <= end && tokens[end - length] == tokens[last - length]) {
      ++length;
    }
    if (length <= best_length) continue;
    best_length = length;
    best = end + 1;
    if (length == max_ngram) break;
  }
  return best;
}

}  // namespace fastpage
