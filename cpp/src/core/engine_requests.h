// What the engine knows of each request, and how news of its sequences become RequestOutputs.
#pragma once

#include <chrono>
#include <memory>
#include <vector>

#include "fastpage/engine.h"

namespace fastpage {

// One of the n outputs that a request was asked for.
struct Sample {
  bool finished = false;  // written with both of the engine's locks held: either will do to read it
  int32_t num_output_tokens = 0;
  double cumulative_logprob = 0;
};

// A request in progress: the scheduler's tag of it points here.
struct Group {
  using Clock = std::chrono::steady_clock;
  enum class Delivery : uint8_t {
    kAsMade,
    kBestOf,  // kept in `held` until the last of best_of samples is done
    kBeams,   // the scheduler itself keeps them until then
  };

  Group(const SamplingParams& params, size_t num_prompt_tokens);

  // With its counts, and no tokens.
  RequestOutput news_of(int32_t index, FinishReason reason) const;
  // A step that began then computes something of it.
  void start(Clock::time_point now) {
    if (queue_seconds < 0) queue_seconds = std::chrono::duration<double>(now - arrived).count();
  }
  // The tokens that an update has brought, with what belongs to them, go to the end of `news`.
  void append(const SequenceUpdate& update, const ModelRunnerOutput& result,
              RequestOutput* news) const;
  // Takes in an update of kBestOf. Returns true if it was the last one.
  bool hold(const SequenceUpdate& update, const ModelRunnerOutput& result);
  // The n most likely of those held, in that order.
  std::vector<RequestOutput> take_best();

  RequestId id = 0;
  RequestId scheduler_id = 0;  // 0 until it is admitted
  Clock::time_point arrived = Clock::now();
  double queue_seconds = -1;  // until it was started
  Delivery delivery;
  bool needs_logprobs;    // of the runner, for whatever reason
  bool reports_logprobs;  // to the caller
  bool abort_asked = false;
  float length_penalty;
  int32_t num_prompt_tokens;
  int32_t num_cached_tokens = 0;
  int32_t num_unfinished;           // of `samples`
  int32_t num_held_unfinished = 0;  // of `held`
  std::vector<Sample> samples;      // [n]
  std::vector<RequestOutput> held;  // [best_of]
};

inline Group* group_of(uint64_t tag) { return reinterpret_cast<Group*>(tag); }
inline uint64_t tag_of(const Group* group) { return reinterpret_cast<uint64_t>(group); }

// Throws Error unless the runner has answered what it was asked: what it gets wrong must not become
// an index into something. `expect_logprobs` false: no row has asked for any.
void check_result(const InputBatch& batch, const ModelRunnerOutput& result, int32_t vocab_size,
                  bool expect_logprobs);

}  // namespace fastpage
