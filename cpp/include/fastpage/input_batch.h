// What one step gives to the model, and what the model gives back. Plain structs, reused from step
// to step, so that a steady decode step allocates nothing.
#pragma once

#include <vector>

#include "fastpage/sampling_params.h"
#include "fastpage/types.h"

namespace fastpage {

// One token to be sampled. Pointers stay valid until ModelRunner::wait(step_id) has returned.
// Several rows may share a logits row: samples of one prompt, whose last token is computed once.
struct SamplingRow {
  int32_t seq;         // index of the sequence within the batch, [0, num_seqs)
  int32_t logits_row;  // row of the logits, [0, num_logits())
  const SamplingParams* params;
  Span<const TokenId> tokens;  // prompt and output so far, with the proposed tokens before this one
  int32_t num_prompt_tokens;
  uint64_t seed;  // the random draw is a function of (seed, tokens.size()) alone
  Span<const TokenId>
      eos_token_ids;  // masked while fewer than min_tokens are out; empty if ignore_eos

  int32_t num_output_tokens() const {
    return static_cast<int32_t>(tokens.size()) - num_prompt_tokens;
  }
};

// The log probability of a prompt token is asked for.
struct PromptLogprobRow {
  int32_t seq;
  int32_t logits_row;
  int32_t position;  // of `token` within the prompt, >= 1
  TokenId token;
  int32_t num_logprobs;  // how many of the most likely ones beside it
};

// A token that the step before this one samples: not known yet when the batch was laid out.
struct FutureToken {
  int32_t index;         // of token_ids
  int32_t sampling_row;  // of the step before
  TokenId* token;        // where SamplingRow::tokens will be read
};

struct InputBatch {
  int64_t step_id = 0;
  int32_t num_seqs = 0;

  // Ragged: the new tokens of sequence i are [query_start_loc[i], query_start_loc[i + 1]).
  // Mutable: a runner has the batch as const, and completes it (see resolve()).
  mutable std::vector<TokenId> token_ids;  // [num_tokens]
  std::vector<int32_t> positions;          // [num_tokens]
  std::vector<int32_t> slot_mapping;       // [num_tokens]: block id * block_size + offset
  std::vector<int32_t> query_start_loc;    // [num_seqs + 1]
  std::vector<int32_t> seq_lens;           // [num_seqs]: tokens in the cache once this step is done
  std::vector<int32_t> block_table_rows;   // [num_seqs]: row of block_tables that holds sequence i
  std::vector<int32_t> logits_indices;  // [num_logits]: tokens whose logits are wanted, ascending

  // [*][block_table_stride]: the block manager's own matrix, borrowed; with two steps in flight a
  // copy in own_block_tables, since the next schedule() changes that matrix.
  const BlockId* block_tables = nullptr;
  int32_t block_table_stride = 0;
  std::vector<BlockId> own_block_tables;

  std::vector<SamplingRow> sampling_rows;  // ascending in seq, and in logits_row within one
  std::vector<PromptLogprobRow> prompt_logprob_rows;
  BlockTransfers transfers;  // to be done before anything else

  // Only with two steps in flight. Until resolve() these tokens are -1.
  std::vector<FutureToken> future_tokens;
  // For the ModelRunner: writes every future token to token_ids and to where `token` points, given
  // what the step before sampled (its ModelRunnerOutput::sampled_token_ids). Before the tokens are
  // read, and not before the step before is done. Throws Error, having written nothing, if it
  // sampled fewer tokens than are asked for.
  void resolve(Span<const TokenId> sampled_token_ids) const;

  int32_t num_tokens() const { return static_cast<int32_t>(token_ids.size()); }
  int32_t num_logits() const { return static_cast<int32_t>(logits_indices.size()); }
  const BlockId* block_table(int32_t seq) const {
    return block_tables + static_cast<int64_t>(block_table_rows[seq]) * block_table_stride;
  }
};

// Log probabilities at one position: the chosen (or prompt) token first, then the most likely ones
// in descending order (the chosen token may be among them again).
struct TokenLogprobs {
  std::vector<TokenId> token_ids;  // [1 + k]
  std::vector<float> logprobs;     // [1 + k]
  int32_t rank = 0;                // of the chosen token, 1 = most likely
};

struct ModelRunnerOutput {
  int64_t step_id = 0;
  std::vector<TokenId> sampled_token_ids;  // one per sampling_rows entry
  // Empty, or one per sampling_rows entry (an entry that asked for none is empty).
  std::vector<TokenLogprobs> logprobs;
  std::vector<TokenLogprobs> prompt_logprobs;  // one per prompt_logprob_rows entry
  double sample_seconds = 0;  // of the step's time, what was spent on this; 0 if unknown
};

}  // namespace fastpage
