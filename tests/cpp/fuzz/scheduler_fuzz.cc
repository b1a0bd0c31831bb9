// libFuzzer over the Scheduler's public calls. Half of the inputs are calls that a caller may make,
// checked by the driver of the property tests, outputs included; the other half are hostile: wrong
// steps, wrong counts, ids out of range, absurd settings, NaN. A call may refuse its arguments with
// a fastpage::Error, and nothing else may come of it.
#include <sstream>

#include "fastpage/replay.h"
#include "fuzz/fuzz.h"
#include "scheduler_driver.h"

namespace fastpage {
namespace {

SchedulerConfig absurd_config(Choices* choices) {
  SchedulerConfig config = random_config(choices);
  for (int32_t SchedulerConfig::* field :
       {&SchedulerConfig::num_blocks, &SchedulerConfig::num_host_blocks,
        &SchedulerConfig::block_size, &SchedulerConfig::max_num_seqs,
        &SchedulerConfig::max_num_batched_tokens, &SchedulerConfig::max_model_len,
        &SchedulerConfig::max_num_waiting, &SchedulerConfig::max_num_waiting_tokens,
        &SchedulerConfig::long_prefill_token_threshold, &SchedulerConfig::max_num_partial_prefills,
        &SchedulerConfig::max_steps_in_flight, &SchedulerConfig::num_speculative_tokens,
        &SchedulerConfig::prompt_lookup_min, &SchedulerConfig::prompt_lookup_max}) {
    if (choices->one_in(16)) config.*field = any_int(choices);
  }
  if (choices->one_in(4)) config.swap_cost_per_block = any_float(choices);
  if (choices->one_in(4)) config.eos_token_ids = any_ints(choices, 3);
  return config;
}

SchedulerConfig small_config() {
  SchedulerConfig config;
  config.num_blocks = 4;
  return config;
}

// Calls in any order, with anything.
class Hostile {
 public:
  Hostile(const SchedulerConfig& config, Choices* choices)
      : choices_(choices), scheduler_(config), stranger_(small_config()) {
    if (choices->one_in(4)) {
      recorded_ = true;
      scheduler_.record(&log_);
    }
    stranger_.add_request({{1, 2, 3}, {}, 0, 0, "", 0});
    stranger_step_ = &stranger_.schedule();
  }

  void call_something() {
    try {
      call(choices_->between(0, 15));
    } catch (const Error&) {
    }
    scheduler_.check_integrity();
  }

  void check_replay() {
    if (!recorded_) return;
    scheduler_.record(nullptr);
    const ReplayResult result = replay(log_);
    if (!result.divergence.empty()) throw Broken(result.divergence);
  }

 private:
  void call(int32_t which) {
    switch (which) {
      case 0:
      case 1:
        ids_.push_back(scheduler_.add_request(absurd_request(choices_)));
        break;
      case 2:
        scheduler_.abort(any_id());
        break;
      case 3:
        scheduler_.abort(any_id(), any_int(choices_));
        break;
      case 4:
        scheduler_.fork(any_id(), any_int(choices_), choices_->below(9));
        break;
      case 5:
        scheduler_.propose(any_id(), any_int(choices_), any_ints(choices_, 9));
        break;
      case 6:
        scheduler_.reset_prefix_cache();
        scheduler_.take_kv_events(&events_);
        break;
      case 7:
        scheduler_.discard(any_step());
        break;
      case 8:
        scheduler_.prepare(any_step(), &batch_);
        break;
      case 9:
        scheduler_.update(any_step(), any_ints(choices_, 9));
        break;
      case 10:
      case 11:
      case 12:
        newest_ = &scheduler_.schedule();
        steps_.push_back(newest_);
        scheduler_.prepare(*newest_, &batch_);
        break;
      default:
        update();
    }
  }

  // The right number of tokens and logprobs, whatever they are.
  void update() {
    if (steps_.empty()) return;
    const SchedulerOutput& step = *steps_[steps_.size() - 1 - choices_->below(2) % steps_.size()];
    size_t num_rows = 0;
    for (const ScheduledSequence& seq : step.sequences) num_rows += seq.num_sampling_rows;
    std::vector<TokenId> tokens(num_rows);
    std::vector<TokenLogprobs> logprobs(choices_->one_in(8) ? 0 : num_rows);
    for (TokenId& token : tokens) token = any_int(choices_);
    for (TokenLogprobs& each : logprobs) {
      each.token_ids.resize(choices_->one_in(16) ? choices_->between(0, 3) : 9);
      each.logprobs.resize(choices_->one_in(16) ? choices_->between(0, 3) : each.token_ids.size());
      for (TokenId& token : each.token_ids) token = any_int(choices_);
      for (float& logprob : each.logprobs) logprob = any_float(choices_);
    }
    scheduler_.update(step, tokens, logprobs);
  }

  RequestId any_id() {
    if (!ids_.empty() && !choices_->one_in(8)) return ids_[choices_->below(ids_.size())];
    return choices_->of<RequestId>({0, 1, RequestId{1} << 24, ~RequestId{0}, 1 << 23});
  }

  const SchedulerOutput& any_step() {
    if (choices_->one_in(8)) return *stranger_step_;
    if (choices_->one_in(8) || steps_.empty()) return made_up_;
    return *steps_[steps_.size() - 1 - choices_->below(2) % steps_.size()];
  }

  Choices* choices_;
  std::stringstream log_;
  bool recorded_ = false;
  Scheduler scheduler_;
  Scheduler stranger_;
  const SchedulerOutput* stranger_step_;
  SchedulerOutput made_up_;
  std::vector<RequestId> ids_;
  std::vector<const SchedulerOutput*> steps_;
  const SchedulerOutput* newest_ = nullptr;
  InputBatch batch_;
  std::vector<KvEvent> events_;
};

void be_hostile(Bytes* bytes) {
  const SchedulerConfig config = absurd_config(bytes);
  try {
    config.validate();
  } catch (const InvalidArgument&) {
    return;
  }
  // Valid, but more than a fuzzer has memory for.
  const int64_t stride = config.max_model_len / config.block_size + 1;
  if (config.num_blocks > 4096 || config.num_host_blocks > 4096 ||
      config.max_num_seqs * stride > 1 << 16 || config.max_model_len > 1 << 16) {
    return;
  }
  Hostile hostile(config, bytes);
  for (int i = 0; i < 150 && !bytes->empty(); ++i) hostile.call_something();
  hostile.check_replay();
}

void drive(Bytes* bytes) {
  const SchedulerConfig config = random_config(bytes);
  SchedulerDriver driver(config, bytes->one_in(2));
  const int32_t max_live = bytes->of({1, 4, 20});
  for (int i = 0; i < 150 && !bytes->empty(); ++i) driver.call_something(bytes, max_live);
  driver.drain();
}

}  // namespace
}  // namespace fastpage

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return fastpage::fuzz(data, size, [](fastpage::Bytes* bytes) {
    if (bytes->one_in(2)) {
      fastpage::drive(bytes);
    } else {
      fastpage::be_hostile(bytes);
    }
  });
}
