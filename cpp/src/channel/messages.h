// What goes through the engine channel.
//
//   stream = frame*
//   frame  = size:fixed32 message[size]
//
// A front end sends FrontEndMessages, the engine EngineNews, both in the manner of archive.h.
#pragma once

#include <string>

#include "core/archive.h"
#include "core/transfer.h"
#include "fastpage/engine.h"
#include "fastpage/engine_channel.h"

namespace fastpage {

struct FrontEndMessage {
  enum class Kind : uint8_t { kAddRequest, kAbort, kAbortSample, kResetPrefixCache, kPing };
  Kind kind = Kind::kResetPrefixCache;
  RequestId id = 0;   // of the first three; given out by the client
  int32_t index = 0;  // kAbortSample
  Request request;    // kAddRequest
  std::string name;   // kAddRequest
};

template <>
inline constexpr FrontEndMessage::Kind kLastOf<FrontEndMessage::Kind> =
    FrontEndMessage::Kind::kPing;
template <>
inline constexpr EngineNews::Kind kLastOf<EngineNews::Kind> = EngineNews::Kind::kAlive;
template <>
inline constexpr EngineNews::Refusal kLastOf<EngineNews::Refusal> = EngineNews::Refusal::kNameInUse;
template <>
inline constexpr FinishReason kLastOf<FinishReason> = FinishReason::kAbort;
template <>
inline constexpr KvTier kLastOf<KvTier> = KvTier::kHost;
template <>
inline constexpr KvEvent::Kind kLastOf<KvEvent::Kind> = KvEvent::Kind::kCleared;

template <typename Archive>
void transfer(Archive& archive, Request& request) {
  auto& [prompt_token_ids, params, priority, cache_salt] = request;
  archive(prompt_token_ids, params, priority, cache_salt);
}

template <typename Archive>
void transfer(Archive& archive, FrontEndMessage& message) {
  auto& [kind, id, index, request, name] = message;
  archive(kind);
  switch (kind) {
    case FrontEndMessage::Kind::kAddRequest:
      return archive(id, request, name);
    case FrontEndMessage::Kind::kAbort:
      return archive(id);
    case FrontEndMessage::Kind::kAbortSample:
      return archive(id, index);
    case FrontEndMessage::Kind::kResetPrefixCache:
    case FrontEndMessage::Kind::kPing:
      return;
  }
}

template <typename Archive>
void transfer(Archive& archive, RequestOutput& output) {
  auto& [request_id, index, new_token_ids, logprobs, prompt_logprobs, finish_reason, stop_token_id,
         num_prompt_tokens, num_output_tokens, num_cached_tokens, cumulative_logprob, score,
         queue_seconds] = output;
  archive(request_id, index, new_token_ids, logprobs, prompt_logprobs, finish_reason, stop_token_id,
          num_prompt_tokens, num_output_tokens, num_cached_tokens, cumulative_logprob, score,
          queue_seconds);
}

template <typename Archive>
void transfer(Archive& archive, BlockHash& hash) {
  auto& [lo, hi] = hash;
  archive(lo, hi);
}

template <typename Archive>
void transfer(Archive& archive, KvEvent& event) {
  auto& [kind, tier, hash, parent_hash, token_ids] = event;
  archive(kind, tier, hash, parent_hash, token_ids);
}

template <typename Archive>
void transfer(Archive& archive, StepOutput& step) {
  auto& [step_id, num_tokens, outputs, kv_events] = step;
  archive(step_id, num_tokens, outputs, kv_events);
}

template <typename Archive>
void transfer(Archive& archive, SchedulerStats& stats) {
  auto& [num_waiting, num_never_admitted, num_waiting_tokens, num_running, num_blocks,
         num_free_blocks, num_host_blocks, num_cached_host_blocks, num_preemptions,
         num_preemptions_swap, prefix_cache_queries, prefix_cache_hits, preempted_cache_queries,
         preempted_cache_hits, num_blocks_swapped_out, num_blocks_swapped_in, num_blocks_copied,
         num_draft_tokens, num_accepted_tokens, kv_slots_allocated, kv_slots_used] = stats;
  archive(num_waiting, num_never_admitted, num_waiting_tokens, num_running, num_blocks,
          num_free_blocks, num_host_blocks, num_cached_host_blocks, num_preemptions,
          num_preemptions_swap, prefix_cache_queries, prefix_cache_hits, preempted_cache_queries,
          preempted_cache_hits, num_blocks_swapped_out, num_blocks_swapped_in, num_blocks_copied,
          num_draft_tokens, num_accepted_tokens, kv_slots_allocated, kv_slots_used);
}

template <typename Archive>
void transfer(Archive& archive, EngineStats& stats) {
  auto& [scheduler, num_steps, num_computed_tokens, num_generated_tokens, schedule_seconds,
         prepare_seconds, model_seconds, sample_seconds, output_seconds] = stats;
  archive(scheduler, num_steps, num_computed_tokens, num_generated_tokens, schedule_seconds,
          prepare_seconds, model_seconds, sample_seconds, output_seconds);
}

template <typename Archive>
void transfer(Archive& archive, EngineNews& news) {
  auto& [kind, request_id, error, refusal, done, progress, step, stats] = news;
  archive(kind);
  switch (kind) {
    case EngineNews::Kind::kAccepted:
      return archive(request_id);
    case EngineNews::Kind::kRefused:
      return archive(request_id, error, refusal);
    case EngineNews::Kind::kStep:
      return archive(step, stats);
    case EngineNews::Kind::kStepFailed:
      return archive(error);
    case EngineNews::Kind::kReset:
      return archive(done);
    case EngineNews::Kind::kAlive:
      return archive(progress);
  }
}

// Replaces the writer's contents by the frame of one message; `message` is put together from what
// is given. Throws ResourceExhausted if it is longer than a frame can be.
template <typename Message>
const std::string& make_frame(ArchiveWriter* writer, const Message& message) {
  writer->clear();
  writer->fixed32(0);
  (*writer)(message);
  const size_t size = writer->bytes().size() - sizeof(uint32_t);
  if (size > UINT32_MAX) {
    throw ResourceExhausted("a message of " + std::to_string(size) + " bytes: 4 GiB are possible");
  }
  writer->overwrite_fixed32(0, static_cast<uint32_t>(size));
  return writer->bytes();
}

class BytesSource {
 public:
  explicit BytesSource(Span<const char> bytes) : next_(bytes.begin()), end_(bytes.end()) {}

