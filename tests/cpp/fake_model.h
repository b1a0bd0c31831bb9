// A model without weights whose next token is a hash of the KV cache as read through the block
// table. A block that is stale, misplaced or shared by mistake changes the output.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/beam_search.h"
#include "fastpage/model_runner.h"
#include "fastpage/scheduler.h"

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

// What is not paged: the KV of bare tokens, and the digest that stands for all of it.
struct FakeContext {
  uint64_t kv = 0;
  uint64_t digest = 0;
  int32_t size = 0;

  void add(TokenId token) {
    kv = fake_kv(kv, token, size++);
    digest = fake_hash(digest, kv);
  }
  void add(Span<const TokenId> tokens) {
    for (const TokenId token : tokens) add(token);
  }
};

inline bool fake_stops(TokenId token, const SamplingParams& params, Span<const TokenId> eos) {
  const std::vector<TokenId>& stops = params.stop_token_ids;
  return std::find(eos.begin(), eos.end(), token) != eos.end() ||
         std::find(stops.begin(), stops.end(), token) != stops.end();
}

// top_p < 1 makes a text that mostly goes round five tokens, so that its next token can be guessed.
inline TokenId fake_token(uint64_t kv_digest, TokenId last_token, uint64_t seed,
                          const SamplingParams& params, Span<const TokenId> eos_token_ids,
                          int32_t num_output_tokens, int32_t vocab_size) {
  const uint64_t draw = params.greedy() ? kv_digest : fake_hash(kv_digest, seed);
  TokenId token = static_cast<TokenId>(draw % vocab_size);
  if (params.top_p < 1.0f && (draw >> 32) % 8 != 0) token = vocab_size / 2 + (last_token + 1) % 5;
  while (num_output_tokens < params.min_tokens && fake_stops(token, params, eos_token_ids)) {
    token = (token + 1) % vocab_size;
  }
  return token;
}

// Of a token, given the context before it. Distinct for tokens of one context, exact in fp32.
inline float fake_logprob(uint64_t kv_digest, TokenId token) {
  const uint64_t draw = fake_hash(kv_digest, static_cast<uint64_t>(token)) % 4096;
  return -static_cast<float>(draw * 1024 + static_cast<uint64_t>(token) % 1024) / (1 << 18);
}

inline TokenLogprobs fake_logprobs(uint64_t kv_digest, TokenId chosen, int32_t k,
                                   int32_t vocab_size) {
  std::vector<std::pair<float, TokenId>> order;
  for (TokenId token = 0; token < vocab_size; ++token) {
    order.emplace_back(-fake_logprob(kv_digest, token), token);
  }
  std::sort(order.begin(), order.end());
  TokenLogprobs out{{chosen}, {fake_logprob(kv_digest, chosen)}, 1};
  for (const auto& [cost, token] : order) {
    if (token == chosen) break;
    ++out.rank;
  }
  for (int32_t i = 0; i < std::min(k, vocab_size); ++i) {
    out.token_ids.push_back(order[i].second);
    out.logprobs.push_back(-order[i].first);
  }
  return out;
}

struct FakeCompletion {
  std::vector<TokenId> tokens;  // output only
  FinishReason finish_reason = FinishReason::kNone;
  std::vector<float> prompt_logprobs;  // from the second prompt token on
};

inline int32_t fake_final_length(size_t num_prompt_tokens, const SamplingParams& params,
                                 int32_t max_model_len) {
  if (params.max_tokens < 0) return max_model_len;
  return static_cast<int32_t>(num_prompt_tokens) + params.max_tokens;
}

