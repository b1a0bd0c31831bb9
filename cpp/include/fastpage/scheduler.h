// Continuous batching. There is no prefill phase and no decode phase: every sequence has tokens and
// computed tokens, and a step lets it catch up within a budget. A deterministic state machine: no
// clock, no threads, no randomness; the same calls in the same order give the same steps.
#pragma once

#include <iosfwd>
#include <memory>
#include <string>
#include <vector>

#include "fastpage/block_manager.h"
#include "fastpage/input_batch.h"
#include "fastpage/kv_events.h"
#include "fastpage/sampling_params.h"
#include "fastpage/types.h"

namespace fastpage {

enum class SchedulingPolicy : uint8_t { kFcfs, kPriority };

struct SchedulerConfig {
  int32_t num_blocks = 0;
  int32_t num_host_blocks = 0;  // host tier: evicted blocks go there and come back; 0 = none
  int32_t block_size = 16;
  int32_t max_num_seqs = 256;             // running at once
  int32_t max_num_batched_tokens = 2048;  // per step
  int32_t max_model_len = 2048;           // prompt + output
  int32_t max_num_waiting = 1 << 20;      // never yet admitted; more are refused
  // Of their prompts, each once; 0 = no limit. A request that waits alone may be longer.
  int32_t max_num_waiting_tokens = 0;
  // Fairness among prompts: of one sequence at most that many tokens a step, 0 = no cap; ...
  int32_t long_prefill_token_threshold = 0;
  // ... and at most that many sequences with a prompt partly computed, 0 = no cap. Prompts that fit
  // into what is left of a step go past those that wait for such a place (past 32 of them), and so
  // do prompts that are more urgent than those that have one.
  int32_t max_num_partial_prefills = 0;
  bool enable_prefix_caching = true;
  SchedulingPolicy policy = SchedulingPolicy::kFcfs;
  // A preempted sequence's blocks go to the host tier if moving them (out and in again) costs less
  // than computing them again. This is the cost of moving one block, in tokens computed.
  float swap_cost_per_block = 1.0f;
  // Asynchronous scheduling: with 2, schedule() may be called while the step before is still under
  // way; the tokens that it samples are placeholders until then.
  int32_t max_steps_in_flight = 1;
  // Speculative decoding by prompt lookup: when the last n tokens of a sequence, prompt_lookup_min
  // <= n <= prompt_lookup_max, occurred before, what followed them is proposed, at most
  // num_speculative_tokens; 0 = none. Output is the same as without, greedy or not.
  int32_t num_speculative_tokens = 0;
  int32_t prompt_lookup_min = 2;
  int32_t prompt_lookup_max = 4;
  bool enable_kv_events = false;
  uint64_t hash_key_lo = 0;  // secret of the block hashes; Engine draws one at random
  uint64_t hash_key_hi = 0;
  std::vector<TokenId> eos_token_ids;

  void validate() const;  // throws InvalidArgument
};

// One request: params.num_samples() sequences that continue one prompt, which is computed once.
struct SequenceRequest {
  std::vector<TokenId> prompt_token_ids;
  SamplingParams params;
  uint64_t seed = 0;     // of sample 0; sample i has sample_seed(seed, i)
  int32_t priority = 0;  // smaller = sooner; only with SchedulingPolicy::kPriority
  std::string cache_salt;
  uint64_t tag = 0;  // the caller's own, given back in ScheduledSequence and SequenceUpdate
};

// What SamplingRow::seed says for sample `index` of a request.
uint64_t sample_seed(uint64_t seed, int32_t index);

struct ScheduledSequence {
  RequestId id;
  uint64_t tag;
  int32_t index;                 // of the sample within its request
  int32_t row;                   // of block_tables
  int32_t num_computed_tokens;   // before this step (those of a step still under way included)
  int32_t num_scheduled_tokens;  // >= 1
  // 0 unless the step reaches the last known token; then 1, or 1 + the proposed tokens that are
  // checked, or one for each sample of the request when its prompt ends here.
  int32_t num_sampling_rows;
};

struct SchedulerOutput {
  int64_t step_id = 0;
  std::vector<ScheduledSequence> sequences;
  BlockTransfers transfers;
  int32_t num_scheduled_tokens = 0;
  int32_t num_preempted = 0;  // by this call
};

// What became of one sequence in update().
struct SequenceUpdate {
  RequestId id;
  uint64_t tag;
  int32_t index;  // of the sample; of a finished beam: its rank, 0 = best
  int32_t seq;    // index into the step's sequences (of a sample that is born here: its parent's)
  // What it is longer by: one token, several if proposed ones were accepted, none in the midst of
  // a prompt. Beams: nothing until the search is over, then the whole output of each of the n
  // best. Valid until the next call; points into update()'s argument, beams' excepted.
  Span<const TokenId> new_token_ids;
  int32_t sampling_row;  // of its first new token, the others' follow; -1 if none (beams: -1)
  FinishReason finish_reason;
  TokenId stop_token_id;  // the token that ended it, -1 if none
  int32_t num_prompt_tokens;
  int32_t num_output_tokens;
  int32_t num_cached_tokens;  // of the prompt, found in the prefix cache at first admission
  float score;                // beams only: see SamplingParams::length_penalty
};

struct SchedulerStats {
  int32_t num_waiting = 0;         // sequences, preempted ones included
  int32_t num_never_admitted = 0;  // of the waiting requests: all their samples, born or not; what
                                   // SchedulerConfig::max_num_waiting is the limit of
  int64_t num_waiting_tokens = 0;  // of their prompts: max_num_waiting_tokens is the limit
  int32_t num_running = 0;
  int32_t num_blocks = 0;
  int32_t num_free_blocks = 0;  // cached ones that nobody holds count as free
  int32_t num_host_blocks = 0;
  int32_t num_cached_host_blocks = 0;
  int64_t num_preemptions = 0;          // since the start, like all below
  int64_t num_preemptions_swap = 0;     // of them with the host tier in mind
  int64_t prefix_cache_queries = 0;     // tokens looked up at first admission
  int64_t prefix_cache_hits = 0;        // tokens found
  int64_t preempted_cache_queries = 0;  // the same when a preempted sequence returns
  int64_t preempted_cache_hits = 0;
  int64_t num_blocks_swapped_out = 0;
  int64_t num_blocks_swapped_in = 0;
  int64_t num_blocks_copied = 0;    // copy-on-write
  int64_t num_draft_tokens = 0;     // proposed and checked
  int64_t num_accepted_tokens = 0;  // of them confirmed
  int64_t kv_slots_allocated = 0;   // summed over steps
  int64_t kv_slots_used = 0;        // of them holding a token
};

class Scheduler {
 public:
  explicit Scheduler(const SchedulerConfig& config);
  ~Scheduler();

