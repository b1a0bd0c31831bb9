// What a step computes: first the running sequences, then waiting ones, within the token budget.
#include <algorithm>

#include "core/prompt_lookup.h"
#include "core/scheduler_state.h"

namespace fastpage {

namespace {

// How many waiting sequences that must stay are passed over in search of one that may go.
constexpr int32_t kMaxPassedOver = 32;

// A token's cost grows with what it attends to: at this context its attention costs as much as all
// the rest (a model of 135 M parameters; larger ones come later).
constexpr float kAttentionParity = 4096;

}  // namespace

const SchedulerOutput& Scheduler::State::schedule() {
  if (num_steps == config.max_steps_in_flight) {
    throw InvalidArgument(
        "schedule() with " + std::to_string(num_steps) + " steps under way, max_steps_in_flight " +
        std::to_string(config.max_steps_in_flight) + ": update() or discard() the oldest first");
  }
  step = &steps[(oldest_step + num_steps) % kMaxStepsInFlight];
  SchedulerOutput& output = step->output;
  output.sequences.clear();
  output.transfers.clear();
  output.num_scheduled_tokens = 0;
  output.num_preempted = 0;
  output.step_id = next_step_id++;
  step->entries.clear();
  step->num_sampling_rows = 0;
  step->has_beams = false;
  blocks.begin_step(&output.transfers);
  budget = config.max_num_batched_tokens;
  committed_blocks = 0;
  num_partial = 0;

  try {
    fill_step();
  } catch (...) {  // memory ran out: nobody is to wait for a step that never comes
    ++num_steps;
    discard_newest();
    throw;
  }
  if (!output.sequences.empty()) {
    ++num_steps;
    count_slots();
  }
  return output;
}

void Scheduler::State::fill_step() {
  schedule_running();
  // Whoever was just pushed out is first in line, and may have to wait for a step that computes it:
  // nobody else is to get its blocks meanwhile.
  if (step->output.num_preempted == 0) schedule_waiting(/*force=*/false);
  if (step->output.sequences.empty() && num_steps == 0) schedule_by_force();
}

// Would it, were all that are less urgent gone?
bool Scheduler::State::would_fit_without(const Sequence& seq) {
  num_holders_gone.resize(config.num_blocks, 0);
  const auto for_their_blocks = [&](auto f) {
    for (auto it = running.rbegin(); it != running.rend() && (*it)->priority > seq.priority; ++it) {
      const int32_t row = (*it)->row;
      for (int32_t i = 0; i < blocks.num_blocks_of(row); ++i) f(blocks.block_at(row, i));
    }
  };
  int32_t num_free = blocks.pool().num_free();
  for_their_blocks(
      [&](BlockId id) { num_free += ++num_holders_gone[id] == blocks.pool().block(id).ref_count; });
  for_their_blocks([&](BlockId id) { num_holders_gone[id] = 0; });
  return blocks.blocks_for(seq.num_tokens) + committed_blocks + watermark <= num_free;
}

// Preemption takes from the tail, which this step has not come to yet; the head can always push out
// all the others and fits alone (check_fits), so each step gets somewhere.
void Scheduler::State::schedule_running() {
  for (size_t i = 0; i < running.size() && budget > 0; ++i) {
    if (config.policy == SchedulingPolicy::kPriority) {
      i += admit_more_urgent(i);
      if (i == running.size() || budget == 0) return;
    }
    Sequence* seq = running[i];
    const int32_t num_behind = static_cast<int32_t>(running.size() - i) - 1;
    const int32_t n = chunk(*seq, num_behind);
    if (n == 0) continue;
    bool copies = false;
    while (!reserve(seq, seq->num_scheduled() + n, &copies)) {
      const bool itself = running.back() == seq;
      preempt_last();
      if (itself) return;
    }
    push(seq, n, add_drafts(seq, n, num_behind), copies);
  }
}

// Those of the waiting that are more urgent than running[next] go before it. Whoever does not find
// room pushes out the least urgent of the running; but nobody is pushed out unless that makes the
// room. Returns how many were admitted, all of them to places before running[next].
size_t Scheduler::State::admit_more_urgent(size_t next) {
  size_t num_admitted = 0;
  while (next + num_admitted < running.size() && budget > 0) {
    const auto first = std::find_if(waiting.begin(), waiting.end(),
                                    [](const Sequence* seq) { return !seq->paused; });
    if (first == waiting.end()) break;
    Sequence* seq = *first;
    if (seq->priority >= running[next + num_admitted]->priority) break;
    const bool has_row = !free_rows.empty();
    const Admission admission = has_row ? admit(seq, /*force=*/false) : Admission::kNoRoom;
    if (admission == Admission::kDone) {
      ++num_admitted;
    } else if (admission == Admission::kLater || !would_fit_without(*seq)) {
      break;
    } else {
      preempt_last();
    }
  }
  return num_admitted;
}

void Scheduler::State::schedule_waiting(bool force) {
  int32_t num_passed_over = 0;
  for (auto it = waiting.begin(); it != waiting.end() && !free_rows.empty() && budget > 0;) {
    Sequence* seq = *it++;
    if (seq->paused) continue;  // not counted: there may be many before the one they all wait for
    const Admission admission = admit(seq, force);
    if (admission == Admission::kNoRoom) return;
    if (admission == Admission::kLater && ++num_passed_over > kMaxPassedOver) return;
    if (force && admission == Admission::kDone) return;
  }
}

// Nothing moves when all that run are beams, which wait for siblings that find no room. The first
// of those may take what is kept free for growth, then what the last of the running hold: so the
// first group gets on, and it fits alone (check_fits).
void Scheduler::State::schedule_by_force() {
  schedule_waiting(/*force=*/true);
  while (step->output.sequences.empty() && !waiting.empty() && !running.empty()) {
    preempt_last();
    schedule_waiting(/*force=*/true);
  }
}

// Room for all the tokens it has is asked for, not only for its first chunk, on top of what is
// promised to the others: else it would soon be pushed out again.
Scheduler::State::Admission Scheduler::State::admit(Sequence* seq, bool force) {
  SequenceGroup* group = seq->group;
  // Pushed out while a step computes it: what that brings (a token, prompt logprobs) comes first.
  if (seq->num_steps_in_flight > 0 || waits_for_sibling(*seq)) return Admission::kLater;
  const CachedPrefix prefix = find_prefix(seq);
  const int32_t num_cached_blocks = static_cast<int32_t>(prefix.blocks.size());
  const int32_t num_cached = num_cached_blocks * config.block_size;
  const int32_t left = seq->num_tokens - num_cached;
  int32_t n = std::min(left, budget);
  if (config.long_prefill_token_threshold > 0) {
    n = std::min(n, config.long_prefill_token_threshold);
  }
  if (n < left && config.max_num_partial_prefills > 0 &&
      num_partial >= config.max_num_partial_prefills) {
    return Admission::kLater;
  }
  const int32_t needed = blocks.blocks_for(seq->num_tokens) - prefix.num_held;
  const int32_t reserved = running.empty() || force ? 0 : committed_blocks + watermark;
  if (needed > blocks.pool().num_free() - reserved) return Admission::kNoRoom;

  // Nothing more is allocated for it until it ends.
  seq->tokens.reserve(seq->final_length);
  seq->hashes.reserve(seq->uses_hashes ? seq->final_length / config.block_size : 0);
  waiting.erase(seq);
  enter_running(seq);
  seq->num_published_blocks = blocks.take_cached(seq->row, prefix.blocks);
  seq->num_computed_tokens = num_cached;
  if (group->num_cached_tokens == kNeverAdmitted) {
    num_never_admitted -= group->num_alive;
    num_waiting_tokens -= group->num_prompt_tokens;
    group->num_cached_tokens = num_cached;
    stats.prefix_cache_queries += seq->num_tokens;
    stats.prefix_cache_hits += num_cached;
  } else {
    stats.preempted_cache_queries += seq->num_tokens;
    stats.preempted_cache_hits += num_cached;
  }
  seq->num_cached_tokens = group->num_cached_tokens;
  blocks.grow(seq->row, num_cached + n);
  push(seq, n, 0, /*needs_transfers=*/prefix.num_on_host > 0);
  return Admission::kDone;
}

// Who shares a prompt with a sibling that is just computing it takes it from there, once it is.
bool Scheduler::State::waits_for_sibling(const Sequence& seq) const {
  const SequenceGroup& group = *seq.group;
  if (group.num_sequences == 1) return false;
  const int32_t shared = seq.num_prompt_tokens / config.block_size * config.block_size;
  const auto computes_it = [&](const Sequence* sibling) {
    return sibling != nullptr && sibling->row != kNoRow && sibling->num_computed_tokens < shared;
  };
  const auto& siblings = group.beams != nullptr ? group.beams->beams : group.samples;
  return std::any_of(siblings.begin(), siblings.end(), computes_it);
}

// How many of its tokens the step computes: a chunk leaves one token of the budget to each running
// sequence behind it, so that a long prompt slows the others down but stops nobody. 0: it has to
// wait for a result.
int32_t Scheduler::State::chunk(const Sequence& seq, int32_t num_behind) const {
  if (seq.awaits_result || seq.paused) return 0;
  const int32_t left = seq.num_left();
  // The token under way is its last.
  if (seq.num_placeholders > 0 && seq.num_tokens >= seq.final_length) return 0;
  if (left == 1) return 1;
  int32_t n = std::min(left, std::max(1, budget - num_behind));
  if (config.long_prefill_token_threshold > 0) {
    n = std::min(n, config.long_prefill_token_threshold);
  }
  return n;
}

// Proposed tokens are checked where there is room for them: nobody is held up or pushed out.
int32_t Scheduler::State::add_drafts(Sequence* seq, int32_t num_tokens, int32_t num_behind) {
  const bool reaches_end = num_tokens == seq->num_left();
  if (!reaches_end || (seq->num_drafts == 0 && !speculates())) return 0;
  if (seq->is_beam || !seq->group->unborn.empty()) return 0;
  const int32_t room =
      std::min(seq->final_length - seq->num_tokens - 1, budget - num_tokens - num_behind);
  if (room <= 0) return 0;
  if (seq->num_drafts == 0) {
    const int32_t at = look_up_continuation({seq->tokens.data(), size_t(seq->num_tokens)},
                                            config.prompt_lookup_min, config.prompt_lookup_max);
    if (at < 0) return 0;
    seq->num_drafts = std::min(room, config.num_speculative_tokens);
    // It may run on into what it proposes: a text that repeats itself goes on doing so.
    for (int32_t i = 0; i < seq->num_drafts; ++i) seq->tokens.push_back(seq->tokens[at + i]);
  }
  int32_t num_drafts = std::min(room, seq->num_drafts);
  if (!blocks.grow(seq->row, seq->num_tokens + num_drafts)) {
    num_drafts = blocks.num_blocks_of(seq->row) * config.block_size - seq->num_tokens;
  }
  return num_drafts;
}

// Blocks for its first `num_tokens`, those to be written being its own. All or nothing.
bool Scheduler::State::reserve(Sequence* seq, int32_t num_tokens, bool* copies) {
  if (!seq->shares_tail) return blocks.grow(seq->row, num_tokens);
  const int32_t tail = seq->num_scheduled() / config.block_size;
  const bool is_shared = blocks.pool().block(blocks.block_at(seq->row, tail)).ref_count > 1;
  const int32_t needed = blocks.blocks_for(num_tokens) - blocks.num_blocks_of(seq->row);
  if (std::max(0, needed) + is_shared > blocks.pool().num_free()) return false;
  blocks.make_writable(seq->row, tail);
  blocks.grow(seq->row, num_tokens);
  seq->shares_tail = false;
  *copies = is_shared;
  return true;
}

void Scheduler::State::push(Sequence* seq, int32_t num_tokens, int32_t num_drafts,
                            bool needs_transfers) {
  const int32_t begin = seq->num_scheduled();
  int32_t num_rows = 0;
  bool splits = false;
  if (begin + num_tokens == seq->num_tokens) {
    num_rows = 1 + num_drafts;
    if (seq->num_output_tokens() == 0 && !seq->group->unborn.empty()) {
      splits = true;
      num_rows = static_cast<int32_t>(seq->group->samples.size());
    }
    expect_result(seq, /*must_be_known=*/splits || num_drafts > 0 || seq->is_beam);
  } else {
    ++num_partial;
    // (After a discarded step it may hold more than that: blocks for proposed tokens.)
    committed_blocks +=
        std::max(0, blocks.blocks_for(seq->num_tokens) - blocks.num_blocks_of(seq->row));
  }
  num_tokens += num_drafts;
  SchedulerOutput& output = step->output;
  // Filled in where they lie: a copy from the stack waits for its stores.
  ScheduledSequence& scheduled = output.sequences.emplace_back();
  scheduled.id = seq->id;
  scheduled.tag = seq->tag;
  scheduled.index = seq->index;
  scheduled.row = seq->row;
  scheduled.num_computed_tokens = begin;
  scheduled.num_scheduled_tokens = num_tokens;
  scheduled.num_sampling_rows = num_rows;
  output.num_scheduled_tokens += num_tokens;
  ScheduledEntry& entry = step->entries.emplace_back();
  entry.seq = seq;
  entry.num_drafts = num_drafts;
  entry.splits = splits;
  entry.needs_transfers = needs_transfers;
  step->num_sampling_rows += num_rows;
  step->has_beams |= seq->is_beam;
  seq->num_in_flight_tokens += num_tokens;
  ++seq->num_steps_in_flight;
  budget -= num_tokens;
}

// A placeholder stands for the token that the step will sample, if another step may be scheduled
// before that is known.
void Scheduler::State::expect_result(Sequence* seq, bool must_be_known) {
  if (must_be_known || speculates() || config.max_steps_in_flight == 1) {
    seq->awaits_result = true;
    return;
  }
  seq->previous_sampling_row = seq->sampling_row;
  seq->sampling_row = step->num_sampling_rows;
  seq->tokens.resize(seq->num_tokens);  // without drafts that found no room
  seq->num_drafts = 0;
  seq->tokens.push_back(-1);
  ++seq->num_tokens;
  ++seq->num_placeholders;
}

void Scheduler::State::preempt_last() {
  Sequence* seq = running.back();
  const bool swaps = config.num_host_blocks > 0 && swap_is_cheaper(*seq);
  lose_blocks(seq, swaps ? Keep::kOffload : Keep::kCache);
  running.pop_back();
  ++step->output.num_preempted;
  ++stats.num_preemptions;
  stats.num_preemptions_swap += swaps;
}

void Scheduler::State::lose_blocks(Sequence* seq, Keep keep) {
  waiting.insert(seq);  // first: memory may run out
  release_row(seq, keep);
  seq->num_computed_tokens = 0;
  seq->num_in_flight_tokens = 0;
  seq->num_published_blocks = 0;
}

// Of the blocks that go with it. What is on the host already need only come back.
bool Scheduler::State::swap_is_cheaper(const Sequence& seq) const {
  float swap = 0;
  float recompute = 0;
  const auto block_size = static_cast<float>(config.block_size);
  for (int32_t i = 0; i < seq.num_published_blocks; ++i) {
    const BlockId id = blocks.block_at(seq.row, i);
    if (blocks.pool().block(id).ref_count > 1) continue;
    const bool on_host = blocks.host_pool().find(seq.hashes[i]) != kNoBlock;
    swap += config.swap_cost_per_block * (on_host ? 0.5f : 1.0f);
    recompute += block_size * (1 + static_cast<float>(i) * block_size / kAttentionParity);
  }
  return swap < recompute;
}

// A hit leaves at least one token to compute, whose logits are wanted; and all those whose logits
// are wanted as prompt logprobs and not out yet.
CachedPrefix Scheduler::State::find_prefix(Sequence* seq) {
  if (!seq->uses_hashes) return {};
  int32_t end = seq->num_tokens - 1;
  const int32_t next_prompt_logprob = seq->group->next_prompt_logprob;
  if (next_prompt_logprob < seq->num_prompt_tokens) end = next_prompt_logprob - 1;
  const int32_t num_blocks = end / config.block_size;
  extend_hashes(seq, num_blocks);
  return blocks.find_cached({seq->hashes.data(), static_cast<size_t>(num_blocks)});
}

void Scheduler::State::extend_hashes(Sequence* seq, int32_t num_blocks) const {
  for (int32_t i = static_cast<int32_t>(seq->hashes.size()); i < num_blocks; ++i) {
    const BlockHash parent = i == 0 ? seq->group->root : seq->hashes[i - 1];
    const TokenId* tokens = seq->tokens.data() + static_cast<int64_t>(i) * config.block_size;
    seq->hashes.push_back(hasher.next(parent, {tokens, static_cast<size_t>(config.block_size)}));
  }
}

// Full blocks may be shared, so that every unused slot has one sequence to blame; a shared block
// that is not full is its holders' in equal parts.
void Scheduler::State::count_slots() {
  int64_t unused = 0;
  for (const Sequence* seq : running) {
    const int32_t num_blocks = blocks.num_blocks_of(seq->row);
    int32_t unused_here = num_blocks * config.block_size - seq->num_scheduled();
    if (seq->shares_tail) {
      const int32_t tail = seq->num_scheduled() / config.block_size;
      unused_here /= blocks.pool().block(blocks.block_at(seq->row, tail)).ref_count;
    }
    unused += unused_here;
  }
  const BlockPool& pool = blocks.pool();
  const int64_t allocated =
      static_cast<int64_t>(pool.num_blocks() - pool.num_free()) * config.block_size;
  stats.kv_slots_allocated += allocated;
  stats.kv_slots_used += allocated - unused;
}

}  // namespace fastpage