// What the fake model says to a prompt when nothing is paged, batched, cached or preempted.
// `output`: what it has said already (a fork goes on from there).
inline FakeCompletion fake_completion(const std::vector<TokenId>& prompt,
                                      const SamplingParams& params, uint64_t seed,
                                      const std::vector<TokenId>& eos_token_ids,
                                      int32_t max_model_len, int32_t vocab_size,
                                      std::vector<TokenId> output = {}) {
  const int32_t end = fake_final_length(prompt.size(), params, max_model_len);
  Span<const TokenId> eos;
  if (!params.ignore_eos) eos = eos_token_ids;
  FakeCompletion out;
  FakeContext context;
  for (const TokenId token : prompt) {
    if (context.size > 0 && params.prompt_logprobs >= 0) {
      out.prompt_logprobs.push_back(fake_logprob(context.digest, token));
    }
    context.add(token);
  }
  context.add(output);
  out.tokens = std::move(output);
  TokenId last = out.tokens.empty() ? prompt.back() : out.tokens.back();
  while (out.finish_reason == FinishReason::kNone) {
    const int32_t num_output = static_cast<int32_t>(out.tokens.size());
    last = fake_token(context.digest, last, seed, params, eos, num_output, vocab_size);
    out.tokens.push_back(last);
    if (num_output >= params.min_tokens && fake_stops(last, params, eos)) {
      out.finish_reason = FinishReason::kStop;
    } else if (context.size + 1 >= end) {
      out.finish_reason = FinishReason::kLength;
    }
    context.add(last);
  }
  return out;
}

// Beam search over the fake model's logprobs, on bare lists of tokens.
inline std::vector<BeamHypothesis> fake_beam_search(const std::vector<TokenId>& prompt,
                                                    const SamplingParams& params,
                                                    const std::vector<TokenId>& eos_token_ids,
                                                    int32_t max_model_len, int32_t vocab_size) {
  BeamSearch search(params, eos_token_ids, static_cast<int32_t>(prompt.size()),
                    fake_final_length(prompt.size(), params, max_model_len));
  std::vector<std::vector<TokenId>> beams{{}};
  while (!beams.empty()) {
    std::vector<TokenLogprobs> candidates;
    std::vector<Span<const TokenId>> outputs;
    for (const std::vector<TokenId>& beam : beams) {
      FakeContext context;
      context.add(prompt);
      context.add(beam);
      candidates.push_back(fake_logprobs(context.digest, 0, search.num_candidates(), vocab_size));
      outputs.push_back(beam);
    }
    std::vector<std::vector<TokenId>> next;
    for (const BeamContinuation& beam : search.step(outputs, candidates)) {
      next.push_back(beams[beam.parent]);
      next.back().push_back(beam.token);
    }
    beams = std::move(next);
  }
  return search.best(params.n);
}

struct FakeModelOptions {
  int32_t num_host_blocks = 0;
  int32_t max_steps_in_flight = 1;
  // Computes a step only when it is waited for, as late as a model on another thread may.
  bool lazy = false;
};

class FakeModel : public ModelRunner {
 public:
  FakeModel(int32_t num_blocks, int32_t block_size, int32_t vocab_size,
            const FakeModelOptions& options = {})
      : block_size_(block_size),
        vocab_size_(vocab_size),
        options_(options),
        kv_(static_cast<size_t>(num_blocks) * block_size),
        host_kv_(static_cast<size_t>(options.num_host_blocks) * block_size) {
    for (BlockId id = 0; id < num_blocks; ++id) poison(id);
    for (BlockId id = 0; id < options.num_host_blocks; ++id) poison_host(id);
  }

  // Its contents are of no use to anybody: they become garbage, other garbage each time.
  void poison(BlockId id) { fill_with_garbage(&kv_.at(int64_t{id} * block_size_)); }
  void poison_host(BlockId id) { fill_with_garbage(&host_kv_.at(int64_t{id} * block_size_)); }

  int32_t max_steps_in_flight() const override { return options_.max_steps_in_flight; }

