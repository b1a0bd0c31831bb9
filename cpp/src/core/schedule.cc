// What a step computes: first the running sequences, then waiting ones, within the token budget.
#include <algorithm>

#include "core/scheduler_state.h"

namespace fastpage {

const SchedulerOutput& Scheduler::State::schedule() {
  recycle_aborted();
  output.sequences.clear();
  output.block_copies.clear();
  output.num_scheduled_tokens = 0;
  output.num_preempted = 0;
  step_sequences.clear();
  ++output.step_id;
  budget = config.max_num_batched_tokens;
  committed_blocks = 0;

  schedule_running();
  // Whoever was just pushed out must not be let in again in the same breath.
  if (output.num_preempted == 0) schedule_waiting();
  count_slots();
  return output;
}

// Preemption takes from the tail, which this step has not come to yet; the head can always push out
// all the others and fits alone (check_fits), so each step gets somewhere.
void Scheduler::State::schedule_running() {
  for (size_t i = 0; i < running.size() && budget > 0; ++i) {
    Sequence* seq = running[i];
    const int32_t n = chunk(*seq, static_cast<int32_t>(running.size() - i) - 1);
    while (!blocks.grow(seq->row, seq->num_computed_tokens + n)) {
      const bool itself = running.back() == seq;
      preempt_last();
      if (itself) return;
    }
    push(seq, n);
  }
}

void Scheduler::State::schedule_waiting() {
  while (!waiting.empty() && !free_rows.empty() && budget > 0) {
    if (!admit(*waiting.begin())) return;
  }
}

// Room for all the tokens it has is asked for, not only for its first chunk, on top of what is
// promised to the others: else it would soon be pushed out again.
bool Scheduler::State::admit(Sequence* seq) {
  const CachedPrefix prefix = find_prefix(seq);
  const int32_t num_cached_blocks = static_cast<int32_t>(prefix.blocks.size());
  const int32_t needed = blocks.blocks_for(seq->num_tokens()) - num_cached_blocks;
  const int32_t reserved = running.empty() ? 0 : committed_blocks + watermark;
  if (needed > blocks.pool().num_free() - prefix.num_free - reserved) return false;

  waiting.erase(waiting.begin());
  seq->row = free_rows.back();
  free_rows.pop_back();
  running.insert(std::upper_bound(running.begin(), running.end(), seq, ComesFirst()), seq);

  blocks.take_cached(seq->row, prefix.blocks);
  seq->num_computed_tokens = num_cached_blocks * config.block_size;
  seq->num_published_blocks = num_cached_blocks;
  if (seq->num_cached_tokens == kNeverAdmitted) {
    --num_never_admitted;
    seq->num_cached_tokens = seq->num_computed_tokens;
    stats.prefix_cache_queries += seq->num_tokens();
    stats.prefix_cache_hits += seq->num_cached_tokens;
    // Nothing more is allocated for it until it ends.
    seq->tokens.reserve(seq->final_length);
    seq->hashes.reserve(config.enable_prefix_caching ? seq->final_length / config.block_size : 0);
  }
  const int32_t n = chunk(*seq, 0);
  blocks.grow(seq->row, seq->num_computed_tokens + n);
  push(seq, n);
  return true;
}

// How many of its tokens the step computes: a chunk leaves one token of the budget to each running
// sequence behind it, so that a long prompt slows the others down but stops nobody.
int32_t Scheduler::State::chunk(const Sequence& seq, int32_t num_behind) const {
  const int32_t left = seq.num_tokens() - seq.num_computed_tokens;
  if (left == 1) return 1;
  int32_t n = std::min(left, std::max(1, budget - num_behind));
  if (config.long_prefill_token_threshold > 0) {
    n = std::min(n, config.long_prefill_token_threshold);
  }
  return n;
}

void Scheduler::State::push(Sequence* seq, int32_t num_tokens) {
  const int32_t end = seq->num_computed_tokens + num_tokens;
  const bool samples = end == seq->num_tokens();
  if (!samples) {
    committed_blocks += blocks.blocks_for(seq->num_tokens()) - blocks.num_blocks_of(seq->row);
  }
  output.sequences.push_back(
      {seq->id, seq->tag, seq->row, seq->num_computed_tokens, num_tokens, samples});
  output.num_scheduled_tokens += num_tokens;
  step_sequences.push_back(seq);
  seq->last_step = output.step_id;
  budget -= num_tokens;
}

void Scheduler::State::preempt_last() {
  Sequence* seq = running.back();
  running.pop_back();
  release_row(seq);
  seq->num_computed_tokens = 0;
  waiting.insert(seq);
  ++output.num_preempted;
  ++stats.num_preemptions;
}

// A hit leaves at least one token to compute, whose logits are wanted; and all those whose logits
// are wanted as prompt logprobs and not out yet.
CachedPrefix Scheduler::State::find_prefix(Sequence* seq) {
  if (!config.enable_prefix_caching) return {};
  int32_t end = seq->num_tokens() - 1;
  if (seq->next_prompt_logprob < seq->num_prompt_tokens) end = seq->next_prompt_logprob - 1;
  const int32_t num_blocks = end / config.block_size;
  extend_hashes(seq, num_blocks);
  return blocks.find_cached({seq->hashes.data(), static_cast<size_t>(num_blocks)});
}

void Scheduler::State::extend_hashes(Sequence* seq, int32_t num_blocks) const {
  for (int32_t i = static_cast<int32_t>(seq->hashes.size()); i < num_blocks; ++i) {
    const BlockHash parent = i == 0 ? seq->root : seq->hashes[i - 1];
    const TokenId* tokens = seq->tokens.data() + static_cast<int64_t>(i) * config.block_size;
    seq->hashes.push_back(hasher.next(parent, {tokens, static_cast<size_t>(config.block_size)}));
  }
}

// Shared blocks are full, so that every unused slot has one sequence to blame.
void Scheduler::State::count_slots() {
  if (output.sequences.empty()) return;
  int64_t unused = 0;
  for (const Sequence* seq : running) {
    unused += static_cast<int64_t>(blocks.num_blocks_of(seq->row)) * config.block_size -
              seq->num_computed_tokens;
  }
  const BlockPool& pool = blocks.pool();
  const int64_t allocated =
      static_cast<int64_t>(pool.num_blocks() - pool.num_free()) * config.block_size;
  stats.kv_slots_allocated += allocated;
  stats.kv_slots_used += allocated - unused + output.num_scheduled_tokens;
}

}  // namespace fastpage
