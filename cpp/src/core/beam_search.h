// Which beams go on, and which hypotheses are the best: the algorithm alone, without blocks and
// sequences. The rules are those of transformers' GenerationMixin._beam_search.
#pragma once

#include <vector>

#include "fastpage/input_batch.h"
#include "fastpage/sampling_params.h"
#include "fastpage/types.h"

namespace fastpage {

// A beam of the next step: one of this step's, and a token more.
struct BeamContinuation {
  int32_t parent;
  TokenId token;
};

struct BeamHypothesis {
  std::vector<TokenId> token_ids;  // output only; with the token that ended it
  float score;
  FinishReason finish_reason;
  TokenId stop_token_id;  // -1 if none
};

class BeamSearch {
 public:
  // final_length: prompt + output at most. Stop tokens are params.stop_token_ids, and
  // eos_token_ids unless ignore_eos.
  BeamSearch(const SamplingParams& params, Span<const TokenId> eos_token_ids,
             int32_t num_prompt_tokens, int32_t final_length);

  // How many of the most likely tokens each beam's row must bring (SamplingParams::logprobs).
  int32_t num_candidates() const;

  // One token further. outputs[i]: what beam i has so far, in the order that the last step()
  // returned (at first: one, empty); candidates[i]: its num_candidates() most likely next tokens
  // (from entry 1 on; entry 0 is the sampler's own choice and of no matter here). Returns the beams
  // that go on, best first; none: the search is over. Valid until the next call.
  const std::vector<BeamContinuation>& step(Span<const Span<const TokenId>> outputs,
                                            Span<const TokenLogprobs> candidates);

  // Once the search is over: the n best, in descending order of score.
  std::vector<BeamHypothesis> best(int32_t n) const;
};

}  // namespace fastpage