  void execute(const InputBatch& batch) override {
    if (num_begun_ - num_waited_ >= options_.max_steps_in_flight) {
      throw std::logic_error("execute() with too many steps in flight");
    }
    if (batch.future_tokens.size() > 0 && num_begun_ == 0) {
      throw std::logic_error("future tokens in the first step");
    }
    Step& step = steps_[num_begun_ % kNumSteps];
    step.batch = &batch;
    step.output.step_id = batch.step_id;
    // The block tables may be the scheduler's own, and change with an abort; but not with the next
    // schedule() while this step is in flight.
    if (options_.max_steps_in_flight > 1 && batch.block_tables != batch.own_block_tables.data()) {
      throw std::logic_error("the next schedule() will change this step's block tables");
    }
    step.tables.clear();
    for (int32_t seq = 0; seq < batch.num_seqs; ++seq) {
      const int32_t num_blocks = (batch.seq_lens[seq] + block_size_ - 1) / block_size_;
      const BlockId* table = batch.block_table(seq);
      step.tables.insert(step.tables.end(), table, table + num_blocks);
    }
    step.done = false;
    ++num_begun_;
    if (num_begun_ > 1 && steps_[(num_begun_ - 2) % kNumSteps].done) resolve(num_begun_ - 1);
    if (!options_.lazy) compute(num_begun_ - 1);
  }

  const ModelRunnerOutput& wait(int64_t step_id) override {
    Step& step = steps_[num_waited_ % kNumSteps];
    if (num_waited_ == num_begun_ || step_id != step.output.step_id) {
      throw std::logic_error("wait() for a step that is not the oldest in flight");
    }
    compute(num_waited_++);
    return step.output;
  }

  // Nobody will wait for this step and those after it.
  void forget(int64_t step_id) {
    while (num_begun_ > num_waited_ &&
           steps_[(num_begun_ - 1) % kNumSteps].output.step_id >= step_id) {
      --num_begun_;
    }
  }

 private:
  // Two in flight, and the one that was waited for last.
  static constexpr int64_t kNumSteps = 3;

  struct Step {
    const InputBatch* batch = nullptr;
    std::vector<BlockId> tables;  // of all its sequences, one behind the other
    bool done = false;
    ModelRunnerOutput output;
  };

  void fill_with_garbage(uint64_t* block) {
    for (int32_t i = 0; i < block_size_; ++i) block[i] = fake_hash(0xdead, ++num_poisoned_);
  }

  void compute(int64_t index) {
    Step& step = steps_[index % kNumSteps];
    if (step.done) return;
    if (index > 0) compute(index - 1);
    step.done = true;
    const InputBatch& batch = *step.batch;
    transfer(batch.transfers);
    write_kv(step);
    read_kv(step);
    sample(&step);
    if (index + 1 < num_begun_) resolve(index + 1);
  }

  // As soon as the step before is done: once it was waited for, the scheduler reads the tokens.
  void resolve(int64_t index) {
    const InputBatch& batch = *steps_[index % kNumSteps].batch;
    if (batch.future_tokens.empty()) return;
    batch.resolve(steps_[(index + kNumSteps - 1) % kNumSteps].output.sampled_token_ids);
  }

  void transfer(const BlockTransfers& transfers) {
    for (const BlockSwap& swap : transfers.swap_outs) {
      copy(kv_, swap.device, &host_kv_, swap.host);
    }
    for (const BlockCopy& block : transfers.block_copies) copy(kv_, block.src, &kv_, block.dst);
    for (const BlockSwap& swap : transfers.swap_ins) copy(host_kv_, swap.host, &kv_, swap.device);
  }

  void copy(const std::vector<uint64_t>& from, BlockId src, std::vector<uint64_t>* to,
            BlockId dst) {
    for (int32_t i = 0; i < block_size_; ++i) {
      to->at(int64_t{dst} * block_size_ + i) = from.at(int64_t{src} * block_size_ + i);
    }
  }

  uint64_t& kv_at(const BlockId* table, int32_t position) {
    return kv_.at(int64_t{table[position / block_size_]} * block_size_ + position % block_size_);
  }

