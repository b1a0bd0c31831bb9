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

// Weights of the tokens that may be drawn, in vocabulary order. Without ids, all tokens.
struct Candidates {
  float* weights;
  const TokenId* ids;
  int64_t size;

  TokenId token(int64_t i) const { return ids ? ids[i] : static_cast<TokenId>(i); }
};

// exp() of anything divided by less than this is 0 or 1 already, and the quotient stays finite.
float inverse_temperature(const SamplingParams& params) {
  return 1.0f / std::max(params.temperature, 1e-30f);
}

Candidates keep_min_p_and_top_k(Span<float> logits, float greatest, const SamplingParams& params,
                                Scratch* scratch) {
  const auto vocab_size = static_cast<int64_t>(logits.size());
  const bool top_k = params.top_k > 0 && params.top_k < vocab_size;
  if (!top_k && params.min_p <= 0.0f) return {logits.data(), nullptr, vocab_size};
  float bound = kLowest;
  if (params.min_p > 0.0f) {
    bound = std::max(bound, greatest + params.temperature * std::log(params.min_p));
  }
  const int64_t k = top_k ? params.top_k : vocab_size;
  const int64_t size = gather_top_k({logits.data(), logits.size()}, greatest, k, bound, scratch);
  return {scratch->values.data(), scratch->ids.data(), size};
}

// The first candidate at which the running sum of the weights >= threshold exceeds `uniform` of
// their total; sums are those weights' sums by chunk.
int64_t inverse_cdf(const Candidates& candidates, float threshold, Span<const float> sums,
                    double uniform) {
  const double target = uniform * std::accumulate(sums.begin(), sums.end(), 0.0);
  double below = 0.0;
  int64_t chunk = 0;
  for (int64_t c = 0; c < static_cast<int64_t>(sums.size()); ++c) {
    if (sums[c] <= 0.0f) continue;
    chunk = c;
    if (below + sums[c] > target) break;
    below += sums[c];
  }
  // Rounding may let the chunk end before the target: its last candidate is the answer then.
  int64_t last = 0;
  const int64_t end = std::min(candidates.size, (chunk + 1) * kChunk);
  for (int64_t i = chunk * kChunk; i < end; ++i) {
    const float weight = candidates.weights[i];
    if (weight <= 0.0f || weight < threshold) continue;
    last = i;
    below += weight;
    if (below > target) break;
  }
  return last;
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

TokenId draw(Span<float> logits, const SamplingParams& params, double uniform, Scratch* scratch) {
  const Kernels& kernel = kernels();
  const auto n = static_cast<int64_t>(logits.size());
  const float greatest = kernel.maxima(logits.data(), n, scratch->maxima.data());
  if (greatest == -kInfinity) return -1;
  if (greatest == kInfinity) {
    return static_cast<TokenId>(kernel.find(logits.data(), n, kInfinity));
  }
  const Candidates candidates = keep_min_p_and_top_k(logits, greatest, params, scratch);
  const Span<float> sums(scratch->sums.data(), num_chunks(candidates.size));
  kernel.weigh(candidates.weights, candidates.size, greatest, inverse_temperature(params),
               candidates.weights, sums.data());
  float threshold = 0.0f;
  if (params.top_p < 1.0f) {
    const double total = std::accumulate(sums.begin(), sums.end(), 0.0);
    threshold = mass_threshold(candidates.weights, candidates.size, params.top_p * total, total,
                               scratch->search.data());
    kernel.sum(candidates.weights, candidates.size, threshold, sums.data());
  }
  const int64_t chosen = inverse_cdf(candidates, threshold, {sums.data(), sums.size()}, uniform);
  return candidates.token(chosen);
}

}  // namespace fastpage::sampling
