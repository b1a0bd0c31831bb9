#include "fastpage/input_batch.h"

namespace fastpage {

void InputBatch::resolve(Span<const TokenId> sampled_token_ids) const {
  const auto num_sampled = static_cast<int64_t>(sampled_token_ids.size());
  for (const FutureToken& future : future_tokens) {
    if (future.sampling_row < 0 || future.sampling_row >= num_sampled) {
      throw Error("step " + std::to_string(step_id) + " needs the token of sampling row " +
                  std::to_string(future.sampling_row) + ", but the step before sampled " +
                  std::to_string(num_sampled));
    }
    if (future.index < 0 || future.index >= num_tokens()) {
      throw Error("step " + std::to_string(step_id) + " has a future token at " +
                  std::to_string(future.index) + " of " + std::to_string(num_tokens()));
    }
  }
  for (const FutureToken& future : future_tokens) {
    const TokenId token = sampled_token_ids[future.sampling_row];
    token_ids[future.index] = token;
    if (future.token != nullptr) *future.token = token;
  }
}

}  // namespace fastpage
