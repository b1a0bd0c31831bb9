// Continuous batching. There is no prefill phase and no decode phase: every request has tokens and
// computed tokens, and a step lets it catch up within a budget. A deterministic state machine: no
// clock, no threads, no randomness; the same calls in the same order give the same steps.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "fastpage/block_manager.h"
#include "fastpage/input_batch.h"
#include "fastpage/sampling_params.h"
#include "fastpage/types.h"

namespace fastpage {

enum class SchedulingPolicy : uint8_t { kFcfs, kPriority };

struct SchedulerConfig {
  int32_t num_blocks = 0;
  int32_t block_size = 16;
  int32_t max_num_seqs = 256;                // running at once
  int32_t max_num_batched_tokens = 2048;     // per step
  int32_t max_model_len = 2048;              // prompt + output
  int32_t max_num_waiting = 1 << 20;         // never yet admitted; more are refused
  int32_t long_prefill_token_threshold = 0;  // cap of one request's tokens per step, 0 = none
  bool enable_prefix_caching = true;
  SchedulingPolicy policy = SchedulingPolicy::kFcfs;
  uint64_t hash_key_lo = 0;  // secret of the block hashes; Engine draws one at random
  uint64_t hash_key_hi = 0;
  std::vector<TokenId> eos_token_ids;

  void validate() const;  // throws InvalidArgument
};

// One sequence, as it is handed in. (n > 1 is Engine's: it adds n of these.)
struct SequenceRequest {
  std::vector<TokenId> prompt_token_ids;
  SamplingParams params;
  uint64_t seed = 0;     // resolved: what SamplingRow::seed will say
  int32_t priority = 0;  // smaller = sooner; only with SchedulingPolicy::kPriority
  std::string cache_salt;
  uint64_t tag = 0;  // the caller's own, given back in ScheduledSequence and SequenceUpdate
};

struct ScheduledSequence {
  RequestId id;
  uint64_t tag;
  int32_t row;                   // of block_tables
  int32_t num_computed_tokens;   // before this step
  int32_t num_scheduled_tokens;  // >= 1
  bool samples;                  // this step reaches the last known token
};

struct SchedulerOutput {
  int64_t step_id = 0;
  std::vector<ScheduledSequence> sequences;
  std::vector<BlockCopy> block_copies;
  int32_t num_scheduled_tokens = 0;
  int32_t num_preempted = 0;  // by this call
};

// What became of one sequence in update().
struct SequenceUpdate {
  RequestId id;
  uint64_t tag;
  int32_t seq;           // index into the step's sequences
  TokenId new_token_id;  // -1 unless has_new_token
  bool has_new_token;
  FinishReason finish_reason;
  TokenId stop_token_id;  // the token that ended it, -1 if none
  int32_t num_prompt_tokens;
  int32_t num_output_tokens;
  int32_t num_cached_tokens;  // of the prompt, found in the prefix cache at first admission
  int32_t sampling_row;       // index into the batch's sampling_rows, -1 if none
};

struct SchedulerStats {
  int32_t num_waiting = 0;
  int32_t num_running = 0;
  int32_t num_blocks = 0;
  int32_t num_free_blocks = 0;       // cached ones that nobody holds count as free
  int64_t num_preemptions = 0;       // since the start, like all below
  int64_t prefix_cache_queries = 0;  // tokens looked up
  int64_t prefix_cache_hits = 0;     // tokens found
  int64_t kv_slots_allocated = 0;    // summed over steps
  int64_t kv_slots_used = 0;         // of them holding a token
};

class Scheduler {
 public:
  explicit Scheduler(const SchedulerConfig& config);
  ~Scheduler();

  // Throws InvalidArgument (numbers named) for what can never fit: an empty prompt, prompt +
  // max_tokens > max_model_len, more blocks than exist; ResourceExhausted for a full queue. Ids
  // ascend in the order of the calls.
  RequestId add_request(SequenceRequest request);
  // Frees its blocks at once. False if unknown or finished already. Allowed while a step is under
  // way (between prepare() and update()): what the step points to stays valid until update().
  bool abort(RequestId id);
  bool has_unfinished() const;

  // Decides the next step. Empty `sequences` = nothing to do. The result is valid until the next
  // call. A step that update() never hears of (its model run failed) changes nothing: its tokens
  // are not computed, and the next schedule() tries them again.
  const SchedulerOutput& schedule();
  // Lays out the inputs of the step that schedule() returned. Throws Error if one of its sequences
  // was aborted meanwhile: schedule() again; InvalidArgument if `step` is not the one under way.
  void prepare(const SchedulerOutput& step, InputBatch* batch) const;
  // Takes in the sampled tokens, one per sampling row in prepare()'s order: one update per
  // scheduled sequence, but none for those aborted meanwhile. The result is valid until the next
  // call. Throws InvalidArgument for another number of tokens, or if `step` is not the one under
  // way.
  const std::vector<SequenceUpdate>& update(const SchedulerOutput& step,
                                            Span<const TokenId> sampled_token_ids);

  // Forgets cached prefixes. False if blocks are in use (nothing is changed then).
  bool reset_prefix_cache();
  SchedulerStats stats() const;
  const SchedulerConfig& config() const;
  const BlockManager& blocks() const;
  // Throws Error on the first broken invariant.
  void check_integrity() const;

 private:
  struct State;
  std::unique_ptr<State> s_;
};

}  // namespace fastpage
