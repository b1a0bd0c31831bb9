// The log of a scheduler's calls: what Recorder writes and replay() reads.
//
//   log    = "fpreplay" version:fixed32 SchedulerConfig check:fixed64 call*
//   call   = kind:byte arguments outcome
//   outcome = error:byte, then the error's text, or what came back: a few numbers and, for a step,
//             a digest of all of it
//
// Integers are varints (7 bits a byte, low ones first; signed ones zigzag-coded), fixed ones are
// little-endian, floats are their bits. A step is named by its age, see RecentSteps. `check` is of
// the config, whose sizes decide what a replay allocates.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <iosfwd>
#include <string>
#include <vector>

#include "core/siphash.h"
#include "fastpage/scheduler.h"

namespace fastpage {

inline constexpr char kLogMagic[] = "fpreplay";
inline constexpr uint32_t kLogVersion = 1;

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

// ---- one list of fields for both directions: what is written is what is read

// A field added to one of these structs does not compile here until it is in the log, too (and
// kLogVersion is another).
template <typename Archive, typename Config>
void transfer_config(Archive& log, Config& config) {
  auto& [num_blocks, num_host_blocks, block_size, max_num_seqs, max_num_batched_tokens,
         max_model_len, max_num_waiting, long_prefill_token_threshold, max_num_partial_prefills,
         enable_prefix_caching, policy, swap_cost_per_block, max_steps_in_flight,
         num_speculative_tokens, prompt_lookup_min, prompt_lookup_max, enable_kv_events,
         hash_key_lo, hash_key_hi, eos_token_ids] = config;
  log(num_blocks, num_host_blocks, block_size, max_num_seqs, max_num_batched_tokens, max_model_len,
      max_num_waiting, long_prefill_token_threshold, max_num_partial_prefills,
      enable_prefix_caching, policy, swap_cost_per_block, max_steps_in_flight,
      num_speculative_tokens, prompt_lookup_min, prompt_lookup_max, enable_kv_events, hash_key_lo,
      hash_key_hi, eos_token_ids);
}

template <typename Archive, typename Params>
void transfer_params(Archive& log, Params& params) {
  auto& [n, best_of, temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty,
         frequency_penalty, logit_bias, allowed_token_ids, bad_words, max_tokens, min_tokens,
         stop_token_ids, ignore_eos, seed, logprobs, prompt_logprobs, beam_width, length_penalty,
         early_stopping] = params;
  log(n, best_of, temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty,
      frequency_penalty, logit_bias, allowed_token_ids, bad_words, max_tokens, min_tokens,
      stop_token_ids, ignore_eos, seed, logprobs, prompt_logprobs, beam_width, length_penalty,
      early_stopping);
}

template <typename Archive, typename Request>
void transfer_request(Archive& log, Request& request) {
  auto& [prompt_token_ids, params, seed, priority, cache_salt, tag] = request;
  log(prompt_token_ids, seed, priority, cache_salt, tag);
  transfer_params(log, params);
}

template <typename Archive, typename Logprobs>
void transfer_logprobs(Archive& log, Logprobs& row) {
  auto& [token_ids, logprobs, rank] = row;
  log(token_ids, logprobs, rank);
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

// ---- the two archives

class LogWriter {
 public:
  template <typename... Fields>
  void operator()(const Fields&... fields) {
    (put(fields), ...);
  }
  void varint(uint64_t value) {
    for (; value >= 0x80; value >>= 7) byte(static_cast<uint8_t>(value | 0x80));
    byte(static_cast<uint8_t>(value));
  }
  void fixed32(uint32_t value) { fixed(value, 4); }
  void raw(const char* data, size_t size) { bytes_.append(data, size); }

  void put(Call value) { byte(static_cast<uint8_t>(value)); }
  void put(Span<const TokenId> ids) {
    varint(ids.size());
    for (const TokenId id : ids) varint(static_cast<uint32_t>(id));
  }

  const std::string& bytes() const { return bytes_; }
  void clear() { bytes_.clear(); }

 private:
  void byte(uint8_t value) { bytes_.push_back(static_cast<char>(value)); }
  void fixed(uint64_t value, int size) {
    for (int i = 0; i < size; ++i) byte(static_cast<uint8_t>(value >> (8 * i)));
  }

  void put(bool value) { byte(value ? 1 : 0); }
  void put(int32_t value) { put(int64_t{value}); }
  void put(int64_t value) {
    varint(static_cast<uint64_t>(value) << 1 ^ static_cast<uint64_t>(value >> 63));
  }
  void put(uint64_t value) { fixed(value, 8); }
  void put(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    fixed32(bits);
  }
  void put(SchedulingPolicy value) { byte(static_cast<uint8_t>(value)); }
  void put(EarlyStopping value) { byte(static_cast<uint8_t>(value)); }
  void put(ErrorKind value) { byte(static_cast<uint8_t>(value)); }
  void put(const std::string& text) {
    varint(text.size());
    bytes_ += text;
  }
  void put(const std::optional<uint64_t>& value) {
    put(value.has_value());
    if (value) put(*value);
  }
  void put(const std::pair<TokenId, float>& value) { (*this)(value.first, value.second); }
  void put(const std::vector<TokenId>& ids) { put(Span<const TokenId>(ids)); }
  template <typename T>
  void put(const std::vector<T>& values) {
    varint(values.size());
    for (const T& value : values) put(value);
  }

  std::string bytes_;
};

// The log is over, in the midst of something.
struct LogEnded {};

// Throws LogEnded, or InvalidArgument for what no LogWriter has written. Whatever a count says, no
// more is allocated than a small multiple of what the log holds.
class LogReader {
 public:
  explicit LogReader(std::istream& log) : log_(log) {}

  template <typename... Fields>
  void operator()(Fields&... fields) {
    (get(fields), ...);
  }
  bool at_end();
  uint8_t byte();
  uint64_t varint();
  uint32_t fixed32() { return static_cast<uint32_t>(fixed(4)); }
  int64_t position() const { return position_; }

  void get(Call& value) { value = static_cast<Call>(enumerator(kNumCalls - 1)); }
  void get(std::vector<TokenId>& ids);

 private:
  [[noreturn]] void damaged(const char* what) const;
  uint64_t fixed(int size);
  uint8_t enumerator(int last);

  void get(bool& value) { value = enumerator(1) != 0; }
  void get(int32_t& value);
  void get(int64_t& value) {
    const uint64_t bits = varint();
    value = static_cast<int64_t>(bits >> 1 ^ (~(bits & 1) + 1));
  }
  void get(uint64_t& value) { value = fixed(8); }
  void get(float& value) {
    const uint32_t bits = fixed32();
    std::memcpy(&value, &bits, sizeof bits);
  }
  void get(SchedulingPolicy& value) {
    value =
        static_cast<SchedulingPolicy>(enumerator(static_cast<int>(SchedulingPolicy::kPriority)));
  }
  void get(EarlyStopping& value) {
    value = static_cast<EarlyStopping>(enumerator(static_cast<int>(EarlyStopping::kNever)));
  }
  void get(ErrorKind& value) {
    value = static_cast<ErrorKind>(enumerator(static_cast<int>(ErrorKind::kOther)));
  }
  void get(std::string& text);
  void get(std::optional<uint64_t>& value) {
    value.reset();
    bool has_value;
    get(has_value);
    if (has_value) get(value.emplace());
  }
  void get(std::pair<TokenId, float>& value) { (*this)(value.first, value.second); }
  template <typename T>
  void get(std::vector<T>& values) {
    values.clear();
    for (uint64_t left = varint(); left > 0; --left) get(values.emplace_back());
  }

  std::istream& log_;
  int64_t position_ = 0;
};

}  // namespace fastpage
