#include "core/sampling/candidates.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/sampling/threshold.h"

namespace fastpage::sampling {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();

// exp() of anything divided by less than this is 0 or 1 already, and the quotient stays finite.
float inverse_temperature(const SamplingParams& params) {
  return 1.0f / std::max(params.temperature, 1e-30f);
}

// Logits and ids of what min_p and top_k keep, in scratch->values and scratch->ids; returns their
// number. That of all, leaving scratch alone, if neither is asked for.
int64_t keep_min_p_and_top_k(Span<const float> logits, float greatest, const SamplingParams& params,
                             Scratch* scratch) {
  const auto vocab_size = static_cast<int64_t>(logits.size());
  const bool top_k = params.top_k > 0 && params.top_k < vocab_size;
  if (!top_k && params.min_p <= 0.0f) return vocab_size;
  float bound = kLowest;
  if (params.min_p > 0.0f) {
    bound = std::max(bound, greatest + params.temperature * std::log(params.min_p));
  }
  return gather_top_k(logits, greatest, top_k ? params.top_k : vocab_size, bound, scratch);
}

}  // namespace

TokenId argmax(Span<const float> logits, Scratch* scratch) {
  const Kernels& kernel = kernels();
  const auto n = static_cast<int64_t>(logits.size());
  float* maxima = scratch->maxima.data();
  const float greatest = kernel.maxima(logits.data(), n, maxima);
  if (greatest == -kInfinity) return -1;
  const int64_t begin = kernel.find(maxima, num_maxima(n), greatest) / kLanes * kChunk;
  return static_cast<TokenId>(begin + kernel.find(logits.data() + begin, n - begin, greatest));
}

int64_t gather_top_k(Span<const float> logits, float greatest, int64_t k, float bound,
                     Scratch* scratch) {
  const Kernels& kernel = kernels();
  const auto n = static_cast<int64_t>(logits.size());
  float* values = scratch->values.data();
  TokenId* ids = scratch->ids.data();
  float* search = scratch->search.data();
  // At least k logits are as great as the k-th of the maxima; few more, while k is small.
  if (k < n) {
    const float kth = k <= num_maxima(n) / 2
                          ? kth_greatest(scratch->maxima.data(), num_maxima(n), k, greatest, search)
                          : kth_greatest(logits.data(), n, k, greatest, search);
    bound = std::max(bound, kth);
  }
  bound = std::max(bound, kLowest);
  const int64_t size = kernel.gather(logits.data(), n, bound, kInfinity, values, ids);
  if (size <= k) return size;
  const float kth = kth_greatest(values, size, k, greatest, search);
  int64_t kept = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (values[i] < kth) continue;
    values[kept] = values[i];
    ids[kept++] = ids[i];
  }
  return kept;
}

Distribution distribution(Span<const float> logits, const SamplingParams& params,
                          Scratch* scratch) {
  const Kernels& kernel = kernels();
  const auto n = static_cast<int64_t>(logits.size());
  Distribution result;
  const float greatest = kernel.maxima(logits.data(), n, scratch->maxima.data());
  if (greatest == -kInfinity) return result;
  if (greatest == kInfinity) {
    result.certain = static_cast<TokenId>(kernel.find(logits.data(), n, kInfinity));
    return result;
  }
  result.size = keep_min_p_and_top_k(logits, greatest, params, scratch);
  const bool all = result.size == n;
  result.ids = all ? nullptr : scratch->ids.data();
  result.weights = scratch->values.data();
  float* sums = scratch->sums.data();
  result.sums = {sums, static_cast<size_t>(num_chunks(result.size))};
  kernel.weigh(all ? logits.data() : scratch->values.data(), result.size, greatest,
               inverse_temperature(params), scratch->values.data(), sums);
  if (params.top_p < 1.0f) {
    const double total = std::accumulate(result.sums.begin(), result.sums.end(), 0.0);
    result.threshold = mass_threshold(result.weights, result.size, params.top_p * total, total,
                                      scratch->search.data());
    kernel.sum(result.weights, result.size, result.threshold, sums);
  }
  return result;
}

// The first candidate at which the running sum of the weights >= threshold exceeds `uniform` of
// their total.
TokenId draw(const Distribution& d, double uniform) {
  if (d.size == 0) return d.certain;
  const double target = uniform * std::accumulate(d.sums.begin(), d.sums.end(), 0.0);
  double below = 0.0;
  int64_t chunk = 0;
  for (int64_t c = 0; c < static_cast<int64_t>(d.sums.size()); ++c) {
    if (d.sums[c] <= 0.0f) continue;
    chunk = c;
    if (below + d.sums[c] > target) break;
    below += d.sums[c];
  }
  // Rounding may let the chunk end before the target: its last candidate is the answer then.
  int64_t last = 0;
  const int64_t end = std::min(d.size, (chunk + 1) * kChunk);
  for (int64_t i = chunk * kChunk; i < end; ++i) {
    const float weight = d.weights[i];
    if (weight <= 0.0f || weight < d.threshold) continue;
    last = i;
    below += weight;
    if (below > target) break;
  }
  return d.token(last);
}

}  // namespace fastpage::sampling
