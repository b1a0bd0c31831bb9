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
  const int32_t first = std::max(scheduled.num_computed_tokens + 1, seq.next_prompt_logprob);
  for (int32_t position = first; position <= last; ++position) {
    batch->prompt_logprob_rows.push_back(
        {index, batch->num_logits(), position, seq.tokens[position], seq.params.prompt_logprobs});
    batch->logits_indices.push_back(at + position - 1 - scheduled.num_computed_tokens);
  }
}

}  // namespace

void Scheduler::State::prepare(const SchedulerOutput& step, InputBatch* batch) const {
  if (&step != &output || step.sequences.size() != step_sequences.size()) {
    throw InvalidArgument("prepare() of a step that is not under way");
  }
  const int32_t num_seqs = static_cast<int32_t>(step.sequences.size());
  batch->step_id = step.step_id;
  batch->num_seqs = num_seqs;
  batch->token_ids.resize(step.num_scheduled_tokens);
  batch->positions.resize(step.num_scheduled_tokens);
  batch->slot_mapping.resize(step.num_scheduled_tokens);
  batch->query_start_loc.resize(num_seqs + 1);
  batch->seq_lens.resize(num_seqs);
  batch->block_table_rows.resize(num_seqs);
  batch->logits_indices.clear();
  batch->sampling_rows.clear();
  batch->prompt_logprob_rows.clear();
  batch->block_copies.assign(step.block_copies.begin(), step.block_copies.end());
  batch->block_tables = blocks.block_tables();
  batch->block_table_stride = blocks.stride();

  int32_t at = 0;
  batch->query_start_loc[0] = 0;
  for (int32_t i = 0; i < num_seqs; ++i) {
    const ScheduledSequence& scheduled = step.sequences[i];
    const Sequence& seq = *step_sequences[i];
    if (seq.id != scheduled.id) {
      throw Error("sequence " + std::to_string(scheduled.id) +
                  " was aborted between schedule() and prepare(): schedule() again");
    }
    const int32_t begin = scheduled.num_computed_tokens;
    const int32_t n = scheduled.num_scheduled_tokens;
    lay_out_tokens(seq.tokens.data(), batch->block_tables + int64_t{seq.row} * blocks.stride(),
                   config.block_size, begin, n, at, batch);
    if (seq.next_prompt_logprob < seq.num_prompt_tokens) {
      ask_prompt_logprobs(seq, scheduled, i, at, batch);
    }
    at += n;
    batch->query_start_loc[i + 1] = at;
    batch->seq_lens[i] = begin + n;
    batch->block_table_rows[i] = seq.row;
    if (scheduled.samples) {
      Span<const TokenId> eos;
      if (!seq.params.ignore_eos) eos = config.eos_token_ids;
      batch->sampling_rows.push_back(
          {i, batch->num_logits(), &seq.params, seq.tokens, seq.num_prompt_tokens, seq.seed, eos});
      batch->logits_indices.push_back(at - 1);
    }
  }
}

}  // namespace fastpage
