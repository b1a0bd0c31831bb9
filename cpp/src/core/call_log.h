// The log of a scheduler's calls: what Recorder writes and replay() reads.
//
//   log    = "fpreplay" version:fixed32 SchedulerConfig check:fixed64 call*
//   call   = kind:byte arguments outcome
//   outcome = error:byte, then the error's text, or what came back: a few numbers and, for a step,
//             a digest of all of it
//
// in the manner of archive.h. A step is named by its age, see RecentSteps. `check` is of the
// config, whose sizes decide what a replay allocates.
#pragma once

#include <array>
#include <cstdint>
#include <iosfwd>
#include <string>
#include <vector>

#include "core/siphash.h"
#include "core/transfer.h"
#include "fastpage/scheduler.h"

namespace fastpage {

inline constexpr char kLogMagic[] = "fpreplay";
inline constexpr uint32_t kLogVersion = 2;

enum class Call : uint8_t {
  kAddRequest,
  kAbort,
  kAbortSample,
  kFork,
  kPropose,
  kSchedule,
  kPrepare,
  kUpdate,
  kDiscard,
  kResetPrefixCache,
  kTakeKvEvents,
};
inline constexpr int kNumCalls = 11;

enum class ErrorKind : uint8_t { kNone, kInvalidArgument, kResourceExhausted, kError, kOther };

// What a call came to. Which numbers, and whether there is a digest, is the call's (numbers_of).
struct Outcome {
  ErrorKind error = ErrorKind::kNone;
  std::string text;  // of the error
  std::array<int64_t, 6> numbers{};
  BlockHash digest;
};

const char* name_of(Call call);
// The names of its outcome's numbers.
Span<const char* const> numbers_of(Call call);
bool has_digest(Call call);

void describe(RequestId id, Outcome* outcome);
void describe(int32_t index, Outcome* outcome);
void describe(bool result, Outcome* outcome);
void describe(const SchedulerOutput& step, Outcome* outcome);
void describe(const std::vector<SequenceUpdate>& updates, Outcome* outcome);
void describe(const std::vector<KvEvent>& events, Outcome* outcome);
// With those entries of the block tables that the step reads.
void describe(const InputBatch& batch, int32_t block_size, Outcome* outcome);
void describe(const std::exception& error, Outcome* outcome);

// Which step a call is about: the one that schedule() returned last (1), the one before (2), or
// neither (0). A scheduler has two of them and returns them again and again.
class RecentSteps {
 public:
  void push(const SchedulerOutput* step) {
    if (step == steps_[0]) return;
    steps_[1] = steps_[0];
    steps_[0] = step;
  }
  uint64_t age(const SchedulerOutput* step) const {
    return step == steps_[0] ? 1 : step == steps_[1] ? 2 : 0;
  }
  const SchedulerOutput* at(uint64_t age) const {
    return age == 1 || age == 2 ? steps_[age - 1] : nullptr;
  }

 private:
  std::array<const SchedulerOutput*, 2> steps_{};
};

// ---- their fields. A struct that is changed makes another kLogVersion.

template <>
inline constexpr Call kLastOf<Call> = Call::kTakeKvEvents;
template <>
inline constexpr ErrorKind kLastOf<ErrorKind> = ErrorKind::kOther;
template <>
inline constexpr SchedulingPolicy kLastOf<SchedulingPolicy> = SchedulingPolicy::kPriority;

template <typename Archive>
void transfer(Archive& log, SchedulerConfig& config) {
  auto& [num_blocks, num_host_blocks, block_size, max_num_seqs, max_num_batched_tokens,
         max_model_len, max_num_waiting, max_num_waiting_tokens, long_prefill_token_threshold,
         max_num_partial_prefills, enable_prefix_caching, policy, swap_cost_per_block,
         max_steps_in_flight, num_speculative_tokens, prompt_lookup_min, prompt_lookup_max,
         enable_kv_events, hash_key_lo, hash_key_hi, eos_token_ids] = config;
  log(num_blocks, num_host_blocks, block_size, max_num_seqs, max_num_batched_tokens, max_model_len,
      max_num_waiting, max_num_waiting_tokens, long_prefill_token_threshold,
      max_num_partial_prefills, enable_prefix_caching, policy, swap_cost_per_block,
      max_steps_in_flight, num_speculative_tokens, prompt_lookup_min, prompt_lookup_max,
      enable_kv_events, hash_key_lo, hash_key_hi, eos_token_ids);
}

template <typename Archive>
void transfer(Archive& log, SequenceRequest& request) {
  auto& [prompt_token_ids, params, seed, priority, cache_salt, tag] = request;
  log(prompt_token_ids, seed, priority, cache_salt, tag, params);
}

template <typename Archive, typename O>
void transfer_outcome(Archive& log, Call call, O& outcome) {
  log(outcome.error);
  if (outcome.error != ErrorKind::kNone) {
    log(outcome.text);
    return;
  }
  for (size_t i = 0; i < numbers_of(call).size(); ++i) log(outcome.numbers[i]);
  if (has_digest(call)) log(outcome.digest.lo, outcome.digest.hi);
}

// A checksum of the config as it is logged.
uint64_t check_of(const SchedulerConfig& config);

using LogWriter = ArchiveWriter;

class LogSource {
 public:
  explicit LogSource(std::istream& log) : log_(log) {}

  bool at_end();
  uint8_t byte();
  size_t at_most(uint64_t) const { return 0; }
  [[noreturn]] void damaged(const char* what) const;  // InvalidArgument

 private:
  std::istream& log_;
  int64_t position_ = 0;
};

using LogReader = ArchiveReader<LogSource>;

}  // namespace fastpage
