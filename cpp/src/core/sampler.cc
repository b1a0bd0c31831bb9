#include "fastpage/sampler.h"

#include <algorithm>

#include "core/sampling/candidates.h"
#include "core/sampling/logits_processors.h"
#include "core/sampling/logprobs.h"
#include "core/sampling/philox.h"
#include "fastpage/thread_pool.h"

namespace fastpage {

using sampling::Scratch;

namespace {

// Room for the token itself and the k most likely ones; none for k = kNoLogprobs.
void size_logprobs(int32_t k, int32_t vocab_size, TokenLogprobs* out) {
  const int32_t size = k == SamplingParams::kNoLogprobs ? 0 : 1 + std::min(k, vocab_size);
  out->token_ids.resize(size);
  out->logprobs.resize(size);
  out->rank = 0;
}

bool wants_logprobs(const SamplingRow& row) {
  return row.params->logprobs != SamplingParams::kNoLogprobs;
}

bool same(Span<const TokenId> a, Span<const TokenId> b) {
  return a.data() == b.data() && a.size() == b.size();
}

// Rows that differ in their seed at most: samples of one prompt.
bool alike(const SamplingRow& a, const SamplingRow& b) {
  return a.logits_row == b.logits_row && a.params == b.params && same(a.tokens, b.tokens) &&
         a.num_prompt_tokens == b.num_prompt_tokens && same(a.eos_token_ids, b.eos_token_ids);
}

// The tokens of rows that are alike: what is common to them is worked out once.
void sample_alike(Span<const float> raw, Span<const SamplingRow> rows, Scratch* scratch,
                  TokenId* tokens) {
  const SamplingRow& row = rows[0];
  Span<const float> logits = raw;
  if (sampling::needs_processing(row)) {
    const Span<float> copy(scratch->copy);
    std::copy(raw.begin(), raw.end(), copy.begin());
    sampling::process_logits(copy, row, scratch);
    logits = scratch->copy;
  }
  if (row.params->greedy()) {
    std::fill_n(tokens, rows.size(), sampling::argmax(logits, scratch));
  } else {
    const sampling::Distribution d = sampling::distribution(logits, *row.params, scratch);
    for (size_t i = 0; i < rows.size(); ++i) {
      tokens[i] = sampling::draw(d, philox_uniform(rows[i].seed, rows[i].tokens.size()));
    }
  }
  if (tokens[0] < 0) {
    std::fill_n(tokens, rows.size(), std::max(sampling::argmax(raw, scratch), 0));
  }
}

// fn(begin, end, thread) for parts of [0, num_rows).
template <typename Fn>
void for_parts(ThreadPool* pool, size_t num_rows, const Fn& fn) {
  const auto n = static_cast<int64_t>(num_rows);
  if (pool) {
    pool->parallel_for(n, 1, fn);
  } else {
    fn(int64_t{0}, n, 0);
  }
}

template <typename Row>
bool in_order(const std::vector<Row>& rows) {
  return std::is_sorted(rows.begin(), rows.end(),
                        [](const Row& a, const Row& b) { return a.logits_row < b.logits_row; });
}

// Those of `rows` whose logits_row is in [begin, end).
template <typename Row>
Span<const Row> within(const std::vector<Row>& rows, int64_t begin, int64_t end) {
  const auto first_from = [&](int64_t logits_row) {
    return std::partition_point(rows.begin(), rows.end(),
                                [&](const Row& row) { return row.logits_row < logits_row; }) -
           rows.begin();
  };
  const auto first = first_from(begin);
  return {rows.data() + first, static_cast<size_t>(first_from(end) - first)};
}

}  // namespace

Sampler::Sampler(int32_t vocab_size, ThreadPool* pool) : vocab_size_(vocab_size), pool_(pool) {
  if (vocab_size < 1) {
    throw InvalidArgument("vocab_size must be >= 1, got " + std::to_string(vocab_size));
  }
  const int num_threads = pool ? pool->num_threads() : 1;
  for (int t = 0; t < num_threads; ++t) scratch_.push_back(std::make_unique<Scratch>(vocab_size));
}

Sampler::~Sampler() = default;

void Sampler::begin(const InputBatch& batch, ModelRunnerOutput* out) {
  const auto& rows = batch.sampling_rows;
  if (!in_order(rows) || !in_order(batch.prompt_logprob_rows)) {
    throw InvalidArgument("sampling_rows and prompt_logprob_rows must ascend in logits_row");
  }
  out->step_id = batch.step_id;
  out->sampled_token_ids.assign(rows.size(), 0);
  const bool any_logprobs = std::any_of(rows.begin(), rows.end(), wants_logprobs);
  out->logprobs.resize(any_logprobs ? rows.size() : 0);
  for (size_t i = 0; i < out->logprobs.size(); ++i) {
    size_logprobs(rows[i].params->logprobs, vocab_size_, &out->logprobs[i]);
  }
  out->prompt_logprobs.resize(batch.prompt_logprob_rows.size());
  for (size_t i = 0; i < out->prompt_logprobs.size(); ++i) {
    size_logprobs(batch.prompt_logprob_rows[i].num_logprobs, vocab_size_, &out->prompt_logprobs[i]);
  }
}

void Sampler::sample(Matrix<const float> logits, int32_t first_row, const InputBatch& batch,
                     ModelRunnerOutput* out) {
  if (logits.cols != vocab_size_) {
    throw InvalidArgument("logits have " + std::to_string(logits.cols) +
                          " columns, the vocabulary has " + std::to_string(vocab_size_));
  }
  const int64_t end_row = first_row + logits.rows;
  const auto row_of = [&](int32_t logits_row) -> Span<const float> {
    return {logits.row(logits_row - first_row), static_cast<size_t>(vocab_size_)};
  };

  const auto prompt_rows = within(batch.prompt_logprob_rows, first_row, end_row);
  TokenLogprobs* const prompt_logprobs =
      out->prompt_logprobs.data() + (prompt_rows.data() - batch.prompt_logprob_rows.data());
  for_parts(pool_, prompt_rows.size(), [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) {
      const PromptLogprobRow& row = prompt_rows[i];
      sampling::compute_logprobs(row_of(row.logits_row), {&row.token, 1}, scratch_[thread].get(),
                                 &prompt_logprobs[i]);
    }
  });

  const auto rows = within(batch.sampling_rows, first_row, end_row);
  const size_t first = rows.data() - batch.sampling_rows.data();
  TokenId* const tokens = out->sampled_token_ids.data() + first;
  for_parts(pool_, rows.size(), [&](int64_t begin, int64_t end, int thread) {
    Scratch* const scratch = scratch_[thread].get();
    for (int64_t next = begin; begin < end; begin = next) {
      while (next < end && alike(rows[begin], rows[next])) ++next;
      const Span<const float> raw = row_of(rows[begin].logits_row);
      const auto count = static_cast<size_t>(next - begin);
      sample_alike(raw, rows.subspan(begin, count), scratch, tokens + begin);
      if (wants_logprobs(rows[begin])) {
        sampling::compute_logprobs(raw, {tokens + begin, count}, scratch,
                                   &out->logprobs[first + static_cast<size_t>(begin)]);
      }
    }
  });
}

}  // namespace fastpage
