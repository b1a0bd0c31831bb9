// What a step's results make of the sequences.
#include <algorithm>

#include "core/scheduler_state.h"

namespace fastpage {

namespace {

bool contains(Span<const TokenId> ids, TokenId id) {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

}  // namespace

const std::vector<SequenceUpdate>& Scheduler::State::update(const SchedulerOutput& step,
                                                            Span<const TokenId> sampled) {
  if (&step != &output || step.sequences.size() != step_sequences.size()) {
    throw InvalidArgument("update() of a step that is not under way");
  }
  size_t num_samples = 0;
  for (const ScheduledSequence& scheduled : step.sequences) num_samples += scheduled.samples;
  if (sampled.size() != num_samples) {
    throw InvalidArgument("update() with " + std::to_string(sampled.size()) + " tokens of " +
                          std::to_string(num_samples) + " sampling rows");
  }

  updates.clear();
  bool any_finished = false;
  int32_t sampling_row = 0;
  for (size_t i = 0; i < step_sequences.size(); ++i) {
    const ScheduledSequence& scheduled = step.sequences[i];
    const int32_t row = scheduled.samples ? sampling_row++ : -1;
    Sequence* seq = step_sequences[i];
    if (seq->id != scheduled.id) continue;  // aborted: nobody wants its token

    seq->num_computed_tokens += scheduled.num_scheduled_tokens;
    publish(seq);
    // Computing again after a preemption owes nothing new until it is past where it was.
    seq->next_prompt_logprob = std::max(
        seq->next_prompt_logprob, std::min(seq->num_computed_tokens + 1, seq->num_prompt_tokens));
    SequenceUpdate news{seq->id,
                        seq->tag,
                        static_cast<int32_t>(i),
                        -1,
                        false,
                        FinishReason::kNone,
                        -1,
                        seq->num_prompt_tokens,
                        seq->num_output_tokens(),
                        seq->num_cached_tokens,
                        row};
    if (row >= 0) take_sample(seq, sampled[row], &news);
    any_finished |= news.finish_reason != FinishReason::kNone;
    updates.push_back(news);
  }
  if (any_finished) drop_finished();
  step_sequences.clear();
  recycle_aborted();
  return updates;
}

void Scheduler::State::take_sample(Sequence* seq, TokenId token, SequenceUpdate* news) const {
  // The sampler masks what may end it for as long (SamplingRow::eos_token_ids).
  const bool may_stop = seq->num_output_tokens() >= seq->params.min_tokens;
  seq->tokens.push_back(token);
  news->new_token_id = token;
  news->has_new_token = true;
  news->num_output_tokens = seq->num_output_tokens();
  const bool stops = (!seq->params.ignore_eos && contains(config.eos_token_ids, token)) ||
                     contains(seq->params.stop_token_ids, token);
  if (may_stop && stops) {
    news->finish_reason = FinishReason::kStop;
    news->stop_token_id = token;
  } else if (seq->num_tokens() >= seq->final_length) {
    news->finish_reason = FinishReason::kLength;
  }
}

// Only now that they are computed: whoever found them earlier would read garbage if the step
// failed.
void Scheduler::State::publish(Sequence* seq) {
  if (!config.enable_prefix_caching) return;
  const int32_t first = seq->num_published_blocks;
  if (seq->num_computed_tokens < (first + 1) * config.block_size) return;
  const int32_t num_full = seq->num_computed_tokens / config.block_size;
  extend_hashes(seq, num_full);
  blocks.publish(seq->row, first,
                 {seq->hashes.data() + first, static_cast<size_t>(num_full - first)});
  seq->num_published_blocks = num_full;
}

void Scheduler::State::drop_finished() {
  for (const SequenceUpdate& news : updates) {
    if (news.finish_reason == FinishReason::kNone) continue;
    Sequence* seq = step_sequences[news.seq];
    release_row(seq);
    seq->id = 0;
    aborted.push_back(seq);
  }
  running.erase(std::remove_if(running.begin(), running.end(),
                               [](const Sequence* seq) { return seq->id == 0; }),
                running.end());
}

}  // namespace fastpage
