// What must hold between any two calls.
#include <algorithm>

#include "core/scheduler_state.h"

namespace fastpage {

namespace {

void require(bool ok, const char* what, const Sequence& seq) {
  if (ok) return;
  throw Error("request " + std::to_string(seq.id) + ", sample " + std::to_string(seq.index) + ": " +
              what);
}

void check_counts(const Sequence& seq) {
  require(!seq.dead, "dead, yet in a queue", seq);
  require(seq.num_placeholders >= 0 && seq.num_placeholders <= kMaxStepsInFlight,
          "placeholders out of range", seq);
  require(seq.tokens.size() == static_cast<size_t>(seq.num_tokens + seq.num_drafts),
          "tokens and their number differ", seq);
  require(seq.num_tokens - seq.num_placeholders < seq.final_length, "past its end", seq);
  require(seq.num_tokens <= seq.final_length, "placeholders past its end", seq);
  require(seq.num_in_flight_tokens >= 0, "negative tokens in flight", seq);
  const bool in_flight = seq.num_steps_in_flight > 0;
  require(in_flight || (seq.num_placeholders == 0 && !seq.awaits_result),
          "waits for a step that is not under way", seq);
  require(in_flight || seq.num_in_flight_tokens == 0, "tokens in flight without a step", seq);
}

}  // namespace

void Scheduler::State::check_integrity() const {
  blocks.check_integrity();
  size_t num_sequences = dead.size();
  for (const Sequence* seq : running) {
    check_counts(*seq);
    require(seq->row != kNoRow, "running without a row", *seq);
    require(seq->num_left() >= (seq->awaits_result ? -seq->num_drafts
                                : seq->paused      ? 0
                                                   : 1),
            "running with nothing to compute", *seq);
    const int32_t num_blocks = blocks.num_blocks_of(seq->row);
    require(num_blocks >= blocks.blocks_for(seq->num_scheduled()), "computes more than it holds",
            *seq);
    const int32_t num_full = seq->num_computed_tokens / config.block_size;
    require(seq->num_published_blocks <= num_full, "published more than it computed", *seq);
    for (int32_t i = 0; i < num_blocks; ++i) {
      const Block& block = blocks.pool().block(blocks.block_at(seq->row, i));
      if (!block.hash) {
        const bool may_share = i == num_full && seq->shares_tail;
        require(block.ref_count == 1 || i < num_full || may_share,
                "shares a block that it may write", *seq);
      } else {
        require(i < num_full, "holds a published block that is not computed", *seq);
        require(block.hash == seq->hashes[i], "holds a block of other contents", *seq);
      }
    }
    ++num_sequences;
  }
  if (!std::is_sorted(running.begin(), running.end(), ComesFirst())) {
    throw Error("the running sequences are out of order");
  }
  for (const Sequence* seq : waiting) {
    check_counts(*seq);
    require(seq->row == kNoRow, "waiting with a row", *seq);
    require(seq->num_scheduled() == 0 && seq->num_published_blocks == 0,
            "waiting with computed tokens", *seq);
    ++num_sequences;
  }
  if (running.size() + free_rows.size() != static_cast<size_t>(config.max_num_seqs)) {
    throw Error("rows: " + std::to_string(running.size()) + " held, " +
                std::to_string(free_rows.size()) + " free, " + std::to_string(config.max_num_seqs) +
                " exist");
  }
  if (num_sequences + free_sequences.size() != sequences.size()) {
    throw Error("sequences: " + std::to_string(num_sequences) + " in use, " +
                std::to_string(free_sequences.size()) + " free, " +
                std::to_string(sequences.size()) + " exist");
  }
  check_groups();
}

void Scheduler::State::check_groups() const {
  int32_t num_new = 0;
  int64_t num_new_tokens = 0;
  size_t num_free = 0;
  for (const auto& group : groups) {
    if (group->id == 0) {
      num_free += group->num_sequences == 0;
      continue;
    }
    const std::vector<Sequence*>& samples =
        group->beams != nullptr ? group->beams->beams : group->samples;
    int32_t num_alive = static_cast<int32_t>(group->unborn.size());
    for (const Sequence* seq : samples) {
      if (seq == nullptr) continue;
      ++num_alive;
      require(seq->group == group.get() && seq->id == group->id, "of another request", *seq);
      require(seq->row == kNoRow
                  ? waiting.count(const_cast<Sequence*>(seq)) == 1
                  : std::binary_search(running.begin(), running.end(), seq, ComesFirst()),
              "alive, yet in no queue", *seq);
    }
    if (group->beams == nullptr && num_alive != group->num_alive) {
      throw Error("request " + std::to_string(group->id) + ": " + std::to_string(group->num_alive) +
                  " samples counted, " + std::to_string(num_alive) + " alive");
    }
    if (group->num_cached_tokens == kNeverAdmitted) {
      num_new += group->num_alive;
      num_new_tokens += group->num_prompt_tokens;
    }
  }
  if (num_new != num_never_admitted) {
    throw Error("never admitted: " + std::to_string(num_never_admitted) + " counted, " +
                std::to_string(num_new) + " waiting");
  }
  if (num_new_tokens != num_waiting_tokens) {
    throw Error("prompt tokens never admitted: " + std::to_string(num_waiting_tokens) +
                " counted, " + std::to_string(num_new_tokens) + " waiting");
  }
  if (num_free != free_slots.size()) {
    throw Error("slots: " + std::to_string(num_free) + " unused, " +
                std::to_string(free_slots.size()) + " listed");
  }
}

}  // namespace fastpage
