// From logits to tokens. One row's result depends on that row alone: its logits, its parameters,
// its tokens, its seed; never on the batch or on the number of threads.
#pragma once

#include <memory>

#include "fastpage/input_batch.h"
#include "fastpage/tensor.h"

namespace fastpage {

class ThreadPool;
namespace sampling {
struct Scratch;
}

class Sampler {
 public:
  // `pool` may be null: then rows are sampled by the calling thread.
  explicit Sampler(int32_t vocab_size, ThreadPool* pool = nullptr);
  ~Sampler();

  // Sizes `out` for the batch. Once per step, before sample(). Throws InvalidArgument unless
  // sampling_rows and prompt_logprob_rows are in the order of their logits_row.
  void begin(const InputBatch& batch, ModelRunnerOutput* out);

  // logits: rows [first_row, first_row + logits.rows) of the step's logits, fp32. Fills in `out`
  // for those of the batch's sampling_rows and prompt_logprob_rows whose logits_row lies among
  // them.
  //
  // Order (vLLM's): logprobs are those of the raw logits; then allowed_token_ids, bad_words,
  // min_tokens, logit_bias, penalties, temperature, min_p, top_k, top_p, draw. The draw is Philox
  // 4x32-10 (Salmon et al., SC11) keyed by the seed and counted by position, then an inverse CDF
  // over the kept tokens in vocabulary order. Tokens with equal logits are kept or dropped
  // together. NaN counts as -inf; a +inf logit is certain, the lowest id first. A row in which
  // every token is forbidden yields the argmax of its raw logits, and token 0 if they are all -inf:
  // never an error, which would take the rest of the batch down with it.
  //
  // Any number of rows may share a logits row. Neighbours that differ in their seed alone (samples
  // of one prompt) share the work but for the draw.
  void sample(Matrix<const float> logits, int32_t first_row, const InputBatch& batch,
              ModelRunnerOutput* out);

 private:
  int32_t vocab_size_;
  ThreadPool* pool_;
  std::vector<std::unique_ptr<sampling::Scratch>> scratch_;  // one per thread
};

}  // namespace fastpage
