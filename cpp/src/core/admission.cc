#include "core/admission.h"

#include <algorithm>
#include <limits>

#include "core/beam_search.h"

namespace fastpage {

namespace {

constexpr int32_t kMaxWaiting = 1 << 23;
constexpr int32_t kMaxSeqs = 1 << 20;

void check_range(const char* name, int64_t value, int64_t min, int64_t max) {
  if (value < min || value > max) {
    throw InvalidArgument(std::string(name) + " is " + std::to_string(value) + ": must be in [" +
                          std::to_string(min) + ", " + std::to_string(max) + "]");
  }
}

int64_t blocks_for(const SchedulerConfig& config, int64_t num_tokens) {
  return (num_tokens + config.block_size - 1) / config.block_size;
}

// Whatever else SamplingParams::validate() would say, these decide how much is allocated.
void check_samples(const SamplingParams& params) {
  check_range("n", params.n, 1, SamplingParams::kMaxN);
  check_range("best_of", params.best_of, 0, SamplingParams::kMaxN);
  check_range("beam_width", params.beam_width, 0, SamplingParams::kMaxBeamWidth);
  if (params.beam_width > 0) check_range("n", params.n, 1, params.beam_width);
}

void check_beams(const SchedulerConfig& config, const SamplingParams& params) {
  if (params.beam_width > config.max_num_seqs) {
    throw InvalidArgument("beam_width is " + std::to_string(params.beam_width) +
                          ": more than max_num_seqs " + std::to_string(config.max_num_seqs) +
                          " can never run at once");
  }
  const int32_t num_candidates = BeamSearch(params, config.eos_token_ids, 1, 2).num_candidates();
  if (num_candidates > SamplingParams::kMaxLogprobs) {
    throw InvalidArgument("beam_width " + std::to_string(params.beam_width) + " with " +
                          std::to_string(params.stop_token_ids.size()) + " stop tokens asks for " +
                          std::to_string(num_candidates) + " candidates a beam, " +
                          std::to_string(SamplingParams::kMaxLogprobs) +
                          " are possible: lower one of them");
  }
}

}  // namespace

void SchedulerConfig::validate() const {
  constexpr int32_t kMax = std::numeric_limits<int32_t>::max();
  check_range("block_size", block_size, 1, 1 << 16);
  // A slot, block * block_size + offset, is an int32.
  check_range("num_blocks", num_blocks, 1, kMax / block_size);
  check_range("num_host_blocks", num_host_blocks, 0, kMax / block_size);
  check_range("max_num_seqs", max_num_seqs, 1, kMaxSeqs);
  check_range("max_num_batched_tokens", max_num_batched_tokens, 1, 1 << 24);
  check_range("max_model_len", max_model_len, 2, 1 << 28);
  check_range("max_num_waiting", max_num_waiting, 1, kMaxWaiting);
  check_range("max_num_waiting_tokens", max_num_waiting_tokens, 0, kMax);
  check_range("long_prefill_token_threshold", long_prefill_token_threshold, 0, kMax);
  check_range("max_num_partial_prefills", max_num_partial_prefills, 0, kMax);
  check_range("max_steps_in_flight", max_steps_in_flight, 1, 2);
  check_range("num_speculative_tokens", num_speculative_tokens, 0, 1 << 10);
  check_range("prompt_lookup_min", prompt_lookup_min, 1, 1 << 10);
  check_range("prompt_lookup_max", prompt_lookup_max, prompt_lookup_min, 1 << 10);
  if (!(swap_cost_per_block >= 0)) {
    throw InvalidArgument("swap_cost_per_block is " + std::to_string(swap_cost_per_block) +
                          ": must be at least 0");
  }
}

int32_t final_length(const SchedulerConfig& config, size_t num_prompt_tokens,
                     const SamplingParams& params) {
  if (params.max_tokens == SamplingParams::kUntilMaxModelLen) return config.max_model_len;
  return static_cast<int32_t>(num_prompt_tokens) + params.max_tokens;
}

void check_fits(const SchedulerConfig& config, size_t num_prompt_tokens,
                const SamplingParams& params) {
  if (num_prompt_tokens == 0) {
    throw InvalidArgument("the prompt is empty: it needs at least one token");
  }
  check_samples(params);
  const bool open_ended = params.max_tokens == SamplingParams::kUntilMaxModelLen;
  const int64_t max_tokens = open_ended ? 1 : params.max_tokens;
  if (max_tokens < 1) {
    throw InvalidArgument("max_tokens is " + std::to_string(params.max_tokens) +
                          ": must be at least 1, or -1 for as many as fit");
  }
  if (static_cast<int64_t>(num_prompt_tokens) + max_tokens > config.max_model_len) {
    throw InvalidArgument("prompt " + std::to_string(num_prompt_tokens) +
                          (open_ended ? " + 1" : " + max_tokens " + std::to_string(max_tokens)) +
                          " > max_model_len " + std::to_string(config.max_model_len));
  }
  // The last token is sampled, but its keys and values are never needed.
  const int32_t num_cached = final_length(config, num_prompt_tokens, params) - 1;
  int64_t needed = blocks_for(config, num_cached);
  if (params.beam_width > 0) {
    check_beams(config, params);
    // All beams run at once, and share no more than the prompt's full blocks for sure.
    const int64_t shared = static_cast<int64_t>(num_prompt_tokens) / config.block_size;
    needed = shared + params.beam_width * (needed - shared);
  }
  if (needed > config.num_blocks) {
    const std::string times =
        params.beam_width > 0 ? " x " + std::to_string(params.beam_width) + " beams" : "";
    throw InvalidArgument("prompt " + std::to_string(num_prompt_tokens) + " + output " +
                          std::to_string(num_cached + 1 - static_cast<int64_t>(num_prompt_tokens)) +
                          " tokens" + times + " needs " + std::to_string(needed) + " blocks, " +
                          std::to_string(config.num_blocks) +
                          " exist: lower max_tokens or give the KV cache more memory");
  }
}

void check_queue(const SchedulerConfig& config, const QueueLoad& waiting, const QueueLoad& added) {
  if (added.num_sequences > config.max_num_waiting) {
    throw InvalidArgument("n is " + std::to_string(added.num_sequences) +
                          ": more than max_num_waiting " + std::to_string(config.max_num_waiting) +
                          " can never queue up");
  }
  if (waiting.num_sequences + added.num_sequences > config.max_num_waiting) {
    throw ResourceExhausted("the queue is full: " + std::to_string(waiting.num_sequences) +
                            " waiting, max_num_waiting " + std::to_string(config.max_num_waiting) +
                            ": try again later");
  }
  if (config.max_num_waiting_tokens > 0 && waiting.num_prompt_tokens > 0 &&
      waiting.num_prompt_tokens + added.num_prompt_tokens > config.max_num_waiting_tokens) {
    throw ResourceExhausted("the queue is full: " + std::to_string(waiting.num_prompt_tokens) +
                            " prompt tokens waiting and " +
                            std::to_string(added.num_prompt_tokens) +
                            " more, max_num_waiting_tokens " +
                            std::to_string(config.max_num_waiting_tokens) + ": try again later");
  }
}

}  // namespace fastpage
