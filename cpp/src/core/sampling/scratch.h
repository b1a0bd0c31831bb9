// What one thread needs to sample rows, allocated once.
#pragma once

#include <algorithm>

#include "core/sampling/kernels.h"

namespace fastpage::sampling {

struct Scratch {
  explicit Scratch(int32_t vocab_size)
      : copy(vocab_size),
        values(vocab_size),
        ids(vocab_size),
        search(std::max<int64_t>(vocab_size, num_maxima(vocab_size))),
        maxima(num_maxima(vocab_size)),
        sums(num_chunks(vocab_size)),
        counts(vocab_size) {}

  std::vector<float> copy;    // of the row, for what changes logits
  std::vector<float> values;  // of the candidates for the draw, in vocabulary order
  std::vector<TokenId> ids;   // theirs
  std::vector<float> search;  // what a search for a threshold has narrowed down to
  std::vector<float> maxima;
  std::vector<float> sums;
  std::vector<int32_t> counts;  // of each output token; all 0 between rows
};

}  // namespace fastpage::sampling
