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

// `logprobs` is null or asked for.
TokenId sample_row(Span<float> logits, const SamplingRow& row, Scratch* scratch,
                   TokenLogprobs* logprobs) {
  const bool processed = sampling::needs_processing(row);
  // A draw leaves weights where the logits were.
  const bool overwritten = processed || !row.params->greedy();
  Span<float> raw = logits;
  if (processed || (logprobs && overwritten)) {
    raw = {scratch->raw_logits.data(), logits.size()};
    std::copy(logits.begin(), logits.end(), raw.begin());
  }
  if (processed) sampling::process_logits(logits, row, scratch);

  TokenId token;
  if (row.params->greedy()) {
    token = sampling::argmax({logits.data(), logits.size()}, scratch);
  } else {
    const double uniform = philox_uniform(row.seed, row.tokens.size());
    token = sampling::draw(logits, *row.params, uniform, scratch);
  }
  if (token < 0 && processed) token = sampling::argmax({raw.data(), raw.size()}, scratch);
  token = std::max(token, 0);
  if (logprobs) sampling::compute_logprobs(raw, token, scratch, logprobs);
  return token;
}

template <typename Fn>
void for_each_row(ThreadPool* pool, size_t num_rows, Fn fn) {
  const auto part = [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) fn(i, thread);
  };
  if (pool) {
    pool->parallel_for(static_cast<int64_t>(num_rows), 1, part);
  } else {
    part(0, static_cast<int64_t>(num_rows), 0);
  }
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
  out->step_id = batch.step_id;
  out->sampled_token_ids.assign(rows.size(), 0);
  const bool any_logprobs = std::any_of(rows.begin(), rows.end(), [](const SamplingRow& row) {
    return row.params->logprobs != SamplingParams::kNoLogprobs;
  });
  out->logprobs.resize(any_logprobs ? rows.size() : 0);
  for (size_t i = 0; i < out->logprobs.size(); ++i) {
    size_logprobs(rows[i].params->logprobs, vocab_size_, &out->logprobs[i]);
  }
  out->prompt_logprobs.resize(batch.prompt_logprob_rows.size());
  for (size_t i = 0; i < out->prompt_logprobs.size(); ++i) {
    size_logprobs(batch.prompt_logprob_rows[i].num_logprobs, vocab_size_, &out->prompt_logprobs[i]);
  }
}

void Sampler::sample(Matrix<float> logits, int32_t first_row, const InputBatch& batch,
                     ModelRunnerOutput* out) {
  if (logits.cols != vocab_size_) {
    throw InvalidArgument("logits have " + std::to_string(logits.cols) +
                          " columns, the vocabulary has " + std::to_string(vocab_size_));
  }
  const auto row_of = [&](int32_t logits_row) -> Span<float> {
    const int64_t i = int64_t{logits_row} - first_row;
    if (i < 0 || i >= logits.rows) return {};
    return {logits.row(i), static_cast<size_t>(vocab_size_)};
  };
  for_each_row(pool_, batch.prompt_logprob_rows.size(), [&](int64_t i, int thread) {
    const PromptLogprobRow& row = batch.prompt_logprob_rows[i];
    const Span<float> values = row_of(row.logits_row);
    if (values.empty()) return;
    sampling::compute_logprobs(values, row.token, scratch_[thread].get(), &out->prompt_logprobs[i]);
  });
  for_each_row(pool_, batch.sampling_rows.size(), [&](int64_t i, int thread) {
    const SamplingRow& row = batch.sampling_rows[i];
    const Span<float> values = row_of(row.logits_row);
    if (values.empty()) return;
    TokenLogprobs* logprobs =
        row.params->logprobs == SamplingParams::kNoLogprobs ? nullptr : &out->logprobs[i];
    out->sampled_token_ids[i] = sample_row(values, row, scratch_[thread].get(), logprobs);
  });
}

}  // namespace fastpage
