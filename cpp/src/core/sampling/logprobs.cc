#include "core/sampling/logprobs.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/sampling/candidates.h"

namespace fastpage::sampling {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

bool possible(float logit) { return logit > -kInfinity; }  // false for NaN

// The k most likely tokens, in descending order, in scratch->ids. Where fewer are possible,
// impossible ones of the lowest ids follow.
void rank_top_k(Span<const float> logits, float greatest, int64_t k, Scratch* scratch) {
  std::vector<TokenId>& ids = scratch->ids;
  int64_t size = gather_top_k(logits, greatest, k, -kInfinity, scratch);
  for (size_t i = 0; size < k && i < logits.size(); ++i) {
    if (!possible(logits[i])) ids[size++] = static_cast<TokenId>(i);
  }
  std::partial_sort(ids.begin(), ids.begin() + k, ids.begin() + size, [&](TokenId a, TokenId b) {
    const float logit_a = possible(logits[a]) ? logits[a] : -kInfinity;
    const float logit_b = possible(logits[b]) ? logits[b] : -kInfinity;
    return logit_a != logit_b ? logit_a > logit_b : a < b;
  });
}

}  // namespace

void compute_logprobs(Span<const float> logits, Span<const TokenId> tokens, Scratch* scratch,
                      TokenLogprobs* out) {
  const Kernels& kernel = kernels();
  const auto n = static_cast<int64_t>(logits.size());
  float greatest = kernel.maxima(logits.data(), n, scratch->maxima.data());
  if (greatest == kInfinity) {
    std::replace_copy(logits.begin(), logits.end(), scratch->copy.begin(), kInfinity, kLargest);
    logits = scratch->copy;
    greatest = kernel.maxima(logits.data(), n, scratch->maxima.data());
  }
  kernel.weigh(logits.data(), n, greatest, 1.0f, nullptr, scratch->sums.data());
  const double log_sum = std::log(std::accumulate(scratch->sums.begin(), scratch->sums.end(), 0.0));
  const auto logprob = [&](float logit) {
    if (!possible(logit)) return -kInfinity;
    return static_cast<float>(static_cast<double>(logit) - greatest - log_sum);
  };

  const auto k = static_cast<int64_t>(out->token_ids.size()) - 1;
  if (k > 0) rank_top_k(logits, greatest, k, scratch);
  for (const TokenId token : tokens) {
    const bool in_vocabulary = static_cast<size_t>(token) < logits.size();
    const float logit = in_vocabulary && possible(logits[token]) ? logits[token] : -kInfinity;
    const float greater = std::nextafter(logit, kInfinity);
    out->rank = 1 + static_cast<int32_t>(kernel.split(logits.data(), n, greater).count);
    out->token_ids[0] = token;
    out->logprobs[0] = logprob(logit);
    for (int64_t i = 0; i < k; ++i) {
      out->token_ids[i + 1] = scratch->ids[i];
      out->logprobs[i + 1] = logprob(logits[scratch->ids[i]]);
    }
    ++out;
  }
}

}  // namespace fastpage::sampling
