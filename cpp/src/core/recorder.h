// Writes a scheduler's calls as they are made: Scheduler::record().
#pragma once

#include <iosfwd>
#include <type_traits>
#include <unordered_set>
#include <vector>

#include "core/call_log.h"

namespace fastpage {

// One method a call: it writes the arguments, makes the call (`run`), and writes what it came to;
// so a call that ends the process is the last one in the log. An error of the stream ends the
// recording and nothing else.
class Recorder {
 public:
  Recorder(std::ostream* log, const SchedulerConfig& config);

  template <typename Run>
  RequestId add_request(const SequenceRequest& request, Run run) {
    const bool is_beam_search = request.params.beam_width > 0;
    begin_add_request(request);
    const RequestId id = finish(Call::kAddRequest, run);
    if (is_beam_search) beam_searches_.insert(id);
    return id;
  }
  template <typename Run>
  bool abort(RequestId id, Run run) {
    begin(Call::kAbort, id);
    beam_searches_.erase(id);
    return finish(Call::kAbort, run);
  }
  template <typename Run>
  bool abort(RequestId id, int32_t index, Run run) {
    begin(Call::kAbortSample, id, index);
    return finish(Call::kAbortSample, run);
  }
  template <typename Run>
  int32_t fork(RequestId id, int32_t index, uint64_t seed, Run run) {
    begin(Call::kFork, id, index, seed);
    return finish(Call::kFork, run);
  }
  template <typename Run>
  bool propose(RequestId id, int32_t index, Span<const TokenId> token_ids, Run run) {
    begin(Call::kPropose, id, index, token_ids);
    return finish(Call::kPropose, run);
  }
  template <typename Run>
  const SchedulerOutput& schedule(Run run) {
    begin(Call::kSchedule);
    const SchedulerOutput& step = finish(Call::kSchedule, run);
    steps_.push(&step);
    return step;
  }
  template <typename Run>
  void prepare(const SchedulerOutput& step, const InputBatch& batch, Run run) {
    begin_of_step(Call::kPrepare, step);
    finish(Call::kPrepare, [&]() -> const InputBatch& {
      run();
      return batch;
    });
  }
  template <typename Run>
  const std::vector<SequenceUpdate>& update(const SchedulerOutput& step,
                                            Span<const TokenId> sampled_token_ids,
                                            Span<const TokenLogprobs> logprobs, Run run) {
    begin_update(step, sampled_token_ids, logprobs);
    const std::vector<SequenceUpdate>& updates = finish(Call::kUpdate, run);
    forget_ended(updates);
    return updates;
  }
  template <typename Run>
  void discard(const SchedulerOutput& step, Run run) {
    begin_of_step(Call::kDiscard, step);
    finish(Call::kDiscard, run);
  }
  template <typename Run>
  bool reset_prefix_cache(Run run) {
    begin(Call::kResetPrefixCache);
    return finish(Call::kResetPrefixCache, run);
  }
  template <typename Run>
  void take_kv_events(const std::vector<KvEvent>& events, Run run) {
    begin(Call::kTakeKvEvents);
    finish(Call::kTakeKvEvents, [&]() -> const std::vector<KvEvent>& {
      run();
      return events;
    });
  }

 private:
  template <typename... Arguments>
  void begin(Call call, const Arguments&... arguments) {
    writer_(call, arguments...);
    flush();
  }
  void begin_add_request(const SequenceRequest& request);
  void begin_of_step(Call call, const SchedulerOutput& step);
  void begin_update(const SchedulerOutput& step, Span<const TokenId> sampled_token_ids,
                    Span<const TokenLogprobs> logprobs);
  void put_beams_logprobs(const SchedulerOutput& step, Span<const TokenLogprobs> logprobs);
  void forget_ended(const std::vector<SequenceUpdate>& updates);

  template <typename Run>
  decltype(auto) finish(Call call, Run run) {
    Outcome outcome;
    try {
      if constexpr (std::is_void_v<decltype(run())>) {
        run();
        end(call, outcome);
      } else {
        decltype(auto) result = run();
        describe_result(result, &outcome);
        end(call, outcome);
        return result;
      }
    } catch (const std::exception& error) {
      describe(error, &outcome);
      end(call, outcome);
      throw;
    }
  }
  template <typename Result>
  void describe_result(const Result& result, Outcome* outcome) {
    if constexpr (std::is_same_v<Result, InputBatch>) {
      describe(result, block_size_, outcome);
    } else {
      describe(result, outcome);
    }
  }
  void end(Call call, const Outcome& outcome);
  void flush() noexcept;

  std::ostream* log_;  // null: it failed
  int32_t block_size_;
  LogWriter writer_;
  RecentSteps steps_;
  // Requests whose log probabilities decide something: the others' are not logged.
  std::unordered_set<RequestId> beam_searches_;
};

}  // namespace fastpage
