// The scheduler's insides: scheduler.cc (who is there), schedule.cc (what a step computes),
// prepare.cc (its inputs), update.cc (its results), beams.cc (beam groups), integrity.cc.
#pragma once

#include <memory>
#include <set>
#include <vector>

#include "core/beam_search.h"
#include "core/recorder.h"
#include "fastpage/scheduler.h"

namespace fastpage {

inline constexpr int32_t kNoRow = -1;
inline constexpr int32_t kNeverAdmitted = -1;
inline constexpr int32_t kMaxStepsInFlight = 2;

struct SequenceGroup;

// One continuation of a prompt. A decode step touches the first two cache lines and the end of
// `tokens`, no more: hence what is copied here from the group.
//
//   tokens:  [ prompt | output | placeholders ][ drafts ]
//             <---------- num_tokens -------->
struct alignas(64) Sequence {
  RequestId id = 0;      // of its request
  uint64_t tag = 0;      // its request's
  int32_t index = 0;     // of the sample within it; of a beam, any number unique within it
  int32_t row = kNoRow;  // of block_tables, while running
  int32_t num_tokens = 0;
  int32_t num_computed_tokens = 0;   // by steps that are done
  int32_t num_in_flight_tokens = 0;  // by steps under way
  int32_t num_placeholders = 0;      // tokens that steps under way will sample
  int32_t num_prompt_tokens = 0;
  int32_t final_length = 0;
  int32_t num_published_blocks = 0;  // leading blocks that the pool was told of
  int32_t num_drafts = 0;
  int32_t num_steps_in_flight = 0;  // that point to it

  bool dead = false;           // ended; recycled once no step points to it
  bool shares_tail = false;    // others may hold the block that it writes next
  bool awaits_result = false;  // nothing to compute before the step under way is known
  bool paused = false;         // a beam that has its candidates, when others have not
  bool is_beam = false;
  bool uses_hashes = false;            // its request's
  bool wants_prompt_logprobs = false;  // computes the prompt, whose logprobs are asked for
  int32_t num_cached_tokens = 0;       // its request's
  int32_t min_length = 0;              // no stop token before that many tokens
  Span<const TokenId> stop_token_ids;  // its group's
  std::vector<TokenId> tokens;

  std::vector<BlockHash> hashes;  // of its leading full blocks, as far as they were needed
  SequenceGroup* group = nullptr;
  uint64_t seed = 0;
  int32_t priority = 0;               // 0 with SchedulingPolicy::kFcfs
  int32_t sampling_row = 0;           // in the newest step that samples for it
  int32_t previous_sampling_row = 0;  // in the one before

  int32_t num_output_tokens() const { return num_tokens - num_prompt_tokens; }
  // Computed once the steps under way are done.
  int32_t num_scheduled() const { return num_computed_tokens + num_in_flight_tokens; }
  int32_t num_left() const { return num_tokens - num_scheduled(); }
  Span<const TokenId> output() const {
    return {tokens.data() + num_prompt_tokens, static_cast<size_t>(num_output_tokens())};
  }
};

struct BeamGroup {
  BeamSearch search;
  std::vector<Sequence*> beams;  // in the order of the search's last step
  // Of those that have them (Sequence::paused), at the beam's place.
  std::vector<TokenLogprobs> candidates;
  size_t num_ready = 0;
  int32_t next_index = 1;
};

// One request. Its slot of the slab is part of its id.
struct SequenceGroup {
  RequestId id = 0;  // serial << kSlotBits | slot; ascends with arrival. 0: all of it has ended
  int32_t slot = 0;
  int32_t num_alive = 0;      // samples that have not ended, unborn ones included
  int32_t num_sequences = 0;  // that point here
  int32_t num_prompt_tokens = 0;
  int32_t num_cached_tokens = kNeverAdmitted;
  int32_t next_prompt_logprob = 0;  // first position whose logprob is still owed; the end if none
  bool announce = false;            // its blocks, in the KV events
  uint64_t seed = 0;
  BlockHash root;
  std::vector<TokenId> stop_token_ids;  // all that end it, ascending
  SamplingParams params;
  std::vector<Sequence*> samples;  // by index, null if not alive; empty for beams
  std::vector<int32_t> unborn;     // samples that begin where the prompt ends
  std::unique_ptr<BeamGroup> beams;
};

// Who comes first, and who yields last. Ids ascend with arrival.
struct ComesFirst {
  bool operator()(const Sequence* a, const Sequence* b) const {
    if (a->priority != b->priority) return a->priority < b->priority;
    return a->id != b->id ? a->id < b->id : a->index < b->index;
  }
};

struct ScheduledEntry {
  Sequence* seq;
  int32_t num_drafts;
  bool splits;           // into the request's samples, a sampling row for each by index
  bool needs_transfers;  // its KV is not there unless the step's transfers are done
};

struct Step {
  SchedulerOutput output;
  std::vector<ScheduledEntry> entries;  // same order as output.sequences
  int32_t num_sampling_rows = 0;
  bool has_beams = false;
};

struct Scheduler::State {
  static constexpr int kSlotBits = 24;

  explicit State(const SchedulerConfig& config);

