#include "fastpage/scheduler.h"

#include <algorithm>

#include "core/admission.h"
#include "core/scheduler_state.h"
#include "core/splitmix.h"

namespace fastpage {

namespace {

BlockManagerConfig block_manager_config(const SchedulerConfig& config) {
  BlockManagerConfig out;
  out.num_blocks = config.num_blocks;
  out.num_host_blocks = config.num_host_blocks;
  out.block_size = config.block_size;
  out.max_num_seqs = config.max_num_seqs;
  out.max_model_len = config.max_model_len;
  out.enable_kv_events = config.enable_kv_events;
  return out;
}

const SchedulerConfig& validated(const SchedulerConfig& config) {
  config.validate();
  return config;
}

// What a block's hash is made of is 16 bytes and 4 a token; a root is never made of a multiple of
// 4, so that no salt can be made up to stand for somebody's block.
std::string padded(std::string salt) {
  salt.push_back('\x80');
  while (salt.size() % 4 != 1) salt.push_back('\0');
  return salt;
}

}  // namespace

uint64_t sample_seed(uint64_t seed, int32_t index) {
  return index == 0 ? seed : mix(seed + static_cast<uint64_t>(index));
}

Scheduler::State::State(const SchedulerConfig& c)
    : config(validated(c)),
      hasher(c.hash_key_lo, c.hash_key_hi),
      blocks(block_manager_config(c)),
      watermark(c.num_blocks / 100) {
  for (int32_t row = config.max_num_seqs - 1; row >= 0; --row) free_rows.push_back(row);
  running.reserve(config.max_num_seqs);
  for (Step& each : steps) {
    each.output.sequences.reserve(config.max_num_seqs);
    each.entries.reserve(config.max_num_seqs);
  }
  updates.reserve(config.max_num_seqs);
  dead.reserve(config.max_num_seqs);
}

RequestId Scheduler::State::add(SequenceRequest request) {
  check_fits(config, request.prompt_token_ids.size(), request.params);
  const int32_t num_samples = request.params.num_samples();
  const auto num_tokens = static_cast<int64_t>(request.prompt_token_ids.size());
  check_queue(config, {num_never_admitted, num_waiting_tokens}, {num_samples, num_tokens});
  SequenceGroup* group = new_group();
  Sequence* leader = nullptr;
  try {
    leader = new_sequence(group, 0);
    begin(leader, std::move(request));
    waiting.insert(leader);
  } catch (...) {  // memory ran out
    group->num_alive = 0;
    leader != nullptr ? recycle(leader) : recycle(group);
    throw;
  }
  num_never_admitted += num_samples;
  num_waiting_tokens += num_tokens;
  return group->id;
}

void Scheduler::State::begin(Sequence* leader, SequenceRequest request) {
  SequenceGroup* group = leader->group;
  const int32_t num_samples = request.params.num_samples();
  const bool is_private = !config.enable_prefix_caching;
  group->seed = request.seed;
  group->num_alive = num_samples;
  group->num_prompt_tokens = static_cast<int32_t>(request.prompt_token_ids.size());
  // Blocks of requests with a salt are nobody else's to hit.
  group->announce = config.enable_kv_events && !is_private && request.cache_salt.empty();
  group->root = hasher.root(padded(request.cache_salt));
  if (is_private) {
    const TokenId serial[] = {static_cast<TokenId>(group->id),
                              static_cast<TokenId>(group->id >> 32)};
    group->root = hasher.next(group->root, {serial, 2});
  }

  leader->tag = request.tag;
  // Without a shared cache, blocks are still found again by their own request: by its samples, and
  // on the host.
  leader->uses_hashes = !is_private || num_samples > 1 || config.num_host_blocks > 0;
  leader->priority = config.policy == SchedulingPolicy::kPriority ? request.priority : 0;
  leader->seed = request.seed;
  leader->num_prompt_tokens = static_cast<int32_t>(request.prompt_token_ids.size());
  leader->num_tokens = leader->num_prompt_tokens;
  leader->final_length = final_length(config, request.prompt_token_ids.size(), request.params);
  leader->tokens = std::move(request.prompt_token_ids);
  leader->wants_prompt_logprobs = request.params.prompt_logprobs >= 0;
  group->next_prompt_logprob = leader->wants_prompt_logprobs ? 1 : leader->num_prompt_tokens;
  leader->min_length =
      leader->num_prompt_tokens + std::min(request.params.min_tokens, config.max_model_len);
  group->stop_token_ids = request.params.stop_token_ids;
  if (!request.params.ignore_eos) {
    group->stop_token_ids.insert(group->stop_token_ids.end(), config.eos_token_ids.begin(),
                                 config.eos_token_ids.end());
  }
  std::sort(group->stop_token_ids.begin(), group->stop_token_ids.end());
  leader->stop_token_ids = group->stop_token_ids;
  group->params = std::move(request.params);
  if (group->params.beam_width > 0) {
    start_beams(group, leader);
  } else {
    group->samples.assign(num_samples, nullptr);
    group->samples[0] = leader;
    for (int32_t i = 1; i < num_samples; ++i) group->unborn.push_back(i);
  }
}

bool Scheduler::State::abort(RequestId id) {
  SequenceGroup* group = find(id);
  if (group == nullptr) return false;
  if (group->beams != nullptr) {
    end_beams(group);
  } else {
    while (!group->unborn.empty()) end_unborn(group, group->unborn.back());
    for (Sequence* seq : group->samples) {
      if (seq != nullptr) end_sample(seq);
    }
  }
  drop_dead();
  return true;
}

bool Scheduler::State::abort(RequestId id, int32_t index) {
  SequenceGroup* group = find(id);
  if (group == nullptr || group->beams != nullptr) return false;
  const auto unborn = std::find(group->unborn.begin(), group->unborn.end(), index);
  if (unborn != group->unborn.end()) {
    end_unborn(group, index);
    return true;
  }
  Sequence* seq = find(id, index);
  if (seq == nullptr) return false;
  if (!group->unborn.empty()) {
    // It computes the prompt for the others: the next of them goes on with it.
    const int32_t heir = group->unborn.front();
    group->samples[index] = nullptr;
    group->samples[heir] = seq;
    seq->index = heir;
    seq->seed = sample_seed(group->seed, heir);
    end_unborn(group, heir);
    return true;
  }
  end_sample(seq);
  drop_dead();
  return true;
}

int32_t Scheduler::State::fork(RequestId id, int32_t index, uint64_t seed) {
  const auto refuse = [&](const char* why) {
    throw InvalidArgument("fork of sample " + std::to_string(index) + " of request " +
                          std::to_string(id) + ": " + why);
  };
  SequenceGroup* group = find(id);
  if (group == nullptr) refuse("there is no such request");
  if (group->beams != nullptr) refuse("beams cannot be forked");
  Sequence* seq = find(id, index);
  if (seq == nullptr) refuse("there is no such sample");
  if (seq->num_steps_in_flight > 0) refuse("it is in a step under way: update() first");
  if (seq->num_output_tokens() == 0) refuse("its first token is not out yet");
  const int32_t child_index = static_cast<int32_t>(group->samples.size());
  group->samples.push_back(nullptr);
  Sequence* child = fork(seq, child_index);
  child->seed = seed;
  group->samples[child_index] = child;
  ++group->num_alive;
  return child_index;
}

bool Scheduler::State::propose(RequestId id, int32_t index, Span<const TokenId> token_ids) {
  SequenceGroup* group = find(id);
  if (group == nullptr) return false;
  if (group->beams != nullptr) {
    throw InvalidArgument("request " + std::to_string(id) +
                          " is a beam search: tokens cannot be proposed for it");
  }
  Sequence* seq = find(id, index);
  if (seq == nullptr || seq->num_steps_in_flight > 0 || !group->unborn.empty()) return false;
  // The token after the last draft is sampled, and the sequence ends there at the latest.
  const int32_t room = std::max(0, seq->final_length - seq->num_tokens - 1);
  seq->num_drafts = std::min(room, static_cast<int32_t>(token_ids.size()));
  seq->tokens.resize(seq->num_tokens);
  seq->tokens.insert(seq->tokens.end(), token_ids.begin(), token_ids.begin() + seq->num_drafts);
  return true;
}

SequenceGroup* Scheduler::State::find(RequestId id) const {
  const uint64_t slot = id & ((uint64_t{1} << kSlotBits) - 1);
  if (id == 0 || slot >= groups.size() || groups[slot]->id != id) return nullptr;
  return groups[slot].get();
}

Sequence* Scheduler::State::find(RequestId id, int32_t index) const {
  const SequenceGroup* group = find(id);
  if (group == nullptr || index < 0 || static_cast<size_t>(index) >= group->samples.size()) {
    return nullptr;
  }
  return group->samples[index];
}

SequenceGroup* Scheduler::State::new_group() {
  if (free_slots.empty()) {
    groups.push_back(nullptr);  // in its place only once there is room in free_slots, too
    try {
      free_slots.reserve(groups.capacity());
      groups.back() = std::make_unique<SequenceGroup>();
    } catch (...) {
      groups.pop_back();
      throw;
    }
    groups.back()->slot = static_cast<int32_t>(groups.size()) - 1;
    free_slots.push_back(groups.back()->slot);
  }
  SequenceGroup* group = groups[free_slots.back()].get();
  free_slots.pop_back();
  group->id = next_serial++ << kSlotBits | static_cast<RequestId>(group->slot);
  return group;
}

Sequence* Scheduler::State::new_sequence(SequenceGroup* group, int32_t index) {
  if (free_sequences.empty()) {
    sequences.push_back(nullptr);
    try {
      free_sequences.reserve(sequences.capacity());
      dead.reserve(sequences.capacity());
      sequences.back() = std::make_unique<Sequence>();
    } catch (...) {
      sequences.pop_back();
      throw;
    }
    free_sequences.push_back(sequences.back().get());
  }
  Sequence* seq = free_sequences.back();
  free_sequences.pop_back();
  seq->id = group->id;
  seq->group = group;
  seq->index = index;
  ++group->num_sequences;
  return seq;
}

// A copy that shares all blocks, if there is a row for it; else it waits, and takes from the cache
// what it finds there.
Sequence* Scheduler::State::fork(Sequence* parent, int32_t index) {
  Sequence* child = new_sequence(parent->group, index);
  child->tag = parent->tag;
  child->priority = parent->priority;
  child->num_tokens = parent->num_tokens;
  child->num_prompt_tokens = parent->num_prompt_tokens;
  child->final_length = parent->final_length;
  child->is_beam = parent->is_beam;
  child->uses_hashes = parent->uses_hashes;
  child->num_cached_tokens = parent->num_cached_tokens;
  child->min_length = parent->min_length;
  child->stop_token_ids = parent->stop_token_ids;
  const bool waits = parent->row == kNoRow || free_rows.empty();
  try {
    // Who waits gets the rest of its memory when it is admitted.
    child->tokens.reserve(waits ? parent->num_tokens + 1 : parent->final_length);
    child->tokens.assign(parent->tokens.begin(), parent->tokens.begin() + parent->num_tokens);
    if (!waits) child->hashes.reserve(parent->hashes.capacity());
    child->hashes.assign(parent->hashes.begin(), parent->hashes.end());
    if (waits) waiting.insert(child);
  } catch (...) {  // memory ran out
    recycle(child);
    throw;
  }
  if (waits) return child;
  enter_running(child);
  child->num_computed_tokens = parent->num_computed_tokens;
  child->num_published_blocks = parent->num_published_blocks;
  blocks.fork(parent->row, child->row, blocks.blocks_for(parent->num_computed_tokens));
  const bool tail_is_partial = parent->num_computed_tokens % config.block_size != 0;
  child->shares_tail = tail_is_partial;
  parent->shares_tail |= tail_is_partial;
  return child;
}

void Scheduler::State::enter_running(Sequence* seq) {
  seq->row = free_rows.back();
  free_rows.pop_back();
  running.insert(std::upper_bound(running.begin(), running.end(), seq, ComesFirst()), seq);
}

// Frees what it holds. It stays in `running` until drop_dead(), for whoever walks there.
void Scheduler::State::leave_queues(Sequence* seq) {
  if (seq->row == kNoRow) {
    waiting.erase(seq);
  } else {
    release_row(seq, keep_when_ended());
  }
}

void Scheduler::State::release_row(Sequence* seq, Keep keep) {
  blocks.free(seq->row, keep);
  free_rows.push_back(seq->row);
  seq->row = kNoRow;
  seq->shares_tail = false;
}

Keep Scheduler::State::keep_when_ended() const {
  return config.enable_prefix_caching ? Keep::kOffload : Keep::kForget;
}

void Scheduler::State::end_sample(Sequence* seq) {
  SequenceGroup* group = seq->group;
  leave_queues(seq);
  group->samples[seq->index] = nullptr;
  num_never_admitted -= group->num_cached_tokens == kNeverAdmitted;
  bury(seq);
  count_down(group);
}

void Scheduler::State::end_unborn(SequenceGroup* group, int32_t index) {
  group->unborn.erase(std::find(group->unborn.begin(), group->unborn.end(), index));
  num_never_admitted -= group->num_cached_tokens == kNeverAdmitted;
  count_down(group);
}

void Scheduler::State::count_down(SequenceGroup* group) {
  if (--group->num_alive > 0) return;
  if (group->num_cached_tokens == kNeverAdmitted) num_waiting_tokens -= group->num_prompt_tokens;
  group->id = 0;
}

void Scheduler::State::bury(Sequence* seq) {
  seq->dead = true;
  dead.push_back(seq);
}

// Out of `running`, and what no step points to is for others to use.
void Scheduler::State::drop_dead() {
  if (dead.empty()) return;
  const auto is_dead = [](const Sequence* seq) { return seq->dead; };
  running.erase(std::remove_if(running.begin(), running.end(), is_dead), running.end());
  const auto rest = std::partition(
      dead.begin(), dead.end(), [](const Sequence* seq) { return seq->num_steps_in_flight > 0; });
  for (auto it = rest; it != dead.end(); ++it) recycle(*it);
  dead.erase(rest, dead.end());
}

void Scheduler::State::recycle(Sequence* seq) {
  SequenceGroup* group = seq->group;
  *seq = Sequence();
  free_sequences.push_back(seq);
  if (--group->num_sequences == 0 && group->num_alive == 0) recycle(group);
}

void Scheduler::State::recycle(SequenceGroup* group) {
  const int32_t slot = group->slot;
  *group = SequenceGroup();
  group->slot = slot;
  free_slots.push_back(slot);
}

bool Scheduler::State::reset_prefix_cache() {
  if (blocks.pool().num_free() != blocks.pool().num_blocks()) return false;
  blocks.reset_prefix_cache();
  return true;
}

SchedulerStats Scheduler::State::current_stats() const {
  SchedulerStats out = stats;
  out.num_waiting = static_cast<int32_t>(waiting.size());
  out.num_never_admitted = num_never_admitted;
  out.num_waiting_tokens = num_waiting_tokens;
  out.num_running = static_cast<int32_t>(running.size());
  out.num_blocks = config.num_blocks;
  out.num_free_blocks = blocks.pool().num_free();
  out.num_host_blocks = config.num_host_blocks;
  out.num_cached_host_blocks = blocks.host_pool().num_published();
  out.num_blocks_swapped_out = blocks.stats().num_swapped_out;
  out.num_blocks_swapped_in = blocks.stats().num_swapped_in;
  out.num_blocks_copied = blocks.stats().num_copied;
  return out;
}

Scheduler::Scheduler(const SchedulerConfig& config) : s_(std::make_unique<State>(config)) {}
Scheduler::~Scheduler() = default;

// A call that changes anything goes through the recorder, if there is one.

RequestId Scheduler::add_request(SequenceRequest request) {
  const auto run = [&] { return s_->add(std::move(request)); };
  return s_->recorder ? s_->recorder->add_request(request, run) : run();
}

bool Scheduler::abort(RequestId id) {
  const auto run = [&] { return s_->abort(id); };
  return s_->recorder ? s_->recorder->abort(id, run) : run();
}

bool Scheduler::abort(RequestId id, int32_t index) {
  const auto run = [&] { return s_->abort(id, index); };
  return s_->recorder ? s_->recorder->abort(id, index, run) : run();
}

int32_t Scheduler::fork(RequestId id, int32_t index, uint64_t seed) {
  const auto run = [&] { return s_->fork(id, index, seed); };
  return s_->recorder ? s_->recorder->fork(id, index, seed, run) : run();
}

bool Scheduler::propose(RequestId id, int32_t index, Span<const TokenId> token_ids) {
  const auto run = [&] { return s_->propose(id, index, token_ids); };
  return s_->recorder ? s_->recorder->propose(id, index, token_ids, run) : run();
}

const SchedulerOutput& Scheduler::schedule() {
  const auto run = [&]() -> const SchedulerOutput& { return s_->schedule(); };
  return s_->recorder ? s_->recorder->schedule(run) : run();
}

void Scheduler::prepare(const SchedulerOutput& step, InputBatch* batch) {
  const auto run = [&] { s_->prepare(step, batch); };
  s_->recorder ? s_->recorder->prepare(step, *batch, run) : run();
}

const std::vector<SequenceUpdate>& Scheduler::update(const SchedulerOutput& step,
                                                     Span<const TokenId> sampled_token_ids,
                                                     Span<const TokenLogprobs> logprobs) {
  const auto run = [&]() -> const std::vector<SequenceUpdate>& {
    return s_->update(step, sampled_token_ids, logprobs);
  };
  return s_->recorder ? s_->recorder->update(step, sampled_token_ids, logprobs, run) : run();
}

void Scheduler::discard(const SchedulerOutput& step) {
  const auto run = [&] { s_->discard(step); };
  s_->recorder ? s_->recorder->discard(step, run) : run();
}

bool Scheduler::reset_prefix_cache() {
  const auto run = [&] { return s_->reset_prefix_cache(); };
  return s_->recorder ? s_->recorder->reset_prefix_cache(run) : run();
}

void Scheduler::take_kv_events(std::vector<KvEvent>* events) {
  const auto run = [&] { s_->blocks.take_kv_events(events); };
  s_->recorder ? s_->recorder->take_kv_events(*events, run) : run();
}

bool Scheduler::has(RequestId id) const { return s_->find(id) != nullptr; }
bool Scheduler::has_unfinished() const { return !s_->running.empty() || !s_->waiting.empty(); }
SchedulerStats Scheduler::stats() const { return s_->current_stats(); }
const SchedulerConfig& Scheduler::config() const { return s_->config; }
const BlockManager& Scheduler::blocks() const { return s_->blocks; }
void Scheduler::check_integrity() const { s_->check_integrity(); }

void Scheduler::record(std::ostream* log) {
  if (log != nullptr && (s_->next_serial != 1 || s_->next_step_id != 1)) {
    throw InvalidArgument("record() has to come before the first request and the first step");
  }
  s_->recorder = log != nullptr ? std::make_unique<Recorder>(log, s_->config) : nullptr;
}

}  // namespace fastpage
