#include "fastpage/scheduler.h"

#include <algorithm>

#include "core/admission.h"
#include "core/scheduler_state.h"

namespace fastpage {

namespace {

BlockManagerConfig block_manager_config(const SchedulerConfig& config) {
  BlockManagerConfig out;
  out.num_blocks = config.num_blocks;
  out.block_size = config.block_size;
  out.max_num_seqs = config.max_num_seqs;
  out.max_model_len = config.max_model_len;
  out.enable_prefix_caching = config.enable_prefix_caching;
  return out;
}

const SchedulerConfig& validated(const SchedulerConfig& config) {
  config.validate();
  return config;
}

void require(bool ok, const char* what, const Sequence& seq) {
  if (!ok) throw Error("sequence " + std::to_string(seq.id) + ": " + what);
}

}  // namespace

Scheduler::State::State(const SchedulerConfig& c)
    : config(validated(c)),
      hasher(c.hash_key_lo, c.hash_key_hi),
      blocks(block_manager_config(c)),
      watermark(c.num_blocks / 100) {
  for (int32_t row = config.max_num_seqs - 1; row >= 0; --row) free_rows.push_back(row);
  running.reserve(config.max_num_seqs);
  output.sequences.reserve(config.max_num_seqs);
  step_sequences.reserve(config.max_num_seqs);
  updates.reserve(config.max_num_seqs);
  aborted.reserve(config.max_num_seqs);
}

RequestId Scheduler::State::add(SequenceRequest request) {
  check_fits(config, request.prompt_token_ids.size(), request.params);
  check_queue(config, num_never_admitted, 1);
  const int32_t slot = new_slot();
  Sequence* seq = slots[slot].get();
  seq->id = next_serial++ << kSlotBits | static_cast<RequestId>(slot);
  seq->priority = config.policy == SchedulingPolicy::kPriority ? request.priority : 0;
  seq->num_prompt_tokens = static_cast<int32_t>(request.prompt_token_ids.size());
  seq->final_length = final_length(config, request.prompt_token_ids.size(), request.params);
  const bool wants_prompt_logprobs = request.params.prompt_logprobs >= 0;
  seq->next_prompt_logprob = wants_prompt_logprobs ? 1 : seq->num_prompt_tokens;
  seq->tag = request.tag;
  seq->tokens = std::move(request.prompt_token_ids);
  seq->root = hasher.root(request.cache_salt);
  seq->seed = request.seed;
  seq->params = std::move(request.params);
  waiting.insert(seq);
  ++num_never_admitted;
  return seq->id;
}

bool Scheduler::State::abort(RequestId id) {
  Sequence* seq = find(id);
  if (seq == nullptr) return false;
  if (seq->row == kNoRow) {
    num_never_admitted -= seq->num_cached_tokens == kNeverAdmitted;
    waiting.erase(seq);
  } else {
    running.erase(std::lower_bound(running.begin(), running.end(), seq, ComesFirst()));
    release_row(seq);
  }
  if (step_under_way() && seq->last_step == output.step_id) {
    seq->id = 0;
    aborted.push_back(seq);
  } else {
    recycle(seq);
  }
  return true;
}

Sequence* Scheduler::State::find(RequestId id) const {
  const uint64_t slot = id & ((uint64_t{1} << kSlotBits) - 1);
  if (id == 0 || slot >= slots.size() || slots[slot]->id != id) return nullptr;
  return slots[slot].get();
}

int32_t Scheduler::State::new_slot() {
  if (free_slots.empty()) {
    slots.push_back(std::make_unique<Sequence>());
    slots.back()->slot = static_cast<int32_t>(slots.size()) - 1;
    return slots.back()->slot;
  }
  const int32_t slot = free_slots.back();
  free_slots.pop_back();
  return slot;
}

void Scheduler::State::release_row(Sequence* seq) {
  blocks.free(seq->row);
  free_rows.push_back(seq->row);
  seq->row = kNoRow;
}

void Scheduler::State::recycle(Sequence* seq) {
  const int32_t slot = seq->slot;
  *seq = Sequence();
  seq->slot = slot;
  free_slots.push_back(slot);
}

void Scheduler::State::recycle_aborted() {
  for (Sequence* seq : aborted) recycle(seq);
  aborted.clear();
}

void Scheduler::State::check_integrity() const {
  blocks.check_integrity();
  int32_t num_held_rows = 0;
  for (const Sequence* seq : running) {
    require(find(seq->id) == seq, "running, yet not to be found", *seq);
    require(seq->row != kNoRow, "running without a row", *seq);
    require(seq->num_computed_tokens < seq->num_tokens(), "running with nothing to compute", *seq);
    require(seq->num_tokens() < seq->final_length, "running past its end", *seq);
    const int32_t num_blocks = blocks.num_blocks_of(seq->row);
    require(num_blocks >= blocks.blocks_for(seq->num_computed_tokens),
            "computed more than it holds", *seq);
    const int32_t num_full = seq->num_computed_tokens / config.block_size;
    require(seq->num_published_blocks <= num_full, "published more than it computed", *seq);
    for (int32_t i = 0; i < num_blocks; ++i) {
      const Block& block = blocks.pool().block(blocks.block_at(seq->row, i));
      if (!block.hash) {
        require(block.ref_count == 1, "shares a block that is not published", *seq);
      } else {
        require(i < num_full, "holds a published block that is not computed", *seq);
        require(block.hash == seq->hashes[i], "holds a block of other contents", *seq);
      }
    }
    ++num_held_rows;
  }
  if (!std::is_sorted(running.begin(), running.end(), ComesFirst())) {
    throw Error("the running sequences are out of order");
  }
  int32_t num_new = 0;
  for (const Sequence* seq : waiting) {
    require(find(seq->id) == seq, "waiting, yet not to be found", *seq);
    require(seq->row == kNoRow, "waiting with a row", *seq);
    require(seq->num_computed_tokens == 0, "waiting with computed tokens", *seq);
    num_new += seq->num_cached_tokens == kNeverAdmitted;
  }
  if (num_new != num_never_admitted) throw Error("miscounted the sequences never admitted");
  for (int32_t row = 0; row < config.max_num_seqs; ++row) {
    if (blocks.num_blocks_of(row) > 0) --num_held_rows;
  }
  if (num_held_rows != 0) throw Error("a block table row has no sequence, or none a row");
  if (free_rows.size() + running.size() != static_cast<size_t>(config.max_num_seqs)) {
    throw Error("a block table row was lost");
  }
  if (free_slots.size() + running.size() + waiting.size() + aborted.size() != slots.size()) {
    throw Error("a slot was lost");
  }
}

Scheduler::Scheduler(const SchedulerConfig& config) : s_(std::make_unique<State>(config)) {}
Scheduler::~Scheduler() = default;

RequestId Scheduler::add_request(SequenceRequest request) { return s_->add(std::move(request)); }
bool Scheduler::abort(RequestId id) { return s_->abort(id); }
bool Scheduler::has_unfinished() const { return !s_->running.empty() || !s_->waiting.empty(); }
const SchedulerOutput& Scheduler::schedule() { return s_->schedule(); }

void Scheduler::prepare(const SchedulerOutput& step, InputBatch* batch) const {
  s_->prepare(step, batch);
}

const std::vector<SequenceUpdate>& Scheduler::update(const SchedulerOutput& step,
                                                     Span<const TokenId> sampled_token_ids) {
  return s_->update(step, sampled_token_ids);
}

bool Scheduler::reset_prefix_cache() {
  BlockPool& pool = s_->blocks.pool();
  if (pool.num_free() != pool.num_blocks()) return false;
  pool.reset_prefix_cache();
  return true;
}

SchedulerStats Scheduler::stats() const {
  SchedulerStats stats = s_->stats;
  stats.num_waiting = static_cast<int32_t>(s_->waiting.size());
  stats.num_running = static_cast<int32_t>(s_->running.size());
  stats.num_blocks = s_->config.num_blocks;
  stats.num_free_blocks = s_->blocks.pool().num_free();
  return stats;
}

const SchedulerConfig& Scheduler::config() const { return s_->config; }
const BlockManager& Scheduler::blocks() const { return s_->blocks; }
void Scheduler::check_integrity() const { s_->check_integrity(); }

}  // namespace fastpage
