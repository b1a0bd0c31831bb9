#include "core/call_log.h"

#include <algorithm>
#include <istream>

namespace fastpage {

namespace {

struct CallInfo {
  const char* name;
  std::vector<const char*> numbers;
  bool has_digest = false;
};

const CallInfo& info(Call call) {
  static const std::array<CallInfo, kNumCalls> kInfos = {{
      {"add_request", {"id"}},
      {"abort", {"result"}},
      {"abort of a sample", {"result"}},
      {"fork", {"index"}},
      {"propose", {"result"}},
      {"schedule",
       {"step id", "sequences", "tokens", "sampling rows", "preempted", "block transfers"},
       true},
      {"prepare", {"sequences", "tokens", "logits", "sampling rows", "future tokens"}, true},
      {"update", {"updates", "new tokens", "finished"}, true},
      {"discard", {}},
      {"reset_prefix_cache", {"result"}},
      {"take_kv_events", {"events"}, true},
  }};
  return kInfos[static_cast<size_t>(call)];
}

class Digest {
 public:
  void word(uint64_t value) {
    sip_.add(value);
    ++num_words_;
  }
  template <typename... Ints>
  void words(Ints... values) {
    (word(static_cast<uint64_t>(values)), ...);
  }
  void pair(int32_t lo, int32_t hi) {
    word(static_cast<uint32_t>(lo) | static_cast<uint64_t>(static_cast<uint32_t>(hi)) << 32);
  }
  void number(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    word(bits);
  }
  void hash(BlockHash value) { words(value.lo, value.hi); }
  void ints(Span<const int32_t> values) {
    word(values.size());
    size_t i = 0;
    for (; i + 1 < values.size(); i += 2) pair(values[i], values[i + 1]);
    if (i < values.size()) pair(values[i], 0);
  }
  template <typename Pairs, typename Of>
  void pairs(const Pairs& values, Of of) {
    word(values.size());
    for (const auto& value : values) {
      const auto [lo, hi] = of(value);
      pair(lo, hi);
    }
  }
  void transfers(const BlockTransfers& t) {
    const auto swap = [](const BlockSwap& s) { return std::pair(s.device, s.host); };
    pairs(t.swap_outs, swap);
    pairs(t.block_copies, [](const BlockCopy& c) { return std::pair(c.src, c.dst); });
    pairs(t.swap_ins, swap);
  }
  BlockHash finish() { return sip_.finish(0, 8 * num_words_); }

