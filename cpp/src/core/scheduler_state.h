// The scheduler's insides: scheduler.cc (who is there), schedule.cc (what a step computes),
// prepare.cc (its inputs), update.cc (its results).
#pragma once

#include <memory>
#include <set>
#include <vector>

#include "fastpage/scheduler.h"

namespace fastpage {

inline constexpr int32_t kNoRow = -1;
inline constexpr int32_t kNeverAdmitted = -1;

// One slot of the slab. Hot fields first: a decode step touches the first two cache lines.
struct Sequence {
  // serial << kSlotBits | slot; ascends with arrival. 0: gone.
  RequestId id = 0;
  int32_t slot = 0;
  int32_t priority = 0;  // 0 with SchedulingPolicy::kFcfs
  int32_t row = kNoRow;  // of block_tables, while running
  int32_t num_computed_tokens = 0;
  int32_t num_prompt_tokens = 0;
  int32_t num_published_blocks = 0;  // leading blocks that the pool was told of
  int32_t final_length = 0;
  int32_t num_cached_tokens = kNeverAdmitted;
  int32_t next_prompt_logprob = 0;  // first position whose logprob is still owed; the end if none
  int64_t last_step = -1;           // that scheduled it
  uint64_t tag = 0;
  std::vector<TokenId> tokens;    // prompt and output
  std::vector<BlockHash> hashes;  // of its leading full blocks, as far as they were needed
  BlockHash root;
  uint64_t seed = 0;
  SamplingParams params;

  int32_t num_tokens() const { return static_cast<int32_t>(tokens.size()); }
  int32_t num_output_tokens() const { return num_tokens() - num_prompt_tokens; }
};

// Who comes first, and who yields last. Ids ascend with arrival.
struct ComesFirst {
  bool operator()(const Sequence* a, const Sequence* b) const {
    return a->priority != b->priority ? a->priority < b->priority : a->id < b->id;
  }
};

struct Scheduler::State {
  static constexpr int kSlotBits = 24;

  explicit State(const SchedulerConfig& config);

  RequestId add(SequenceRequest request);
  bool abort(RequestId id);
  Sequence* find(RequestId id) const;

  const SchedulerOutput& schedule();
  void prepare(const SchedulerOutput& step, InputBatch* batch) const;
  const std::vector<SequenceUpdate>& update(const SchedulerOutput& step,
                                            Span<const TokenId> sampled);
  void check_integrity() const;

  // schedule.cc
  void schedule_running();
  void schedule_waiting();
  bool admit(Sequence* seq);
  int32_t chunk(const Sequence& seq, int32_t num_behind) const;
  void push(Sequence* seq, int32_t num_tokens);
  void preempt_last();
  CachedPrefix find_prefix(Sequence* seq);
  void extend_hashes(Sequence* seq, int32_t num_blocks) const;
  void count_slots();

  // update.cc
  void take_sample(Sequence* seq, TokenId token, SequenceUpdate* news) const;
  void publish(Sequence* seq);
  void drop_finished();

  // scheduler.cc
  int32_t new_slot();
  void release_row(Sequence* seq);
  void recycle(Sequence* seq);  // its slot may be given to another
  void recycle_aborted();
  bool step_under_way() const { return !step_sequences.empty(); }

  SchedulerConfig config;
  BlockHasher hasher;
  BlockManager blocks;
  int32_t watermark;  // blocks that admission leaves free for the running to grow into

  std::vector<std::unique_ptr<Sequence>> slots;
  std::vector<int32_t> free_slots;
  std::vector<int32_t> free_rows;
  uint64_t next_serial = 1;

  std::vector<Sequence*> running;           // ordered by ComesFirst
  std::set<Sequence*, ComesFirst> waiting;  // new and preempted
  int32_t num_never_admitted = 0;           // of the waiting

  // The step under way.
  SchedulerOutput output;
  std::vector<Sequence*> step_sequences;  // same order as output.sequences
  std::vector<Sequence*> aborted;         // during it: slots that the step still points to
  int32_t budget = 0;                     // tokens it has left
  int32_t committed_blocks = 0;  // that the running still need for tokens they have already
  std::vector<SequenceUpdate> updates;

  SchedulerStats stats;
};

}  // namespace fastpage
