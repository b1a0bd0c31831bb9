// Scheduler + ModelRunner behind calls that are safe from any thread: add, abort, step.
#pragma once

#include <iosfwd>
#include <memory>
#include <string>
#include <vector>

#include "fastpage/kv_events.h"
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
  // Step N + 1 is scheduled and laid out while the runner still computes step N. Outputs are the
  // same. Needs a runner with max_steps_in_flight() >= 2. (It decides what
  // scheduler.max_steps_in_flight is.)
  bool async_scheduling = false;
};

struct Request {
  std::vector<TokenId> prompt_token_ids;
  SamplingParams params;
  int32_t priority = 0;
  std::string cache_salt;
};

// News of one sample of one request. Samples' news come as they are made; with best_of > n and with
// beam search they come once, when the whole request is done: index is the rank then, 0 = best.
struct RequestOutput {
  RequestId request_id;
  int32_t index;  // [0, n)
  std::vector<TokenId> new_token_ids;
  std::vector<TokenLogprobs> logprobs;         // one per new token, if asked for (beams: none)
  std::vector<TokenLogprobs> prompt_logprobs;  // one per prompt token from the second on as they
                                               // are computed, of one sample only (index 0)
  FinishReason finish_reason = FinishReason::kNone;
  TokenId stop_token_id = -1;
  int32_t num_prompt_tokens = 0;
  int32_t num_output_tokens = 0;  // so far
  int32_t num_cached_tokens = 0;
  // Of all output tokens so far; 0 unless logprobs were asked for, best_of > n, or beams.
  double cumulative_logprob = 0;
  float score = 0;  // beams only: see SamplingParams::length_penalty
  // From add_request() to the first step that computed something of the request; to its end if none
  // did.
  double queue_seconds = 0;
};

struct StepOutput {
  // The step whose outputs these are; -1: there was nothing to compute. With async_scheduling the
  // next one is under way already.
  int64_t step_id = -1;
  int32_t num_tokens = 0;  // computed in this step
  // Sequences with a new token, new prompt logprobs, or an end. Outputs of an abort come with the
  // next step.
  std::vector<RequestOutput> outputs;
  std::vector<KvEvent> kv_events;  // since the last call, with scheduler.enable_kv_events
};

struct EngineStats {
  SchedulerStats scheduler;
  int64_t num_steps = 0;
  int64_t num_computed_tokens = 0;
  int64_t num_generated_tokens = 0;
  // What step() has spent so far on
  double schedule_seconds = 0;  // taking in requests and deciding steps,
  double prepare_seconds = 0;   // laying out their inputs,
  double model_seconds = 0;     // the runner's execute() and wait(), but for
  double sample_seconds = 0;    // its sampling, if it says how long that took,
  double output_seconds = 0;    // taking in the tokens and making the outputs.
};

class Engine {
 public:
  Engine(const EngineConfig& config, std::shared_ptr<ModelRunner> runner);
  ~Engine();

  // Checked here, in the caller's thread (InvalidArgument, ResourceExhausted); admitted by a later
  // step.
  RequestId add_request(Request request);
  // Its blocks are free once the call of step() in progress, if any, is done. An aborted request
  // gets one last output for each of its n that has not ended (kAbort). False if unknown or
  // finished.
  bool abort(RequestId id);
  // Ends one sample of it; the others go on. False if it is finished, there is none such, or the
  // request is one of beams or best_of > n: what is going to be its index-th best is not known
  // before the end.
  bool abort(RequestId id, int32_t index);
  // Schedule, prepare, forward, sample, update: one whole step, and with async_scheduling the
  // beginning of the next. Calls from several threads take turns. If the runner throws, every
  // request of that step (and of one that was begun after it) ends with kAbort at the next call,
  // and the exception goes to the caller; the engine stays usable.
  StepOutput step();
  // A request, outputs that nobody has fetched yet, or a step under way.
  bool has_unfinished() const;
  int64_t progress() const;  // the runner's
  // Waits until there is work, wake() is called, or the time is over. True if there is work.
  bool wait_for_work(double timeout_seconds);
  void wake();

  // See Scheduler::record() and replay.h: the log holds all prompts and outputs. Throws
  // InvalidArgument once a request has come. `log` must outlive the engine.
  void record(std::ostream* log);
  // The same into a new file. Throws InvalidArgument if it cannot be written.
  void record(const std::string& path);

  bool reset_prefix_cache();
  EngineStats stats() const;
  void check_integrity() const;
  const EngineConfig& config() const;

 private:
  struct State;
  std::unique_ptr<State> s_;
};

}  // namespace fastpage
