// Scheduler + ModelRunner behind calls that are safe from any thread: add, abort, step.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "fastpage/model_runner.h"
#include "fastpage/scheduler.h"

namespace fastpage {

struct EngineConfig {
  SchedulerConfig scheduler;
  int32_t vocab_size = 0;
  uint64_t seed = 0;  // of requests that bring none: request number i gets a function of (seed, i)
  // Draw the block hashes' key from the operating system. False (tests, replay):
  // scheduler.hash_key_*.
  bool random_hash_key = true;
};

struct Request {
  std::vector<TokenId> prompt_token_ids;
  SamplingParams params;
  int32_t priority = 0;
  std::string cache_salt;
};

// News of one sample of one request.
struct RequestOutput {
  RequestId request_id;
  int32_t index;  // [0, n)
  std::vector<TokenId> new_token_ids;
  std::vector<TokenLogprobs> logprobs;         // one per new token, if asked for
  std::vector<TokenLogprobs> prompt_logprobs;  // one per prompt token from the second on as they
                                               // are computed, index 0 only
  FinishReason finish_reason = FinishReason::kNone;
  TokenId stop_token_id = -1;
  int32_t num_prompt_tokens = 0;
  int32_t num_output_tokens = 0;  // so far
  int32_t num_cached_tokens = 0;
};

struct StepOutput {
  int64_t step_id = -1;    // -1: there was nothing to compute
  int32_t num_tokens = 0;  // computed in this step
  // Sequences with a new token, new prompt logprobs, or an end. Outputs of an abort come with the
  // next step.
  std::vector<RequestOutput> outputs;
};

struct EngineStats {
  SchedulerStats scheduler;
  int64_t num_steps = 0;
  int64_t num_computed_tokens = 0;
  int64_t num_generated_tokens = 0;
  double schedule_seconds = 0;  // time spent so far in: schedule + prepare + update,
  double model_seconds = 0;     // the runner
};

class Engine {
 public:
  Engine(const EngineConfig& config, std::shared_ptr<ModelRunner> runner);
  ~Engine();

  // Checked here, in the caller's thread (InvalidArgument, ResourceExhausted); admitted by a later
  // step.
  RequestId add_request(Request request);
  // Its blocks are free once the step in progress, if any, is done. An aborted request gets one
  // last output per unfinished sample (kAbort). False if unknown or finished.
  bool abort(RequestId id);
  // Ends one sample of it; the others go on. False if it is finished, or there is none such.
  bool abort(RequestId id, int32_t index);
  // Schedule, prepare, forward, sample, update: one whole step. Calls from several threads take
  // turns. If the runner throws, every request of that step ends with kAbort at the next step and
  // the exception goes to the caller; the engine stays usable.
  StepOutput step();
  bool has_unfinished() const;
  // Waits until there is work, wake() is called, or the time is over. True if there is work.
  bool wait_for_work(double timeout_seconds);
  void wake();

  bool reset_prefix_cache();
  EngineStats stats() const;
  void check_integrity() const;
  const EngineConfig& config() const;

 private:
  struct State;
  std::unique_ptr<State> s_;
};

}  // namespace fastpage
