// What a step's results make of the sequences.
#include <algorithm>

#include "core/scheduler_state.h"

namespace fastpage {

namespace {

// Ascending `ids`.
bool contains(Span<const TokenId> ids, TokenId id) {
  constexpr size_t kFew = 16;
  if (ids.size() > kFew) return std::binary_search(ids.begin(), ids.end(), id);
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

// `num_tokens`: of the sequence, with `token`, its last.
FinishReason finish_reason(const Sequence& seq, int32_t num_tokens, TokenId token) {
  // The sampler masks what may end it for as long (SamplingRow::eos_token_ids).
  if (num_tokens > seq.min_length && contains(seq.stop_token_ids, token)) {
    return FinishReason::kStop;
  }
  return num_tokens >= seq.final_length ? FinishReason::kLength : FinishReason::kNone;
}

}  // namespace

const std::vector<SequenceUpdate>& Scheduler::State::update(const SchedulerOutput& output,
                                                            Span<const TokenId> sampled,
                                                            Span<const TokenLogprobs> results) {
  if (num_steps == 0 || &output != &oldest().output) {
    throw InvalidArgument("update() of a step that is not the oldest one under way");
  }
  const Step& step = oldest();
  check_results(step, sampled, results);
  logprobs = results;
  updates.clear();
  finished_hypotheses.clear();
  size_t i = 0;
  try {
    for (int32_t row = 0; i < step.entries.size(); ++i) {
      const int32_t num_rows = step.output.sequences[i].num_sampling_rows;
      Sequence* seq = step.entries[i].seq;
      --seq->num_steps_in_flight;
      // An aborted one: nobody wants its tokens.
      if (!seq->dead) take_in(step, i, row, sampled.subspan(row, num_rows));
      row += num_rows;
    }
  } catch (...) {
    give_up_oldest(i + 1);
    throw;
  }
  end_oldest();
  return updates;
}

void Scheduler::State::end_oldest() {
  oldest_step = (oldest_step + 1) % kMaxStepsInFlight;
  --num_steps;
  drop_dead();
}

// Memory ran out in the midst of its results.
void Scheduler::State::give_up_oldest(size_t num_taken_in) {
  const Step& step = oldest();
  for (size_t i = num_taken_in; i < step.entries.size(); ++i) {
    --step.entries[i].seq->num_steps_in_flight;
  }
  updates.clear();
  for (const ScheduledSequence& scheduled : step.output.sequences) abort(scheduled.id);
  end_oldest();
}

void Scheduler::State::check_results(const Step& step, Span<const TokenId> sampled,
                                     Span<const TokenLogprobs> results) const {
  const auto num_rows = static_cast<size_t>(step.num_sampling_rows);
  if (sampled.size() != num_rows) {
    throw InvalidArgument("update() with " + std::to_string(sampled.size()) + " tokens of " +
                          std::to_string(num_rows) + " sampling rows");
  }
  if (!results.empty() && results.size() != num_rows) {
    throw InvalidArgument("update() with " + std::to_string(results.size()) + " logprobs of " +
                          std::to_string(num_rows) + " sampling rows");
  }
  if (!step.has_beams) return;
  int32_t row = 0;
  for (size_t i = 0; i < step.entries.size(); ++i) {
    const Sequence& seq = *step.entries[i].seq;
    const int32_t rows_here = step.output.sequences[i].num_sampling_rows;
    const bool is_beam = rows_here > 0 && !seq.dead && seq.is_beam;
    if (is_beam && (results.empty() || results[row].token_ids.size() < 2 ||
                    results[row].logprobs.size() != results[row].token_ids.size())) {
      throw InvalidArgument("update() without the logprobs of sampling row " + std::to_string(row) +
                            ", a beam's");
    }
    row += rows_here;
  }
}

void Scheduler::State::take_in(const Step& step, size_t i, int32_t row,
                               Span<const TokenId> sampled) {
  const ScheduledSequence& scheduled = step.output.sequences[i];
  const ScheduledEntry& entry = step.entries[i];
  Sequence* seq = entry.seq;
  const int32_t num_kept = scheduled.num_scheduled_tokens - entry.num_drafts;
  const int32_t end = scheduled.num_computed_tokens + num_kept;
  if (seq->wants_prompt_logprobs) {
    // Computing again after a preemption owes nothing new until it is past where it was.
    int32_t& next = seq->group->next_prompt_logprob;
    next = std::max(next, std::min(end + 1, seq->num_prompt_tokens));
  }
  if (seq->is_beam && !sampled.empty()) {
    advance(seq, scheduled.num_scheduled_tokens, num_kept);
    take_candidates(seq, logprobs[row], static_cast<int32_t>(i));
    return;
  }
  SequenceUpdate& news = updates.emplace_back();
  news.id = seq->id;
  news.tag = seq->tag;
  news.index = seq->index;
  news.seq = static_cast<int32_t>(i);
  news.sampling_row = -1;
  news.stop_token_id = -1;
  news.num_prompt_tokens = seq->num_prompt_tokens;
  news.num_output_tokens = seq->num_output_tokens() - seq->num_placeholders;
  news.num_cached_tokens = seq->num_cached_tokens;
  int32_t num_accepted = 0;
  if (!sampled.empty()) {
    news.sampling_row = row;
    take_tokens(entry, end, sampled, &news);
    num_accepted = static_cast<int32_t>(news.new_token_ids.size()) - 1;
  }
  advance(seq, scheduled.num_scheduled_tokens, num_kept + num_accepted);
  const bool ends = news.finish_reason != FinishReason::kNone;
  if (entry.splits) bear_samples(seq, row, sampled);
  if (ends) end_sample(seq);
}

// Unless it has lost its blocks meanwhile (it does not come back while a step points to it),
// `num_kept` of the tokens in flight are computed.
void Scheduler::State::advance(Sequence* seq, int32_t num_scheduled, int32_t num_kept) {
  if (seq->row == kNoRow) return;
  seq->num_in_flight_tokens -= num_scheduled;
  seq->num_computed_tokens += num_kept;
  publish(seq);
}

// The tokens at `position` and after it. Of proposed ones those count that were sampled again, and
// the first that was not.
void Scheduler::State::take_tokens(const ScheduledEntry& entry, int32_t position,
                                   Span<const TokenId> sampled, SequenceUpdate* news) {
  Sequence* seq = entry.seq;
  const int32_t num_drafts = entry.num_drafts;
  const int32_t first = entry.splits ? seq->index : 0;
  int32_t count = 0;
  while (true) {
    const TokenId token = sampled[first + count];
    const bool is_draft = count < num_drafts && seq->tokens[position + count] == token;
    ++count;
    news->finish_reason = finish_reason(*seq, position + count, token);
    if (news->finish_reason == FinishReason::kStop) news->stop_token_id = token;
    if (!is_draft || news->finish_reason != FinishReason::kNone) break;
  }
  news->sampling_row += first;
  news->new_token_ids = sampled.subspan(first, count);
  news->num_output_tokens = position + count - seq->num_prompt_tokens;
  if (seq->awaits_result) {
    seq->awaits_result = false;
    seq->num_tokens = position + count;
    if (seq->num_drafts > 0) {
      seq->tokens.resize(position);
      seq->num_drafts = 0;
      stats.num_draft_tokens += num_drafts;
      stats.num_accepted_tokens += count - 1;
    }
    for (const TokenId token : news->new_token_ids) seq->tokens.push_back(token);
    return;
  }
  --seq->num_placeholders;
  // If a later step has the token as its input, the runner has written it, and may be reading it.
  if (seq->tokens[position] != sampled[0]) seq->tokens[position] = sampled[0];
}

// The samples of a prompt that has been computed: each continues it with a token of its own.
void Scheduler::State::bear_samples(Sequence* leader, int32_t row, Span<const TokenId> sampled) {
  SequenceGroup* group = leader->group;
  SequenceUpdate news = updates.back();
  std::vector<int32_t>& unborn = group->unborn;  // ascending
  while (!unborn.empty()) {
    const int32_t index = unborn.front();
    const TokenId token = sampled[index];
    Sequence* seq = fork(leader, index);
    seq->seed = sample_seed(group->seed, index);
    seq->tokens.back() = token;
    unborn.erase(unborn.begin());
    group->samples[index] = seq;
    news.index = index;
    news.sampling_row = row + index;
    news.new_token_ids = sampled.subspan(index, 1);
    news.finish_reason = finish_reason(*seq, seq->num_tokens, token);
    news.stop_token_id = news.finish_reason == FinishReason::kStop ? token : -1;
    updates.push_back(news);
    if (news.finish_reason != FinishReason::kNone) end_sample(seq);
  }
}

// Only now that they are computed: whoever found them earlier would read garbage if the step
// failed.
void Scheduler::State::publish(Sequence* seq) {
  if (!seq->uses_hashes) return;
  const int32_t first = seq->num_published_blocks;
  if (seq->num_computed_tokens < (first + 1) * config.block_size) return;
  const int32_t num_full = seq->num_computed_tokens / config.block_size;
  extend_hashes(seq, num_full);
  blocks.publish(seq->row, first, num_full, seq->hashes.data(), seq->tokens.data(),
                 seq->group->announce);
  seq->num_published_blocks = num_full;
}

void Scheduler::State::discard(const SchedulerOutput& output) {
  int32_t age = 0;
  while (age < num_steps && &output != &steps[(oldest_step + age) % kMaxStepsInFlight].output) {
    ++age;
  }
  if (age == num_steps) throw InvalidArgument("discard() of a step that is not under way");
  while (num_steps > age) discard_newest();
  drop_dead();
}

void Scheduler::State::discard_newest() {
  const Step& step = newest();
  for (size_t i = 0; i < step.entries.size(); ++i) {
    const ScheduledEntry& entry = step.entries[i];
    const ScheduledSequence& scheduled = step.output.sequences[i];
    Sequence* seq = entry.seq;
    --seq->num_steps_in_flight;
    if (seq->dead) continue;
    if (scheduled.num_sampling_rows > 0) {
      if (seq->awaits_result) {
        seq->awaits_result = false;
      } else {
        --seq->num_placeholders;
        seq->tokens.resize(--seq->num_tokens);
        // The runner may have written it for the step that is discarded.
        if (seq->num_placeholders > 0) seq->tokens.back() = -1;
        seq->sampling_row = seq->previous_sampling_row;
      }
    }
    if (seq->row == kNoRow) continue;
    seq->num_in_flight_tokens -= scheduled.num_scheduled_tokens;
    if (entry.needs_transfers) {
      lose_blocks(seq, Keep::kCache);
      running.erase(std::lower_bound(running.begin(), running.end(), seq, ComesFirst()));
    }
  }
  blocks.discard_step(step.output.transfers);
  --num_steps;
}

}  // namespace fastpage