  uint8_t byte() {
    if (next_ == end_) throw ArchiveEnded();
    return static_cast<uint8_t>(*next_++);
  }
  size_t left() const { return static_cast<size_t>(end_ - next_); }
  size_t at_most(uint64_t n) const { return static_cast<size_t>(std::min<uint64_t>(n, left())); }
  [[noreturn]] static void damaged(const char* what) {
    throw InvalidArgument(std::string("a message of the engine channel is damaged: ") + what);
  }

 private:
  const char* next_;
  const char* end_;
};

// Throws InvalidArgument unless the bytes are one whole message. What was read by then is there.
template <typename Message>
void read_message(Span<const char> bytes, Message* message) {
  ArchiveReader<BytesSource> reader(bytes);
  try {
    reader(*message);
  } catch (const ArchiveEnded&) {
    BytesSource::damaged("it ends too early");
  }
  if (reader.source().left() > 0) BytesSource::damaged("it ends too late");
}

// Of a request of which not all bytes are there: enough to refuse it.
inline FrontEndMessage read_message_head(Span<const char> bytes) {
  ArchiveReader<BytesSource> reader(bytes);
  FrontEndMessage message;
  try {
    reader(message.kind, message.id);
  } catch (const ArchiveEnded&) {
    BytesSource::damaged("it ends too early");
  }
  return message;
}

}  // namespace fastpage
