// The inputs of a step, laid out for the model.
#include <algorithm>

#include "core/scheduler_state.h"

namespace fastpage {

namespace {

// Tokens [begin, begin + n) of one sequence, at `at` in the batch.
void lay_out_tokens(const TokenId* tokens, const BlockId* table, int32_t block_size, int32_t begin,
                    int32_t n, int32_t at, InputBatch* batch) {
  int32_t block = begin / block_size;
  int32_t offset = begin % block_size;
  for (int32_t i = 0; i < n; ++i) {
    batch->token_ids[at + i] = tokens[begin + i];
    batch->positions[at + i] = begin + i;
    batch->slot_mapping[at + i] = table[block] * block_size + offset;
    if (++offset == block_size) {
      offset = 0;
      ++block;
    }
  }
}

// Logits at a position speak of the token after it.
void ask_prompt_logprobs(const Sequence& seq, const ScheduledSequence& scheduled, int32_t index,
                         int32_t at, InputBatch* batch) {
  const int32_t end = scheduled.num_computed_tokens + scheduled.num_scheduled_tokens;
  const int32_t last = std::min(end, seq.num_prompt_tokens - 1);
  const int32_t first = std::max(scheduled.num_computed_tokens + 1, seq.group->next_prompt_logprob);
  for (int32_t position = first; position <= last; ++position) {
    batch->prompt_logprob_rows.push_back({index, batch->num_logits(), position,
                                          seq.tokens[position], seq.group->params.prompt_logprobs});
    batch->logits_indices.push_back(at + position - 1 - scheduled.num_computed_tokens);
  }
}

void size_for(const SchedulerOutput& step, InputBatch* batch) {
  const size_t num_seqs = step.sequences.size();
  batch->step_id = step.step_id;
  batch->num_seqs = static_cast<int32_t>(num_seqs);
  batch->token_ids.resize(step.num_scheduled_tokens);
  batch->positions.resize(step.num_scheduled_tokens);
  batch->slot_mapping.resize(step.num_scheduled_tokens);
  batch->query_start_loc.resize(num_seqs + 1);
  batch->seq_lens.resize(num_seqs);
  batch->block_table_rows.resize(num_seqs);
  batch->logits_indices.clear();
  batch->sampling_rows.clear();
  batch->prompt_logprob_rows.clear();
  batch->future_tokens.clear();
  batch->transfers = step.transfers;
}

}  // namespace

void Scheduler::State::prepare(const SchedulerOutput& output, InputBatch* batch) {
  if (num_steps == 0 || &output != &newest().output) {
    throw InvalidArgument("prepare() of a step that is not the last one scheduled");
  }
  const Step& step = newest();
  for (const ScheduledEntry& entry : step.entries) {
    if (entry.seq->dead) {
      throw Error("request " + std::to_string(entry.seq->id) +
                  " was aborted between schedule() and prepare(): discard() the step and "
                  "schedule() again");
    }
  }
  size_for(output, batch);

  int32_t at = 0;
  batch->query_start_loc[0] = 0;
  for (int32_t i = 0; i < batch->num_seqs; ++i) {
    const ScheduledSequence& scheduled = output.sequences[i];
    Sequence& seq = *step.entries[i].seq;
    const int32_t begin = scheduled.num_computed_tokens;
    const int32_t n = scheduled.num_scheduled_tokens;
    lay_out_tokens(seq.tokens.data(), blocks.block_tables() + int64_t{seq.row} * blocks.stride(),
                   config.block_size, begin, n, at, batch);
    // Of the placeholders one is this step's to sample, and one may be its input.
    if (seq.num_placeholders == 2) {
      const int32_t position = seq.num_tokens - 2;
      batch->future_tokens.push_back(
          {at + position - begin, seq.previous_sampling_row, &seq.tokens[position]});
    }
    if (seq.wants_prompt_logprobs) {
      ask_prompt_logprobs(seq, scheduled, i, at, batch);
    }
    at += n;
    batch->query_start_loc[i + 1] = at;
    batch->seq_lens[i] = begin + n;
    batch->block_table_rows[i] = seq.row;
    if (scheduled.num_sampling_rows > 0) ask_samples(step.entries[i], scheduled, i, at, batch);
  }
  lend_block_tables(batch);
}

// A runner that may still compute when the next schedule() changes the tables gets a copy.
void Scheduler::State::lend_block_tables(InputBatch* batch) const {
  const int64_t stride = blocks.stride();
  batch->block_tables = blocks.block_tables();
  batch->block_table_stride = blocks.stride();
  if (config.max_steps_in_flight == 1) return;
  const auto needed = static_cast<size_t>(batch->num_seqs * stride);
  if (batch->own_block_tables.size() < needed) batch->own_block_tables.resize(needed);
  BlockId* to = batch->own_block_tables.data();
  for (int32_t i = 0; i < batch->num_seqs; ++i, to += stride) {
    std::copy_n(batch->block_table(i), blocks.blocks_for(batch->seq_lens[i]), to);
    batch->block_table_rows[i] = i;
  }
  batch->block_tables = batch->own_block_tables.data();
}

// The last tokens of the sequence end at `at` in the batch: one row for what follows each of the
// proposed tokens, or a row for each sample that is to be born.
void Scheduler::State::ask_samples(const ScheduledEntry& entry, const ScheduledSequence& scheduled,
                                   int32_t index, int32_t at, InputBatch* batch) const {
  const Sequence& seq = *entry.seq;
  const SequenceGroup& group = *seq.group;
  const int32_t end = scheduled.num_computed_tokens + scheduled.num_scheduled_tokens;
  const int32_t num_rows = scheduled.num_sampling_rows;
  if (entry.splits) batch->logits_indices.push_back(at - 1);
  for (int32_t i = 0; i < num_rows; ++i) {
    const int32_t num_after = entry.splits ? 0 : num_rows - 1 - i;
    if (!entry.splits) batch->logits_indices.push_back(at - 1 - num_after);
    // Filled in where it lies: a copy from the stack waits for its stores.
    SamplingRow& row = batch->sampling_rows.emplace_back();
    row.seq = index;
    row.logits_row = batch->num_logits() - 1;
    row.params = &group.params;
    row.tokens = {seq.tokens.data(), static_cast<size_t>(end - num_after)};
    row.num_prompt_tokens = seq.num_prompt_tokens;
    row.seed = entry.splits ? sample_seed(group.seed, i) : seq.seed;
    if (!group.params.ignore_eos) row.eos_token_ids = config.eos_token_ids;
  }
}

}  // namespace fastpage
