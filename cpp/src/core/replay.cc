#include "fastpage/replay.h"

#include <istream>
#include <utility>

#include "core/call_log.h"

namespace fastpage {

namespace {

constexpr double kMaxBytes = 4.0 * (1u << 30);

void check_size(const SchedulerConfig& config) {
  constexpr double kBytesPerBlock = sizeof(Block) + 4 * sizeof(BlockId);  // and its hash table's
  const double num_blocks = double{1} * config.num_blocks + config.num_host_blocks;
  const double row = sizeof(BlockId) * (double{1} * config.max_model_len / config.block_size + 1);
  const double bytes = num_blocks * kBytesPerBlock + config.max_num_seqs * row;
  if (bytes > kMaxBytes) {
    throw ResourceExhausted("the log's scheduler takes " +
                            std::to_string(static_cast<int64_t>(bytes / (1 << 30))) +
                            " GiB: replay() allows 4");
  }
}

SchedulerConfig read_header(LogReader* reader) {
  SchedulerConfig config;
  uint64_t check = 0;
  try {
    for (size_t i = 0; i + 1 < sizeof kLogMagic; ++i) {
      if (reader->byte() != static_cast<uint8_t>(kLogMagic[i])) {
        throw InvalidArgument("not a log of Scheduler::record()");
      }
    }
    const uint32_t version = reader->fixed32();
    if (version != kLogVersion) {
      throw InvalidArgument("the log is of version " + std::to_string(version) +
                            ": this library reads version " + std::to_string(kLogVersion));
    }
    (*reader)(config, check);
  } catch (const ArchiveEnded&) {
    throw InvalidArgument("not a log of Scheduler::record(): it ends within its header");
  }
  if (check != check_of(config)) {
    throw InvalidArgument("the log is damaged: its configuration and the checksum differ");
  }
  config.validate();
  check_size(config);
  return config;
}

std::string text_of(BlockHash digest) {
  static const char kDigits[] = "0123456789abcdef";
  std::string text;
  for (int shift = 60; shift >= 0; shift -= 4) text += kDigits[digest.hi >> shift & 15];
  for (int shift = 60; shift >= 0; shift -= 4) text += kDigits[digest.lo >> shift & 15];
  return text;
}

std::string text_of(Call call, const Outcome& outcome) {
  static const char* const kKinds[] = {"",
                                       "InvalidArgument: ", "ResourceExhausted: ", "Error: ", ""};
  if (outcome.error != ErrorKind::kNone) {
    return "refused (" + (kKinds[static_cast<int>(outcome.error)] + outcome.text) + ")";
  }
  std::string text;
  const Span<const char* const> names = numbers_of(call);
  for (size_t i = 0; i < names.size(); ++i) {
    text += (i == 0 ? "" : ", ") + (names[i] + (" " + std::to_string(outcome.numbers[i])));
  }
  return text.empty() ? "done" : text;
}

// Empty if they are the same.
std::string difference(Call call, const Outcome& recorded, const Outcome& replayed) {
  const std::string was = text_of(call, recorded);
  const std::string is = text_of(call, replayed);
  if (recorded.error != replayed.error || was != is) {
    return "recorded: " + was + "; replayed: " + is;
  }
  if (recorded.digest == replayed.digest) return "";
  return "the digests differ: recorded " + text_of(recorded.digest) + ", replayed " +
         text_of(replayed.digest) + " (both: " + was + ")";
}

class Replayer {
 public:
  Replayer(std::istream& log, const ReplayOptions& options)
      : reader_(log), options_(options), config_(read_header(&reader_)), scheduler_(config_) {}

  ReplayResult run() {
    try {
      while (result_.divergence.empty() && !reader_.source().at_end()) one_call();
    } catch (const ArchiveEnded&) {
      result_.complete = false;
    }
    return std::move(result_);
  }

 private:
  void one_call() {
    Call call;
    reader_(call);
    step_id_ = -1;
    const Outcome replayed = make(call);
    ++result_.num_calls;
    check_integrity(call);
    if (!result_.divergence.empty()) return;
    Outcome recorded;
    transfer_outcome(reader_, call, recorded);
    diverge(call, difference(call, recorded, replayed));
  }

