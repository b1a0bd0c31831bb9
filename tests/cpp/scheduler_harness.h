// Small schedulers, requests and steps for unit tests.
#pragma once

#include <numeric>
#include <string>
#include <vector>

#include "fastpage/scheduler.h"

namespace fastpage {

inline SchedulerConfig small_config() {
  SchedulerConfig config;
  config.num_blocks = 32;
  config.block_size = 4;
  config.max_num_seqs = 4;
  config.max_num_batched_tokens = 16;
  config.max_model_len = 64;
  config.eos_token_ids = {0};
  return config;
}

inline std::vector<TokenId> tokens_from(TokenId first, int32_t n) {
  std::vector<TokenId> tokens(n);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

inline SequenceRequest request(std::vector<TokenId> prompt, int32_t max_tokens = 8) {
  SequenceRequest out;
  out.prompt_token_ids = std::move(prompt);
  out.params.max_tokens = max_tokens;
  return out;
}

// A scheduler, its batches, and a model that always says `token`.
struct Harness {
  explicit Harness(const SchedulerConfig& config) : scheduler(config) {}

  RequestId add(SequenceRequest r) { return scheduler.add_request(std::move(r)); }

  const SchedulerOutput& begin() { return begin(&batch); }
  const SchedulerOutput& begin(InputBatch* into) {
    const SchedulerOutput& step = scheduler.schedule();
    if (!step.sequences.empty()) scheduler.prepare(step, into);
    scheduler.check_integrity();
    return step;
  }
  const std::vector<SequenceUpdate>& end(const SchedulerOutput& step, TokenId token = 99) {
    size_t num_rows = 0;
    for (const ScheduledSequence& seq : step.sequences) num_rows += seq.num_sampling_rows;
    sampled.assign(num_rows, token);
    const auto& updates = scheduler.update(step, sampled);
    scheduler.check_integrity();
    return updates;
  }
  const std::vector<SequenceUpdate>& step(TokenId token = 99) { return end(begin(), token); }
  void run_until_idle() {
    while (scheduler.has_unfinished()) step();
  }

  Scheduler scheduler;
  InputBatch batch;
  std::vector<TokenId> sampled;  // updates point there
};

inline std::string error_of(Scheduler* scheduler, SequenceRequest r) {
  try {
    scheduler->add_request(std::move(r));
  } catch (const InvalidArgument& e) {
    return e.what();
  } catch (const ResourceExhausted& e) {
    return std::string("exhausted: ") + e.what();
  }
  return "";
}

}  // namespace fastpage