  // Where slot_mapping says; what came before is read where the block table says.
  void write_kv(const Step& step) {
    const InputBatch& batch = *step.batch;
    const BlockId* table = step.tables.data();
    for (int32_t seq = 0; seq < batch.num_seqs; ++seq) {
      const int32_t begin = batch.query_start_loc[seq];
      const int32_t end = batch.query_start_loc[seq + 1];
      if (batch.positions[end - 1] + 1 != batch.seq_lens[seq]) {
        throw std::logic_error("seq_lens is not the last position + 1");
      }
      for (int32_t i = begin; i < end; ++i) {
        const int32_t position = batch.positions[i];
        if (batch.token_ids[i] < 0) throw std::logic_error("a token that is not known is computed");
        const uint64_t previous = position == 0 ? 0 : kv_at(table, position - 1);
        kv_.at(batch.slot_mapping[i]) = fake_kv(previous, batch.token_ids[i], position);
      }
      table += (batch.seq_lens[seq] + block_size_ - 1) / block_size_;
    }
  }

  void read_kv(const Step& step) {
    const InputBatch& batch = *step.batch;
    digests_.resize(batch.num_logits());
    const BlockId* table = step.tables.data();
    int32_t seq = 0;
    int32_t position = 0;
    uint64_t digest = 0;
    for (int32_t row = 0; row < batch.num_logits(); ++row) {
      const int32_t at = batch.logits_indices[row];
      while (at >= batch.query_start_loc[seq + 1]) {
        table += (batch.seq_lens[seq] + block_size_ - 1) / block_size_;
        ++seq;
        position = 0;
        digest = 0;
      }
      for (; position <= batch.positions[at]; ++position) {
        digest = fake_hash(digest, kv_at(table, position));
      }
      digests_[row] = digest;
    }
  }

  void sample(Step* step) {
    const InputBatch& batch = *step->batch;
    ModelRunnerOutput& out = step->output;
    out.sampled_token_ids.clear();
    out.logprobs.clear();
    out.prompt_logprobs.clear();
    for (const SamplingRow& row : batch.sampling_rows) {
      const uint64_t digest = digests_.at(row.logits_row);
      check(batch, row, digest);
      const TokenId last = row.tokens[row.tokens.size() - 1];
      const TokenId token = fake_token(digest, last, row.seed, *row.params, row.eos_token_ids,
                                       row.num_output_tokens(), vocab_size_);
      out.sampled_token_ids.push_back(token);
      if (row.params->logprobs < 0) continue;
      out.logprobs.resize(batch.sampling_rows.size());
      out.logprobs[out.sampled_token_ids.size() - 1] =
          fake_logprobs(digest, token, row.params->logprobs, vocab_size_);
    }
    for (const PromptLogprobRow& row : batch.prompt_logprob_rows) {
      if (batch.positions[batch.logits_indices[row.logits_row]] + 1 != row.position) {
        throw std::logic_error("a prompt logprob's logits are not those of the token before");
      }
      out.prompt_logprobs.push_back(
          {{row.token}, {fake_logprob(digests_[row.logits_row], row.token)}, 1});
    }
  }

  // The output would differ, sooner or later; this says at once that the cache is wrong.
  static void check(const InputBatch& batch, const SamplingRow& row, uint64_t digest) {
    const int32_t at = batch.logits_indices[row.logits_row];
    if (at < batch.query_start_loc[row.seq] || at >= batch.query_start_loc[row.seq + 1] ||
        static_cast<size_t>(batch.positions[at]) + 1 != row.tokens.size() ||
        batch.token_ids[at] != row.tokens[row.tokens.size() - 1]) {
      throw std::logic_error("a sampling row's logits are not those of its last token");
    }
    FakeContext context;
    context.add(row.tokens);
    if (context.digest != digest) {
      throw std::logic_error("invariant 4: the KV that sequence " + std::to_string(row.seq) +
                             " of the batch reads is not that of its " +
                             std::to_string(row.tokens.size()) + " tokens");
    }
  }

  int32_t block_size_;
  int32_t vocab_size_;
  FakeModelOptions options_;
  std::vector<uint64_t> kv_;       // [num_blocks * block_size]
  std::vector<uint64_t> host_kv_;  // [num_host_blocks * block_size]
  std::vector<uint64_t> digests_;
  Step steps_[kNumSteps];
  int64_t num_begun_ = 0;
  int64_t num_waited_ = 0;
  uint64_t num_poisoned_ = 0;
};

}  // namespace fastpage
