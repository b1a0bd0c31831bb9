#include "core/engine_requests.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <numeric>
#include <string>

namespace fastpage {

Group::Group(const SamplingParams& params, size_t num_prompt_tokens)
    : delivery(params.beam_width > 0       ? Delivery::kBeams
               : params.best_of > params.n ? Delivery::kBestOf
                                           : Delivery::kAsMade),
      needs_logprobs(params.logprobs != SamplingParams::kNoLogprobs ||
                     delivery != Delivery::kAsMade),
      reports_logprobs(params.logprobs != SamplingParams::kNoLogprobs),
      length_penalty(params.length_penalty),
      num_prompt_tokens(static_cast<int32_t>(num_prompt_tokens)),
      num_unfinished(params.n),
      samples(params.n) {
  if (delivery == Delivery::kBestOf) {
    num_held_unfinished = params.best_of;
    held.resize(params.best_of);
  }
}

RequestOutput Group::news_of(int32_t index, FinishReason reason) const {
  RequestOutput news;
  news.request_id = id;
  news.index = index;
  news.finish_reason = reason;
  news.num_prompt_tokens = num_prompt_tokens;
  news.num_cached_tokens = num_cached_tokens;
  news.num_output_tokens = samples[index].num_output_tokens;
  news.cumulative_logprob = samples[index].cumulative_logprob;
  news.queue_seconds = queue_seconds;
  if (queue_seconds < 0) {
    news.queue_seconds = std::chrono::duration<double>(Clock::now() - arrived).count();
  }
  return news;
}

void Group::append(const SequenceUpdate& update, const ModelRunnerOutput& result,
                   RequestOutput* news) const {
  news->new_token_ids.insert(news->new_token_ids.end(), update.new_token_ids.begin(),
                             update.new_token_ids.end());
  news->num_output_tokens = update.num_output_tokens;
  news->finish_reason = update.finish_reason;
  news->stop_token_id = update.stop_token_id;
  if (delivery == Delivery::kBeams) {
    news->score = update.score;
    news->cumulative_logprob =
        update.score * std::pow(update.num_output_tokens, double{length_penalty});
    return;
  }
  if (!needs_logprobs) return;
  for (size_t i = 0; i < update.new_token_ids.size(); ++i) {
    const TokenLogprobs& logprobs = result.logprobs[update.sampling_row + i];
    news->cumulative_logprob += logprobs.logprobs[0];
    if (reports_logprobs) news->logprobs.push_back(logprobs);
  }
}

bool Group::hold(const SequenceUpdate& update, const ModelRunnerOutput& result) {
  append(update, result, &held[update.index]);
  return update.finish_reason != FinishReason::kNone && --num_held_unfinished == 0;
}

std::vector<RequestOutput> Group::take_best() {
  std::vector<int32_t> order(held.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [this](int32_t a, int32_t b) {
    return held[a].cumulative_logprob > held[b].cumulative_logprob;
  });
  std::vector<RequestOutput> best;
  best.reserve(samples.size());
  for (size_t rank = 0; rank < samples.size(); ++rank) {
    RequestOutput& output = held[order[rank]];
    output.request_id = id;
    output.index = static_cast<int32_t>(rank);
    output.num_prompt_tokens = num_prompt_tokens;
    output.num_cached_tokens = num_cached_tokens;
    output.queue_seconds = queue_seconds;
    best.push_back(std::move(output));
  }
  return best;
}

namespace {

void require(const char* what, size_t size, size_t wanted) {
  if (size == wanted) return;
  throw Error("the model runner returned " + std::to_string(size) + " " + what + ", not " +
              std::to_string(wanted));
}

bool has_chosen_token(const TokenLogprobs& entry) {
  return !entry.token_ids.empty() && entry.token_ids.size() == entry.logprobs.size();
}

}  // namespace

void check_result(const InputBatch& batch, const ModelRunnerOutput& result, int32_t vocab_size,
                  bool expect_logprobs) {
  const size_t num_rows = batch.sampling_rows.size();
  require("sampled_token_ids", result.sampled_token_ids.size(), num_rows);
  require("prompt_logprobs", result.prompt_logprobs.size(), batch.prompt_logprob_rows.size());
  if (!result.logprobs.empty()) require("logprobs", result.logprobs.size(), num_rows);
  for (const TokenId id : result.sampled_token_ids) {
    if (id < 0 || id >= vocab_size) {
      throw Error("the model runner returned token " + std::to_string(id) + ", not in [0, " +
                  std::to_string(vocab_size) + ")");
    }
  }
  if (!expect_logprobs) return;
  for (size_t row = 0; row < num_rows; ++row) {
    if (batch.sampling_rows[row].params->logprobs == SamplingParams::kNoLogprobs) continue;
    if (result.logprobs.empty() || !has_chosen_token(result.logprobs[row])) {
      throw Error("the model runner returned no logprobs for sampling row " + std::to_string(row) +
                  ", which asked for them");
    }
  }
}

}  // namespace fastpage
