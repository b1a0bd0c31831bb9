#include "core/beam_search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

namespace fastpage {

BeamSearch::BeamSearch(const SamplingParams& params, Span<const TokenId> eos_token_ids,
                       int32_t num_prompt_tokens, int32_t final_length)
    : beam_width_(params.beam_width),
      min_tokens_(params.min_tokens),
      max_tokens_(final_length - num_prompt_tokens),
      length_penalty_(params.length_penalty),
      early_stopping_(params.early_stopping),
      stop_token_ids_(params.stop_token_ids) {
  if (!params.ignore_eos) {
    stop_token_ids_.insert(stop_token_ids_.end(), eos_token_ids.begin(), eos_token_ids.end());
  }
  std::sort(stop_token_ids_.begin(), stop_token_ids_.end());
  stop_token_ids_.erase(std::unique(stop_token_ids_.begin(), stop_token_ids_.end()),
                        stop_token_ids_.end());
  sums_.reserve(beam_width_);
  running_.reserve(beam_width_);
  finished_.reserve(beam_width_);
  candidates_.reserve(static_cast<size_t>(beam_width_) * num_candidates());
  sums_.push_back(0.0f);  // the prompt
}

int32_t BeamSearch::num_candidates() const {
  return beam_width_ + static_cast<int32_t>(stop_token_ids_.size());
}

const std::vector<BeamContinuation>& BeamSearch::step(Span<const Span<const TokenId>> outputs,
                                                      Span<const TokenLogprobs> candidates) {
  const auto num_output_tokens = static_cast<int32_t>(outputs[0].size()) + 1;
  gather(candidates, num_output_tokens > min_tokens_);
  // Where nothing but stop tokens is left one of them is taken, as the sampler does.
  if (candidates_.empty()) gather(candidates, true);
  advance(outputs, num_output_tokens);
  if (is_over(num_output_tokens)) running_.clear();
  return running_;
}

std::vector<BeamHypothesis> BeamSearch::best(int32_t n) const {
  std::vector<BeamHypothesis> result(finished_.begin(),
                                     finished_.begin() + std::min<size_t>(n, finished_.size()));
  if (!result.empty()) result.resize(n, BeamHypothesis(result.back()));
  return result;
}

bool BeamSearch::is_stop(TokenId token) const {
  return std::binary_search(stop_token_ids_.begin(), stop_token_ids_.end(), token);
}

// The beams' next tokens as far as they can matter, the best first.
void BeamSearch::gather(Span<const TokenLogprobs> candidates, bool may_stop) {
  candidates_.clear();
  for (size_t beam = 0; beam < candidates.size(); ++beam) {
    const TokenLogprobs& row = candidates[beam];
    for (size_t i = 1; i < row.token_ids.size(); ++i) {
      const TokenId token = row.token_ids[i];
      const bool stops = is_stop(token);
      if (stops && !may_stop) continue;
      const float sum = sums_[beam] + row.logprobs[i];
      candidates_.push_back({std::isnan(sum) ? -std::numeric_limits<float>::infinity() : sum,
                             {static_cast<int32_t>(beam), token},
                             stops});
    }
  }
  const auto rank = [](const Candidate& c) {
    return std::make_tuple(-c.sum, c.continuation.parent, c.continuation.token);
  };
  // That many hold beam_width that go on, whatever the others are.
  const size_t kept = beam_width_ * (stop_token_ids_.size() + 1);
  const auto end = candidates_.begin() + std::min(kept, candidates_.size());
  std::partial_sort(candidates_.begin(), end, candidates_.end(),
                    [&](const Candidate& a, const Candidate& b) { return rank(a) < rank(b); });
  candidates_.erase(end, candidates_.end());
}

// Only the beam_width best candidates may finish; the others are there to go on in their place.
void BeamSearch::advance(Span<const Span<const TokenId>> outputs, int32_t num_output_tokens) {
  sums_.clear();
  running_.clear();
  const bool at_the_end = num_output_tokens >= max_tokens_;
  for (int32_t i = 0; i < static_cast<int32_t>(candidates_.size()); ++i) {
    const Candidate& candidate = candidates_[i];
    if (candidate.stops || at_the_end) {
      if (i >= beam_width_) continue;
      finish(candidate, outputs[candidate.continuation.parent],
             score(candidate.sum, num_output_tokens));
    } else if (static_cast<int32_t>(running_.size()) < beam_width_) {
      sums_.push_back(candidate.sum);
      running_.push_back(candidate.continuation);
    }
  }
}

void BeamSearch::finish(const Candidate& candidate, Span<const TokenId> output, float score) {
  BeamHypothesis hypothesis;
  if (static_cast<int32_t>(finished_.size()) == beam_width_) {
    if (score <= finished_.back().score) return;
    hypothesis = std::move(finished_.back());  // for its memory
    finished_.pop_back();
  }
  const TokenId token = candidate.continuation.token;
  hypothesis.token_ids.reserve(output.size() + 1);
  hypothesis.token_ids.assign(output.begin(), output.end());
  hypothesis.token_ids.push_back(token);
  hypothesis.score = score;
  hypothesis.finish_reason = candidate.stops ? FinishReason::kStop : FinishReason::kLength;
  hypothesis.stop_token_id = candidate.stops ? token : -1;
  const auto place = std::upper_bound(
      finished_.begin(), finished_.end(), score,
      [](float value, const BeamHypothesis& other) { return value > other.score; });
  finished_.insert(place, std::move(hypothesis));
}

bool BeamSearch::is_over(int32_t num_output_tokens) const {
  if (running_.empty()) return true;
  if (static_cast<int32_t>(finished_.size()) < beam_width_) return false;
  if (early_stopping_ == EarlyStopping::kYes) return true;
  const bool grows = early_stopping_ == EarlyStopping::kNever && length_penalty_ > 0.0f;
  const float best_possible = score(sums_[0], grows ? max_tokens_ : num_output_tokens);
  return best_possible <= finished_.back().score;
}

float BeamSearch::score(float sum, int32_t num_output_tokens) const {
  const double divisor = std::pow(num_output_tokens, double{length_penalty_});
  // Within what a float holds: 0 / 0 and inf / inf have no order.
  constexpr double kLeast = std::numeric_limits<float>::min();
  constexpr double kMost = std::numeric_limits<float>::max();
  return sum / static_cast<float>(std::clamp(divisor, kLeast, kMost));
}

}  // namespace fastpage
