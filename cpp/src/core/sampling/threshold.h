// Searches that stand in for sorting a vocabulary: the value at which the best k values, or the
// best values that weigh as much as asked for, begin. Ties are one: all of them are in, or none.
#pragma once

#include "core/sampling/kernels.h"

namespace fastpage::sampling {

// The k-th greatest value, -inf if there are fewer (a NaN is none); `greatest` is the first.
// `search` has room for n values.
float kth_greatest(const float* values, int64_t n, int64_t k, float greatest, float* search);

// The greatest weight t such that all weights >= t together reach `mass`. Weights are in [0, 1],
// the greatest is 1; 0 < mass <= their sum `total`. `search` has room for n weights.
float mass_threshold(const float* weights, int64_t n, double mass, double total, float* search);

}  // namespace fastpage::sampling
