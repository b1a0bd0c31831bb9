// Random settings and requests, the same for the same seed.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "fastpage/engine.h"

namespace fastpage {

// Choices: of a seeded generator, or of a fuzzer's bytes.
class Choices {
 public:
  virtual ~Choices() = default;
  virtual uint64_t below(uint64_t n) = 0;  // [0, n)

  int32_t between(int32_t low, int32_t high) {
    return low + static_cast<int32_t>(below(static_cast<uint64_t>(int64_t{high} - low + 1)));
  }
  bool one_in(int32_t n) { return below(n) == 0; }
  template <typename T>
  T of(std::initializer_list<T> values) {
    return values.begin()[below(values.size())];
  }
};

class SeededChoices : public Choices {
 public:
  explicit SeededChoices(uint64_t seed) : engine_(seed) {}
  uint64_t below(uint64_t n) override { return engine_() % n; }

 private:
  std::mt19937_64 engine_;
};

// As many as distinct contents need, as few as make tokens meet again.
inline constexpr int32_t kFakeVocabSize = 40;

inline std::string describe(const SchedulerConfig& c) {
  std::ostringstream out;
  out << "num_blocks " << c.num_blocks << ", num_host_blocks " << c.num_host_blocks
      << ", block_size " << c.block_size << ", max_num_seqs " << c.max_num_seqs
      << ", max_num_batched_tokens " << c.max_num_batched_tokens << ", max_model_len "
      << c.max_model_len << ", long_prefill_token_threshold " << c.long_prefill_token_threshold
      << ", max_num_partial_prefills " << c.max_num_partial_prefills << ", enable_prefix_caching "
      << c.enable_prefix_caching << ", policy " << static_cast<int>(c.policy)
      << ", swap_cost_per_block " << c.swap_cost_per_block << ", max_steps_in_flight "
      << c.max_steps_in_flight << ", num_speculative_tokens " << c.num_speculative_tokens
      << ", prompt_lookup " << c.prompt_lookup_min << ".." << c.prompt_lookup_max
      << ", enable_kv_events " << c.enable_kv_events;
  return out.str();
}

// From pools too small for some requests to far too large, settings in every combination.
inline SchedulerConfig random_config(Choices* choices) {
  SchedulerConfig config;
  config.block_size = choices->of({1, 2, 3, 4, 4, 8, 16});
  config.max_model_len = choices->between(8, choices->of({24, 48, 96}));
  const int32_t longest = (config.max_model_len + config.block_size - 1) / config.block_size;
  config.num_blocks =
      std::max(1, longest * choices->between(5, choices->of({10, 20, 30, 60})) / 10);
  config.num_host_blocks = choices->of({0, 0, choices->between(1, 4), 2 * config.num_blocks});
  config.swap_cost_per_block = choices->of({0.0f, 1.0f, 1e9f});
  config.max_num_seqs = choices->between(1, choices->of({3, 8, 16}));
  config.max_num_batched_tokens = choices->between(1, choices->of({4, 32, 128}));
  config.long_prefill_token_threshold = choices->one_in(3) ? choices->between(1, 12) : 0;
  config.max_num_partial_prefills = choices->one_in(3) ? choices->between(1, 3) : 0;
  config.enable_prefix_caching = !choices->one_in(4);
  config.policy = choices->of({SchedulingPolicy::kFcfs, SchedulingPolicy::kPriority});
  config.max_steps_in_flight = choices->between(1, 2);
  config.num_speculative_tokens = choices->one_in(2) ? choices->between(1, 4) : 0;
  config.prompt_lookup_min = choices->between(1, 2);
  config.prompt_lookup_max = config.prompt_lookup_min + choices->between(0, 2);
  config.enable_kv_events = choices->one_in(3);
  if (choices->one_in(8)) config.max_num_waiting = choices->between(1, 20);
  if (choices->one_in(8)) config.max_num_waiting_tokens = choices->between(1, 100);
  config.hash_key_lo = choices->below(~uint64_t{0});
  config.hash_key_hi = choices->below(~uint64_t{0});
  config.eos_token_ids = {0, 1};
  return config;
}

// Prompts share prefixes of all lengths: each continues one of a few lines, for a while.
inline std::vector<TokenId> random_prompt(Choices* choices, int32_t max_length) {
  std::vector<TokenId> prompt;
  const int32_t line = choices->between(0, 2);
  const int32_t shared = choices->between(0, max_length);
  const int32_t length = choices->one_in(2) ? std::max(1, shared) : choices->between(1, max_length);
  for (int32_t i = 0; i < length; ++i) {
    prompt.push_back(i < shared ? (line * 7 + i * 3) % kFakeVocabSize
                                : choices->between(0, kFakeVocabSize - 1));
  }
  return prompt;
}

inline void make_beam_search(Choices* choices, SamplingParams* params) {
  params->beam_width = choices->between(1, 4);
  params->n = choices->between(1, params->beam_width);
  params->temperature = choices->of({0.0f, 1.0f});
  params->length_penalty = choices->of({0.0f, 1.0f, 2.0f, -0.5f});
  params->early_stopping =
      choices->of({EarlyStopping::kNo, EarlyStopping::kYes, EarlyStopping::kNever});
}

inline SequenceRequest random_request(Choices* choices, int32_t max_length) {
  SequenceRequest request;
  request.prompt_token_ids = random_prompt(choices, max_length);
  SamplingParams& params = request.params;
  params.max_tokens = choices->one_in(8) ? -1 : choices->between(1, max_length);
  params.ignore_eos = !choices->one_in(3);
  params.min_tokens = choices->one_in(3) ? choices->between(0, 6) : 0;
  if (choices->one_in(4)) params.stop_token_ids = {5, 6};
  if (choices->one_in(8)) {
    make_beam_search(choices, &params);
  } else {
    params.temperature = choices->of({0.0f, 1.0f});
    if (choices->one_in(3)) params.top_p = 0.5f;  // see fake_token()
    if (choices->one_in(3)) params.n = choices->between(2, 6);
    if (choices->one_in(8)) params.best_of = params.n + choices->between(0, 2);
    if (choices->one_in(6)) params.prompt_logprobs = 0;
    if (choices->one_in(6)) params.logprobs = choices->between(0, 3);
  }
  request.seed = choices->below(~uint64_t{0});
  request.priority = choices->between(-2, 2);
  if (choices->one_in(8)) request.cache_salt = "tenant";
  return request;
}

inline Request to_request(SequenceRequest sequences) {
  Request request;
  request.prompt_token_ids = std::move(sequences.prompt_token_ids);
  request.params = std::move(sequences.params);
  request.params.seed = sequences.seed;
  request.priority = sequences.priority;
  request.cache_salt = std::move(sequences.cache_salt);
  return request;
}

// ---- what no caller should say, and some do

inline int32_t any_int(Choices* choices) {
  constexpr int32_t kMin = std::numeric_limits<int32_t>::min();
  constexpr int32_t kMax = std::numeric_limits<int32_t>::max();
  if (choices->one_in(6)) return choices->of({kMin, -2, -1, 0, 65, 1025, 1 << 20, kMax - 1, kMax});
  return choices->between(0, 12);
}

inline float any_float(Choices* choices) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  return choices->of({1.0f, 0.0f, -1.0f, 0.5f, 2.0f, NAN, kInfinity, -kInfinity, 1e30f, 1e-40f});
}

inline std::vector<int32_t> any_ints(Choices* choices, int32_t max_size) {
  std::vector<int32_t> out(choices->between(0, max_size));
  for (int32_t& each : out) each = any_int(choices);
  return out;
}

inline SequenceRequest absurd_request(Choices* choices) {
  SequenceRequest request = random_request(choices, 24);
  SamplingParams& params = request.params;
  for (int32_t SamplingParams::* field :
       {&SamplingParams::n, &SamplingParams::best_of, &SamplingParams::beam_width,
        &SamplingParams::max_tokens, &SamplingParams::min_tokens, &SamplingParams::logprobs,
        &SamplingParams::prompt_logprobs}) {
    if (choices->one_in(8)) params.*field = any_int(choices);
  }
  if (choices->one_in(4)) params.temperature = any_float(choices);
  if (choices->one_in(4)) params.length_penalty = any_float(choices);
  if (choices->one_in(8)) request.prompt_token_ids = any_ints(choices, 6);
  if (choices->one_in(8)) params.stop_token_ids = any_ints(choices, 20);
  if (choices->one_in(8)) request.priority = any_int(choices);
  return request;
}

}  // namespace fastpage
