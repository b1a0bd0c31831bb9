#include "core/recorder.h"

#include <ostream>

namespace fastpage {

Recorder::Recorder(std::ostream* log, const SchedulerConfig& config)
    : log_(log), block_size_(config.block_size) {
  writer_.raw(kLogMagic, sizeof kLogMagic - 1);
  writer_.fixed32(kLogVersion);
  writer_(config, check_of(config));
  flush();
}

void Recorder::begin_add_request(const SequenceRequest& request) {
  writer_(Call::kAddRequest, request);
  flush();
}

void Recorder::begin_of_step(Call call, const SchedulerOutput& step) {
  writer_(call);
  writer_.varint(steps_.age(&step));
  flush();
}

void Recorder::begin_update(const SchedulerOutput& step, Span<const TokenId> sampled_token_ids,
                            Span<const TokenLogprobs> logprobs) {
  writer_(Call::kUpdate);
  writer_.varint(steps_.age(&step));
  writer_(sampled_token_ids);
  const bool one_a_row = logprobs.size() == sampled_token_ids.size();
  if (one_a_row && beam_searches_.empty()) {
    writer_.varint(0);
  } else if (one_a_row) {
    put_beams_logprobs(step, logprobs);
  } else {
    writer_.varint(logprobs.size());
    for (const TokenLogprobs& row : logprobs) writer_(row);
  }
  flush();
}

void Recorder::put_beams_logprobs(const SchedulerOutput& step, Span<const TokenLogprobs> logprobs) {
  static const TokenLogprobs kNone;
  writer_.varint(logprobs.size());
  size_t row = 0;
  for (const ScheduledSequence& scheduled : step.sequences) {
    const bool counts = beam_searches_.count(scheduled.id) > 0;
    for (int32_t i = 0; i < scheduled.num_sampling_rows && row < logprobs.size(); ++i, ++row) {
      writer_(counts ? logprobs[row] : kNone);
    }
  }
  for (; row < logprobs.size(); ++row) writer_(kNone);
}

// All beams of a search end together.
void Recorder::forget_ended(const std::vector<SequenceUpdate>& updates) {
  if (beam_searches_.empty()) return;
  for (const SequenceUpdate& update : updates) {
    if (update.finish_reason != FinishReason::kNone) beam_searches_.erase(update.id);
  }
}

void Recorder::end(Call call, const Outcome& outcome) {
  transfer_outcome(writer_, call, outcome);
  flush();
}

void Recorder::flush() noexcept {
  try {
    if (log_ != nullptr) {
      log_->write(writer_.bytes().data(), static_cast<std::streamsize>(writer_.bytes().size()));
      if (!log_->good()) log_ = nullptr;
    }
  } catch (const std::exception&) {  // a stream that was asked to throw
    log_ = nullptr;
  }
  writer_.clear();
}

}  // namespace fastpage
