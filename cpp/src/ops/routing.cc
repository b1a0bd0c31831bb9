#include "ops/routing.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "ops/kernels.h"

namespace fastpage::ops {

namespace {

// The indices of the top_k largest, in descending order. NaN is never larger.
void choose(const float* logits, int64_t n, int64_t top_k, int32_t* chosen) {
  int64_t count = 0;
  for (int64_t e = 0; e < n; ++e) {
    if (count == top_k && !(logits[e] > logits[chosen[count - 1]])) continue;
    int64_t at = count < top_k ? count++ : count - 1;
    for (; at > 0 && logits[e] > logits[chosen[at - 1]]; --at) chosen[at] = chosen[at - 1];
    chosen[at] = static_cast<int32_t>(e);
  }
}

void route_row(const float* logits, int64_t n, int64_t top_k, bool renormalize, int32_t* chosen,
               float* shares) {
  choose(logits, n, top_k, chosen);
  const float max = logits[chosen[0]];
  float sum = 0.0f;
  if (renormalize) {
    for (int64_t j = 0; j < top_k; ++j) sum += std::exp(logits[chosen[j]] - max);
  } else {
    for (int64_t e = 0; e < n; ++e) sum += std::exp(logits[e] - max);
  }
  std::sort(chosen, chosen + top_k);
  for (int64_t j = 0; j < top_k; ++j) shares[j] = std::exp(logits[chosen[j]] - max) / sum;
}

}  // namespace

void Routing::route(ThreadPool& pool, Matrix<const float> logits, int64_t top_k, bool renormalize) {
  num_experts_ = logits.cols;
  top_k_ = top_k;
  const int64_t count = logits.rows * top_k;
  float* room = scratch_.floats(static_cast<size_t>(5 * count + num_experts_ + 1));
  const auto take = [&](int64_t n) { return std::exchange(room, room + n); };
  weights_ = take(count);
  shares_ = take(count);
  rows_ = reinterpret_cast<int32_t*>(take(count));
  of_row_ = reinterpret_cast<int32_t*>(take(count));
  chosen_ = reinterpret_cast<int32_t*>(take(count));
  begin_ = reinterpret_cast<int32_t*>(take(num_experts_ + 1));

  constexpr int64_t kCost = 16;  // of an expert, in elements of a row
  const int64_t grain = std::max<int64_t>(1, kSerialElements / (kCost * num_experts_));
  pool.parallel_for(logits.rows, grain, [&](int64_t first, int64_t last, int) {
    for (int64_t i = first; i < last; ++i) {
      route_row(logits.row(i), num_experts_, top_k, renormalize, chosen_ + i * top_k,
                shares_ + i * top_k);
    }
  });
  sort(logits.rows);
}

void Routing::sort(int64_t rows) {
  std::fill(begin_, begin_ + num_experts_ + 1, 0);
  const int64_t count = rows * top_k_;
  for (int64_t i = 0; i < count; ++i) ++begin_[chosen_[i] + 1];
  for (int64_t e = 0; e < num_experts_; ++e) begin_[e + 1] += begin_[e];
  // Each expert's next place, which ends where the next expert's first one is.
  for (int64_t i = 0; i < count; ++i) {
    const int32_t at = begin_[chosen_[i]]++;
    of_row_[i] = at;
    rows_[at] = static_cast<int32_t>(i / top_k_);
    weights_[at] = shares_[i];
  }
  std::copy_backward(begin_, begin_ + num_experts_, begin_ + num_experts_ + 1);
  begin_[0] = 0;
}

}  // namespace fastpage::ops