 private:
  SipHash128 sip_{0, 0};  // a digest against accidents, not against anybody
  size_t num_words_ = 0;
};

// The tokens themselves are digested in the steps that compute them; the last ones may just be
// written by the runner. Of the sampler's parameters only what tells one request's from another's:
// they are in the log.
void add_row(const SamplingRow& row, Digest* digest) {
  const auto& [seq, logits_row, params, tokens, num_prompt_tokens, seed, eos_token_ids] = row;
  digest->pair(seq, logits_row);
  digest->words(num_prompt_tokens, tokens.size(), seed, eos_token_ids.size());
  digest->pair(params->max_tokens, params->logprobs);
  digest->number(params->temperature);
}

}  // namespace

const char* name_of(Call call) { return info(call).name; }
Span<const char* const> numbers_of(Call call) { return info(call).numbers; }
bool has_digest(Call call) { return info(call).has_digest; }

void describe(RequestId id, Outcome* outcome) { outcome->numbers[0] = static_cast<int64_t>(id); }
void describe(int32_t index, Outcome* outcome) { outcome->numbers[0] = index; }
void describe(bool result, Outcome* outcome) { outcome->numbers[0] = result ? 1 : 0; }

void describe(const SchedulerOutput& step, Outcome* outcome) {
  const auto& [step_id, sequences, transfers, num_scheduled_tokens, num_preempted] = step;
  Digest digest;
  int64_t num_rows = 0;
  for (const ScheduledSequence& scheduled : sequences) {
    const auto& [id, tag, index, row, num_computed, num_scheduled, num_sampling_rows] = scheduled;
    digest.words(id, tag);
    digest.pair(index, row);
    digest.pair(num_computed, num_scheduled);
    digest.word(static_cast<uint64_t>(num_sampling_rows));
    num_rows += num_sampling_rows;
  }
  digest.transfers(transfers);
  const size_t num_transfers =
      transfers.swap_outs.size() + transfers.block_copies.size() + transfers.swap_ins.size();
  outcome->numbers = {
      step_id,       static_cast<int64_t>(sequences.size()), num_scheduled_tokens, num_rows,
      num_preempted, static_cast<int64_t>(num_transfers)};
  outcome->digest = digest.finish();
}

void describe(const InputBatch& batch, int32_t block_size, Outcome* outcome) {
  const auto& [step_id, num_seqs, token_ids, positions, slot_mapping, query_start_loc, seq_lens,
               block_table_rows, logits_indices, block_tables, block_table_stride, own_block_tables,
               sampling_rows, prompt_logprob_rows, transfers, future_tokens] = batch;
  Digest digest;
  digest.words(step_id, num_seqs, block_table_stride);
  for (const Span<const int32_t> column : std::initializer_list<Span<const int32_t>>{
           token_ids, positions, slot_mapping, query_start_loc, seq_lens, block_table_rows,
           logits_indices}) {
    digest.ints(column);
  }
  if (block_tables != nullptr) {
    for (int32_t seq = 0; seq < num_seqs; ++seq) {
      const int32_t num_blocks = (seq_lens[seq] + block_size - 1) / block_size;
      digest.ints({batch.block_table(seq), static_cast<size_t>(num_blocks)});
    }
  }
  digest.word(sampling_rows.size());
  for (const SamplingRow& row : sampling_rows) add_row(row, &digest);
  digest.word(prompt_logprob_rows.size());
  for (const auto& [seq, logits_row, position, token, num_logprobs] : prompt_logprob_rows) {
    digest.pair(seq, logits_row);
    digest.pair(position, token);
    digest.word(static_cast<uint64_t>(num_logprobs));
  }
  digest.transfers(transfers);
  digest.pairs(future_tokens,
               [](const FutureToken& f) { return std::pair(f.index, f.sampling_row); });
  outcome->numbers = {num_seqs, batch.num_tokens(), batch.num_logits(),
                      static_cast<int64_t>(sampling_rows.size()),
                      static_cast<int64_t>(future_tokens.size())};
  outcome->digest = digest.finish();
}

void describe(const std::vector<SequenceUpdate>& updates, Outcome* outcome) {
  Digest digest;
  int64_t num_new = 0;
  int64_t num_finished = 0;
  for (const SequenceUpdate& update : updates) {
    const auto& [id, tag, index, seq, new_token_ids, sampling_row, finish_reason, stop_token_id,
                 num_prompt, num_output, num_cached, score] = update;
    digest.words(id, tag);
    digest.pair(index, seq);
    digest.ints(new_token_ids);
    digest.pair(sampling_row, static_cast<int32_t>(finish_reason));
    digest.pair(stop_token_id, num_prompt);
    digest.pair(num_output, num_cached);
    digest.number(score);
    num_new += static_cast<int64_t>(new_token_ids.size());
    num_finished += finish_reason != FinishReason::kNone;
  }
  outcome->numbers = {static_cast<int64_t>(updates.size()), num_new, num_finished};
  outcome->digest = digest.finish();
}

void describe(const std::vector<KvEvent>& events, Outcome* outcome) {
  Digest digest;
  for (const KvEvent& event : events) {
    const auto& [kind, tier, hash, parent_hash, token_ids] = event;
    digest.pair(static_cast<int32_t>(kind), static_cast<int32_t>(tier));
    digest.hash(hash);
    digest.hash(parent_hash);
    digest.ints(token_ids);
  }
  outcome->numbers = {static_cast<int64_t>(events.size())};
  outcome->digest = digest.finish();
}

void describe(const std::exception& error, Outcome* outcome) {
  outcome->text = error.what();
  if (dynamic_cast<const InvalidArgument*>(&error) != nullptr) {
    outcome->error = ErrorKind::kInvalidArgument;
  } else if (dynamic_cast<const ResourceExhausted*>(&error) != nullptr) {
    outcome->error = ErrorKind::kResourceExhausted;
  } else if (dynamic_cast<const Error*>(&error) != nullptr) {
    outcome->error = ErrorKind::kError;
  } else {
    outcome->error = ErrorKind::kOther;
  }
}

uint64_t check_of(const SchedulerConfig& config) {
  LogWriter writer;
  writer(config);
  Digest digest;
  for (const char each : writer.bytes()) digest.word(static_cast<uint8_t>(each));
  return digest.finish().lo;
}

void LogSource::damaged(const char* what) const {
  throw InvalidArgument("the log is damaged: " + std::string(what) + " at byte " +
                        std::to_string(position_));
}

bool LogSource::at_end() {
  return log_.rdbuf() == nullptr || log_.rdbuf()->sgetc() == std::char_traits<char>::eof();
}

uint8_t LogSource::byte() {
  if (at_end()) throw ArchiveEnded();
  ++position_;
  return static_cast<uint8_t>(log_.rdbuf()->sbumpc());
}

}  // namespace fastpage
