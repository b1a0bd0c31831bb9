// A model without weights whose next token is a hash of the KV cache as read through the block
// table. A block that is stale, misplaced or shared by mistake changes the output.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "fastpage/model_runner.h"

namespace fastpage {

inline uint64_t fake_hash(uint64_t a, uint64_t b) {
  uint64_t x = a * 0x9e3779b97f4a7c15 + b + 0x2545f4914f6cdd1d;
  x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93;
  return x ^ (x >> 29);
}

// What one token leaves in the cache: a function of itself and of all before it, as in a real
// model.
inline uint64_t fake_kv(uint64_t previous_kv, TokenId token, int32_t position) {
  return fake_hash(fake_hash(previous_kv, static_cast<uint64_t>(token)), position);
}

// `kv_digest` stands for the whole cached context.
inline TokenId fake_token(uint64_t kv_digest, uint64_t seed, const SamplingParams& params,
                          Span<const TokenId> eos_token_ids, int32_t num_output_tokens,
                          int32_t vocab_size) {
  const uint64_t draw = params.greedy() ? kv_digest : fake_hash(kv_digest, seed);
  TokenId token = static_cast<TokenId>(draw % vocab_size);
  const auto ends = [&](TokenId id) {
    const auto has = [id](const TokenId* begin, const TokenId* end) {
      return std::find(begin, end, id) != end;
    };
    return has(eos_token_ids.begin(), eos_token_ids.end()) ||
           has(params.stop_token_ids.data(),
               params.stop_token_ids.data() + params.stop_token_ids.size());
  };
  while (num_output_tokens < params.min_tokens && ends(token)) token = (token + 1) % vocab_size;
  return token;
}

// The logprob that the fake model reports for a prompt token, given the context before it.
inline float fake_logprob(uint64_t kv_digest, TokenId token) {
  return -static_cast<float>(fake_hash(kv_digest, static_cast<uint64_t>(token)) % 4096) / 64;
}

struct FakeCompletion {
  std::vector<TokenId> tokens;  // output only
  FinishReason finish_reason = FinishReason::kNone;
  std::vector<float> prompt_logprobs;  // from the second prompt token on
};

// What the fake model says to a prompt when nothing is paged, batched, cached or preempted.
inline FakeCompletion fake_completion(std::vector<TokenId> tokens, const SamplingParams& params,
                                      uint64_t seed, const std::vector<TokenId>& eos_token_ids,
                                      int32_t max_model_len, int32_t vocab_size) {
  const size_t num_prompt = tokens.size();
  const size_t end =
      params.max_tokens < 0 ? static_cast<size_t>(max_model_len) : num_prompt + params.max_tokens;
  Span<const TokenId> eos;
  if (!params.ignore_eos) eos = eos_token_ids;
  FakeCompletion out;
  uint64_t kv = 0;
  uint64_t digest = 0;
  for (size_t i = 0;; ++i) {
    if (i > 0 && i < num_prompt && params.prompt_logprobs >= 0) {
      out.prompt_logprobs.push_back(fake_logprob(digest, tokens[i]));
    }
    kv = fake_kv(kv, tokens[i], static_cast<int32_t>(i));
    digest = fake_hash(digest, kv);
    if (i + 1 < tokens.size()) continue;
    const int32_t num_output = static_cast<int32_t>(tokens.size() - num_prompt);
    const TokenId token = fake_token(digest, seed, params, eos, num_output, vocab_size);
    tokens.push_back(token);
    out.tokens.push_back(token);
    const bool stops = std::find(eos.begin(), eos.end(), token) != eos.end() ||
                       std::find(params.stop_token_ids.begin(), params.stop_token_ids.end(),
                                 token) != params.stop_token_ids.end();
    if (stops && num_output >= params.min_tokens) {
      out.finish_reason = FinishReason::kStop;
      return out;
    }
    if (tokens.size() >= end) {
      out.finish_reason = FinishReason::kLength;
      return out;
    }
  }
}

class FakeModel : public ModelRunner {
 public:
  FakeModel(int32_t num_blocks, int32_t block_size, int32_t vocab_size)
      : block_size_(block_size),
        vocab_size_(vocab_size),
        kv_(static_cast<size_t>(num_blocks) * block_size, 0xdead) {}

  void execute(const InputBatch& batch) override {
    output_.step_id = batch.step_id;
    output_.sampled_token_ids.clear();
    output_.prompt_logprobs.clear();
    write_kv(batch);
    digests_.resize(batch.num_logits());
    read_kv(batch);
    for (const SamplingRow& row : batch.sampling_rows) {
      const int32_t at = batch.logits_indices[row.logits_row];
      if (static_cast<size_t>(batch.positions[at]) + 1 != row.tokens.size() ||
          batch.token_ids[at] != row.tokens[row.tokens.size() - 1]) {
        throw std::logic_error("a sampling row's logits are not those of its last token");
      }
      output_.sampled_token_ids.push_back(fake_token(digests_[row.logits_row], row.seed,
                                                     *row.params, row.eos_token_ids,
                                                     row.num_output_tokens(), vocab_size_));
    }
    for (const PromptLogprobRow& row : batch.prompt_logprob_rows) {
      if (batch.positions[batch.logits_indices[row.logits_row]] + 1 != row.position) {
        throw std::logic_error("a prompt logprob's logits are not those of the token before");
      }
      output_.prompt_logprobs.push_back(
          {{row.token}, {fake_logprob(digests_[row.logits_row], row.token)}, 1});
    }
  }

  const ModelRunnerOutput& wait(int64_t step_id) override {
    if (step_id != output_.step_id) throw std::logic_error("wait() for another step");
    return output_;
  }

 private:
  uint64_t& kv_at(const InputBatch& batch, int32_t seq, int32_t position) {
    const BlockId block = batch.block_table(seq)[position / block_size_];
    return kv_.at(static_cast<size_t>(block) * block_size_ + position % block_size_);
  }

  // Where slot_mapping says; what came before is read where the block table says.
  void write_kv(const InputBatch& batch) {
    for (int32_t seq = 0; seq < batch.num_seqs; ++seq) {
      const int32_t begin = batch.query_start_loc[seq];
      const int32_t end = batch.query_start_loc[seq + 1];
      if (batch.positions[end - 1] + 1 != batch.seq_lens[seq]) {
        throw std::logic_error("seq_lens is not the last position + 1");
      }
      for (int32_t i = begin; i < end; ++i) {
        const int32_t position = batch.positions[i];
        const uint64_t previous = position == 0 ? 0 : kv_at(batch, seq, position - 1);
        kv_.at(batch.slot_mapping[i]) = fake_kv(previous, batch.token_ids[i], position);
      }
    }
  }

  void read_kv(const InputBatch& batch) {
    int32_t seq = 0;
    int32_t position = 0;
    uint64_t digest = 0;
    for (int32_t row = 0; row < batch.num_logits(); ++row) {
      const int32_t at = batch.logits_indices[row];
      while (at >= batch.query_start_loc[seq + 1]) {
        ++seq;
        position = 0;
        digest = 0;
      }
      for (; position <= batch.positions[at]; ++position) {
        digest = fake_hash(digest, kv_at(batch, seq, position));
      }
      digests_[row] = digest;
    }
  }

  int32_t block_size_;
  int32_t vocab_size_;
  std::vector<uint64_t> kv_;  // [num_blocks * block_size]
  std::vector<uint64_t> digests_;
  ModelRunnerOutput output_;
};

}  // namespace fastpage