  // Throws InvalidArgument (numbers named) for what can never fit: an empty prompt, prompt +
  // max_tokens > max_model_len, more blocks than exist; ResourceExhausted for a full queue. Ids
  // ascend in the order of the calls.
  RequestId add_request(SequenceRequest request);
  // Ends the request, or one sample of it; frees its blocks at once. False if unknown or finished
  // already (beams cannot be aborted one by one). Allowed while a step is under way: what the step
  // points to stays valid until update() or discard().
  bool abort(RequestId id);
  bool abort(RequestId id, int32_t index);
  bool has(RequestId id) const;  // not all of it has ended
  bool has_unfinished() const;

  // Adds a sample to the request, which continues what sample `index` has so far, sharing its
  // blocks. Returns its index. Throws InvalidArgument if there is no such sample, if it is in a
  // step under way, its first token is not out yet, or its request is a beam search.
  int32_t fork(RequestId id, int32_t index, uint64_t seed);
  // Proposes tokens that may come next: the next schedule() that reaches the sample's end checks
  // as many as fit. Replaces an earlier proposal. False, and nothing is proposed, if there is no
  // such sample or it is in a step under way; throws InvalidArgument for beams.
  bool propose(RequestId id, int32_t index, Span<const TokenId> token_ids);

  // Decides the next step. Empty `sequences` = nothing to do (with steps under way: not before one
  // of them is updated); such a step is not under way. The result is valid until the schedule()
  // after the next. Throws InvalidArgument if max_steps_in_flight are under way already.
  const SchedulerOutput& schedule();
  // Lays out the inputs of the step that schedule() returned last. Throws Error if one of its
  // sequences was aborted meanwhile: discard() it and schedule() again; InvalidArgument if `step`
  // is not that step.
  void prepare(const SchedulerOutput& step, InputBatch* batch);
  // Takes in the sampled tokens of the oldest step under way, one per sampling row in prepare()'s
  // order: one update per sequence that was scheduled (and one for each sample that is born), but
  // none for those aborted meanwhile. `logprobs`: one per sampling row, or empty if no beam is
  // among them; a beam's row holds what SamplingRow::params->logprobs asked for. The result is
  // valid until the next call. Throws InvalidArgument for another number of tokens, or if `step`
  // is not the oldest one under way. If memory runs out (std::bad_alloc) the step is over, and its
  // requests are aborted.
  const std::vector<SequenceUpdate>& update(const SchedulerOutput& step,
                                            Span<const TokenId> sampled_token_ids,
                                            Span<const TokenLogprobs> logprobs = {});
  // The step failed, or was never run: its tokens are not computed, and will be tried again. So
  // are those of every later step under way, which built upon it.
  void discard(const SchedulerOutput& step);

  // Forgets cached prefixes. False if blocks are in use (nothing is changed then).
  bool reset_prefix_cache();
  // See BlockManager::take_kv_events().
  void take_kv_events(std::vector<KvEvent>* events);
  SchedulerStats stats() const;
  const SchedulerConfig& config() const;
  const BlockManager& blocks() const;
  // Throws Error on the first broken invariant.
  void check_integrity() const;

  // From here on every call that changes anything is written to `log`, with a digest of what each
  // step was; see replay.h. Null = no longer. Throws InvalidArgument after the first request or
  // step: the log would not lead there. `log` must outlive the scheduler or the next record(). If
  // it can take no more (a full disk) the recording ends, and nothing else.
  void record(std::ostream* log);

 private:
  struct State;
  std::unique_ptr<State> s_;
};

}  // namespace fastpage