  // Reads the call's arguments, then makes it.
  Outcome make(Call call) {
    switch (call) {
      case Call::kAddRequest:
        return add_request();
      case Call::kAbort: {
        reader_(id_);
        return outcome_of([&] { return scheduler_.abort(id_); });
      }
      case Call::kAbortSample: {
        reader_(id_, index_);
        return outcome_of([&] { return scheduler_.abort(id_, index_); });
      }
      case Call::kFork: {
        uint64_t seed;
        reader_(id_, index_, seed);
        return outcome_of([&] { return scheduler_.fork(id_, index_, seed); });
      }
      case Call::kPropose: {
        reader_(id_, index_, tokens_);
        return outcome_of([&] { return scheduler_.propose(id_, index_, tokens_); });
      }
      case Call::kSchedule:
        return schedule();
      case Call::kPrepare:
        return prepare();
      case Call::kUpdate:
        return update();
      case Call::kDiscard: {
        const SchedulerOutput& step = read_step();
        return outcome_of([&] { scheduler_.discard(step); });
      }
      case Call::kResetPrefixCache:
        return outcome_of([&] { return scheduler_.reset_prefix_cache(); });
      case Call::kTakeKvEvents:
        return outcome_of([&]() -> const std::vector<KvEvent>& {
          scheduler_.take_kv_events(&events_);
          return events_;
        });
    }
    return {};
  }

  template <typename Run>
  Outcome outcome_of(Run run) {
    Outcome outcome;
    try {
      if constexpr (std::is_void_v<decltype(run())>) {
        run();
      } else {
        describe(run(), &outcome);
      }
    } catch (const std::exception& error) {
      describe(error, &outcome);
    }
    return outcome;
  }

  Outcome add_request() {
    SequenceRequest request;
    reader_(request);
    return outcome_of([&] { return scheduler_.add_request(std::move(request)); });
  }

  Outcome schedule() {
    return outcome_of([&]() -> const SchedulerOutput& {
      const SchedulerOutput& step = scheduler_.schedule();
      steps_.push(&step);
      step_id_ = step.step_id;
      result_.num_steps += !step.sequences.empty();
      return step;
    });
  }

  Outcome prepare() {
    const SchedulerOutput& step = read_step();
    Outcome outcome;
    try {
      scheduler_.prepare(step, &batch_);
      describe(batch_, config_.block_size, &outcome);
    } catch (const std::exception& error) {
      describe(error, &outcome);
    }
    return outcome;
  }

  Outcome update() {
    const SchedulerOutput& step = read_step();
    reader_(tokens_, logprobs_);
    return outcome_of([&]() -> const std::vector<SequenceUpdate>& {
      return scheduler_.update(step, tokens_, logprobs_);
    });
  }

  // A step that schedule() did not return is refused in the same words, whatever it holds.
  const SchedulerOutput& read_step() {
    static const SchedulerOutput kForeign;
    const SchedulerOutput* step = steps_.at(reader_.varint());
    if (step == nullptr) return kForeign;
    step_id_ = step->step_id;
    return *step;
  }

  void check_integrity(Call call) {
    if (!options_.check_integrity) return;
    try {
      scheduler_.check_integrity();
    } catch (const Error& error) {
      diverge(call, std::string("a broken invariant: ") + error.what());
    }
  }

  void diverge(Call call, const std::string& how) {
    if (how.empty()) return;
    result_.divergence = "call " + std::to_string(result_.num_calls) + ", " + name_of(call);
    if (step_id_ >= 0) result_.divergence += " of step " + std::to_string(step_id_);
    result_.divergence += ": " + how;
  }

  LogReader reader_;
  ReplayOptions options_;
  SchedulerConfig config_;
  Scheduler scheduler_;
  ReplayResult result_;
  RecentSteps steps_;
  int64_t step_id_ = -1;  // that the call is about
  InputBatch batch_;      // there is no runner to resolve() it: update() brings the same tokens
  // Arguments and results of calls, kept for their memory.
  RequestId id_ = 0;
  int32_t index_ = 0;
  std::vector<TokenId> tokens_;
  std::vector<TokenLogprobs> logprobs_;
  std::vector<KvEvent> events_;
};

}  // namespace

ReplayResult replay(std::istream& log, const ReplayOptions& options) {
  return Replayer(log, options).run();
}

}  // namespace fastpage