  // scheduler.cc
  RequestId add(SequenceRequest request);
  void begin(Sequence* leader, SequenceRequest request);
  bool abort(RequestId id);
  bool abort(RequestId id, int32_t index);
  int32_t fork(RequestId id, int32_t index, uint64_t seed);
  bool propose(RequestId id, int32_t index, Span<const TokenId> token_ids);
  SequenceGroup* find(RequestId id) const;
  Sequence* find(RequestId id, int32_t index) const;
  SequenceGroup* new_group();
  Sequence* new_sequence(SequenceGroup* group, int32_t index);
  Sequence* fork(Sequence* parent, int32_t index);
  void enter_running(Sequence* seq);
  void leave_queues(Sequence* seq);
  void release_row(Sequence* seq, Keep keep);
  Keep keep_when_ended() const;
  void end_sample(Sequence* seq);
  void end_unborn(SequenceGroup* group, int32_t index);
  void count_down(SequenceGroup* group);
  void bury(Sequence* seq);
  void recycle(Sequence* seq);
  void recycle(SequenceGroup* group);
  bool reset_prefix_cache();
  SchedulerStats current_stats() const;

  // schedule.cc
  const SchedulerOutput& schedule();
  void fill_step();
  void schedule_running();
  size_t admit_more_urgent(size_t next);
  void schedule_waiting(bool force);
  void schedule_by_force();
  enum class Admission : uint8_t { kDone, kLater, kNoRoom };
  Admission admit(Sequence* seq, bool force);
  bool waits_for_sibling(const Sequence& seq) const;
  bool would_fit_without(const Sequence& seq);
  int32_t chunk(const Sequence& seq, int32_t num_behind) const;
  int32_t add_drafts(Sequence* seq, int32_t num_tokens, int32_t num_behind);
  bool reserve(Sequence* seq, int32_t num_tokens, bool* copies);
  void push(Sequence* seq, int32_t num_tokens, int32_t num_drafts, bool needs_transfers);
  void expect_result(Sequence* seq, bool must_be_known);
  void preempt_last();
  void lose_blocks(Sequence* seq, Keep keep);
  bool swap_is_cheaper(const Sequence& seq) const;
  CachedPrefix find_prefix(Sequence* seq);
  void extend_hashes(Sequence* seq, int32_t num_blocks) const;
  void count_slots();

  // prepare.cc
  void prepare(const SchedulerOutput& step, InputBatch* batch);
  void ask_samples(const ScheduledEntry& entry, const ScheduledSequence& scheduled, int32_t index,
                   int32_t at, InputBatch* batch) const;
  void lend_block_tables(InputBatch* batch) const;

  // update.cc
  const std::vector<SequenceUpdate>& update(const SchedulerOutput& step,
                                            Span<const TokenId> sampled,
                                            Span<const TokenLogprobs> logprobs);
  void check_results(const Step& step, Span<const TokenId> sampled,
                     Span<const TokenLogprobs> logprobs) const;
  void discard(const SchedulerOutput& step);
  void discard_newest();
  void take_in(const Step& step, size_t i, int32_t row, Span<const TokenId> sampled);
  void take_tokens(const ScheduledEntry& entry, int32_t position, Span<const TokenId> sampled,
                   SequenceUpdate* news);
  void advance(Sequence* seq, int32_t num_scheduled, int32_t num_kept);
  void bear_samples(Sequence* leader, int32_t row, Span<const TokenId> sampled);
  void publish(Sequence* seq);
  void drop_dead();
  void end_oldest();
  void give_up_oldest(size_t num_taken_in);

  // beams.cc
  void start_beams(SequenceGroup* group, Sequence* leader);
  void take_candidates(Sequence* seq, const TokenLogprobs& logprobs, int32_t entry);
  void advance_beams(SequenceGroup* group, int32_t entry);
  void replace_beams(SequenceGroup* group, const std::vector<BeamContinuation>& next);
  void finish_beams(SequenceGroup* group, int32_t entry);
  void end_beams(SequenceGroup* group);

  // integrity.cc
  void check_groups() const;
  void check_integrity() const;

  Step& newest() { return steps[(oldest_step + num_steps - 1) % kMaxStepsInFlight]; }
  Step& oldest() { return steps[oldest_step]; }
  bool speculates() const { return config.num_speculative_tokens > 0; }

  SchedulerConfig config;
  BlockHasher hasher;
  BlockManager blocks;
  int32_t watermark;  // blocks that admission leaves free for the running to grow into

  std::vector<std::unique_ptr<SequenceGroup>> groups;  // by slot
  std::vector<int32_t> free_slots;
  std::vector<std::unique_ptr<Sequence>> sequences;
  std::vector<Sequence*> free_sequences;
  std::vector<int32_t> free_rows;
  uint64_t next_serial = 1;

  std::vector<Sequence*> running;           // ordered by ComesFirst
  std::set<Sequence*, ComesFirst> waiting;  // new and preempted
  int32_t num_never_admitted = 0;           // samples of the waiting requests
  int64_t num_waiting_tokens = 0;           // of their prompts
  std::vector<Sequence*> dead;              // ended, but still in `running` or in a step

  // Steps under way: num_steps of them from oldest_step on, in a ring.
  Step steps[kMaxStepsInFlight];
  int32_t oldest_step = 0;
  int32_t num_steps = 0;
  int64_t next_step_id = 1;

  // While schedule() runs.
  Step* step = nullptr;
  int32_t budget = 0;            // tokens it has left
  int32_t committed_blocks = 0;  // that the running still need for tokens they have already
  int32_t num_partial = 0;       // scheduled sequences that do not reach their end
  std::vector<int32_t> num_holders_gone;  // by block: would_fit_without()'s, 0 outside

  std::vector<SequenceUpdate> updates;
  std::vector<std::unique_ptr<BeamHypothesis>> finished_hypotheses;  // `updates` points there
  Span<const TokenLogprobs> logprobs;                                // update()'s argument
  SchedulerStats stats;
  std::unique_ptr<Recorder> recorder;  // if the calls are recorded
};

}  // namespace fastpage
