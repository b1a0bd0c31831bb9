// Which beams go on, and which hypotheses are the best: the algorithm alone, without blocks and
// sequences. The rules are those of transformers' GenerationMixin._beam_search (5.23), its float32
// sums included. Equals: the better beam first, then the lower token id, and of the finished ones
// the earlier.
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
  // Sum of its tokens' logprobs / token_ids.size() ^ length_penalty.
  float score;
  FinishReason finish_reason;  // kStop: ended by stop_token_id; else kLength
  TokenId stop_token_id;       // -1 if none
};

class BeamSearch {
 public:
  // final_length: prompt + output at most. Stop tokens are params.stop_token_ids, and
  // eos_token_ids unless ignore_eos; there are none while fewer than min_tokens are out.
  BeamSearch(const SamplingParams& params, Span<const TokenId> eos_token_ids,
             int32_t num_prompt_tokens, int32_t final_length);

  // How many of the most likely tokens each beam's row must bring (SamplingParams::logprobs):
  // beam_width that may go on, behind every stop token. A vocabulary may hold fewer.
  int32_t num_candidates() const;

  // One token further. outputs[i]: what beam i has so far, in the order that the last step()
  // returned (at first: one, empty); candidates[i]: its num_candidates() most likely next tokens
  // (from entry 1 on; entry 0 is the sampler's own choice and of no matter here). Returns the beams
  // that go on, best first, at most beam_width; none: the search is over. Valid until the next
  // call.
  const std::vector<BeamContinuation>& step(Span<const Span<const TokenId>> outputs,
                                            Span<const TokenLogprobs> candidates);

  // Once the search is over: the n <= beam_width best, in descending order of score. Where the
  // vocabulary is too small for so many the last one is repeated.
  std::vector<BeamHypothesis> best(int32_t n) const;

 private:
  struct Candidate {
    float sum;  // of logprobs
    BeamContinuation continuation;
    bool stops;
  };

  bool is_stop(TokenId token) const;
  void gather(Span<const TokenLogprobs> candidates, bool may_stop);
  void advance(Span<const Span<const TokenId>> outputs, int32_t num_output_tokens);
  void finish(const Candidate& candidate, Span<const TokenId> output, float score);
  bool is_over(int32_t num_output_tokens) const;
  float score(float sum, int32_t num_output_tokens) const;

  const int32_t beam_width_;
  const int32_t min_tokens_;
  const int32_t max_tokens_;
  const float length_penalty_;
  const EarlyStopping early_stopping_;
  std::vector<TokenId> stop_token_ids_;  // ascending, each once

  std::vector<float> sums_;  // of the running beams
  std::vector<BeamContinuation> running_;
  std::vector<BeamHypothesis> finished_;  // the best so far, in descending order of score
  std::vector<Candidate> candidates_;     // scratch of step()
};

}  // namespace fastpage
