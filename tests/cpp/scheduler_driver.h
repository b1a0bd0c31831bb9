// Drives a Scheduler with the fake model, and checks from outside, after every call, what must
// always hold:
//
//  1. free + referenced = total; free <=> ref_count 0; ref_count = tables that hold the block.
//  2. Each written slot is unique, in a block with ref_count 1 that is not published yet.
//  3. Token and sequence budgets hold; a prefix hit is block-aligned and at most num_tokens - 1.
//  4. The output of every sample is that of the model run on its bare tokens, whatever the
//  settings.
//  5. Tokens not yet computed are never published; placeholders = samples in flight.
//  6. An abort at any moment frees exactly once; a late result is dropped.
//  7. Progress always: whatever was admitted finishes.
#pragma once

#include <deque>
#include <map>
#include <set>
#include <sstream>

#include "block_checks.h"
#include "fake_model.h"
#include "fastpage/scheduler.h"
#include "random_requests.h"

namespace fastpage {

struct DriverCounts {
  int64_t steps = 0;
  int64_t finished = 0;  // samples
  int64_t hits = 0;      // admissions that found a prefix
  int64_t births = 0;    // of samples other than a request's first
  int64_t forks = 0;
  int64_t beam_searches = 0;
  int64_t discards = 0;
  int64_t overlapped = 0;  // steps scheduled while another was under way
  int64_t kv_events = 0;
  SchedulerStats stats;  // those that count, summed over drivers

  void add(const DriverCounts& o);
  std::string text() const;
};

inline void DriverCounts::add(const DriverCounts& o) {
  for (int64_t DriverCounts::* field :
       {&DriverCounts::steps, &DriverCounts::finished, &DriverCounts::hits, &DriverCounts::births,
        &DriverCounts::forks, &DriverCounts::beam_searches, &DriverCounts::discards,
        &DriverCounts::overlapped, &DriverCounts::kv_events}) {
    this->*field += o.*field;
  }
  for (int64_t SchedulerStats::* field :
       {&SchedulerStats::num_preemptions, &SchedulerStats::num_preemptions_swap,
        &SchedulerStats::preempted_cache_hits, &SchedulerStats::num_blocks_swapped_out,
        &SchedulerStats::num_blocks_swapped_in, &SchedulerStats::num_blocks_copied,
        &SchedulerStats::num_draft_tokens, &SchedulerStats::num_accepted_tokens}) {
    stats.*field += o.stats.*field;
  }
}

inline std::string DriverCounts::text() const {
  std::ostringstream out;
  out << steps << " steps (" << overlapped << " overlapped, " << discards << " discarded), "
      << finished << " samples finished, " << births << " born, " << forks << " forked, "
      << beam_searches << " beam searches, " << hits << " prefix hits, " << stats.num_preemptions
      << " preemptions (" << stats.num_preemptions_swap << " swap), " << stats.preempted_cache_hits
      << " tokens found on return, " << stats.num_blocks_swapped_out << " blocks out, "
      << stats.num_blocks_swapped_in << " in, " << stats.num_blocks_copied << " copied, "
      << stats.num_draft_tokens << " drafts, " << stats.num_accepted_tokens << " accepted, "
      << kv_events << " KV events";
  return out.str();
}

class SchedulerDriver {
 public:
  static constexpr int32_t kVocabSize = kFakeVocabSize;

  // lazy: see FakeModelOptions.
  explicit SchedulerDriver(const SchedulerConfig& config, bool lazy = false)
      : config_(config),
        lazy_(lazy),
        scheduler_(config),
        blocks_(scheduler_),
        model_(config.num_blocks, config.block_size, kVocabSize,
               {config.num_host_blocks, config.max_steps_in_flight, lazy}),
        batches_(config.max_steps_in_flight + 1) {}

  // False if it was refused.
  bool add(SequenceRequest request);
  void abort(Choices* choices);  // a request or one sample of it
  void fork(Choices* choices);
  void propose(Choices* choices);
  void reset_prefix_cache();
  void record(std::ostream* log) { scheduler_.record(log); }

  // schedule() .. execute(), if there may be one more step in flight. False if there is none.
  bool begin(Choices* choices = nullptr);
  // wait() and update() of the oldest step in flight.
  void finish();
  // discard() of one of them.
  void fail(Choices* choices);
  void step() {
    begin();
    if (!flights_.empty()) finish();
  }
  void drain();
  // Any one of these, with any arguments, for fewer than `max_live` requests at a time.
  void call_something(Choices* choices, int32_t max_live);

  const Scheduler& scheduler() const { return scheduler_; }
  size_t num_live() const { return live_.size(); }
  size_t num_in_flight() const { return flights_.size(); }
  DriverCounts counts() const {
    DriverCounts out = counts_;
    out.stats = scheduler_.stats();
    return out;
  }

 private:
  struct Sample {
    FakeCompletion expected;
    std::vector<TokenId> output;
    bool live = true;
    bool born = false;          // a sequence of its own
    int32_t num_computed = 0;   // those of steps in flight included
    int32_t num_in_flight = 0;  // steps that sample for it
    int64_t last_step = -1;     // that scheduled it
    int64_t last_update = -1;
  };

  // A request and all that was heard of it.
  struct Told {
    SequenceRequest request;
    bool is_beam = false;
    std::vector<Sample> samples;
    int32_t num_computed = 0;  // until the samples are born
    bool admitted = false;
    bool split = false;          // its samples are born in a step in flight
    bool is_uncapped = false;    // a discarded step or a fork left it partly computed
    bool lost_a_sample = false;  // by an abort
    std::vector<bool> heard;     // prompt logprobs, by position
    std::vector<BeamHypothesis> beams;
    size_t num_beams_heard = 0;

    int32_t num_prompt() const { return static_cast<int32_t>(request.prompt_token_ids.size()); }
    bool live() const {
      return std::any_of(samples.begin(), samples.end(), [](const Sample& s) { return s.live; });
    }
  };

  struct Flight {
    const SchedulerOutput* step;
    InputBatch* batch;
  };

  int32_t num_never_admitted() const;  // samples
  bool too_many_tokens(size_t num_added) const;
  InputBatch* free_batch();
  Told* told(RequestId id) {
    const auto it = live_.find(id);
    return it == live_.end() ? nullptr : &it->second;
  }
  bool in_flight(RequestId id, int32_t index) const;
  Told* any_live(Choices* choices, RequestId* id, int32_t* index);

  void check();
  void check_budgets(const SchedulerOutput& step);
  void check_sequence(const ScheduledSequence& seq, const SchedulerOutput& step);
  void check_progress(const SchedulerOutput& step);
  void check_owners(const Flight& flight);
  void check_stats() const;
  void check_placeholders(const SchedulerOutput& step, const InputBatch& batch);
  void collect_prompt_logprobs(const Flight& flight, const ModelRunnerOutput& result);
  void take_in(const SchedulerOutput& step, const ModelRunnerOutput& result,
               const std::vector<SequenceUpdate>& updates);
  void take_in_sample(const SchedulerOutput& step, const ModelRunnerOutput& result,
                      const SequenceUpdate& update, Told* told);
  void take_in_beam(const SequenceUpdate& update, Told* told);
  void take_back(const SchedulerOutput& step);
  void discard(size_t flight);
  void poison();

  SchedulerConfig config_;
  bool lazy_;
  Scheduler scheduler_;
  BlockChecks blocks_;
  FakeModel model_;
  std::vector<InputBatch> batches_;
  std::deque<Flight> flights_;
  std::map<RequestId, Told> live_;
  RequestId last_id_ = 0;
  uint64_t next_tag_ = 1;
  int64_t num_drafts_ = 0;  // of those that were checked
  int64_t num_accepted_ = 0;
  int64_t idle_steps_ = 0;  // without a token, nor anything from outside
  std::vector<uint64_t> owners_;
  std::vector<KvEvent> events_;
  DriverCounts counts_;
};

// ---- what the caller may do

inline bool SchedulerDriver::add(SequenceRequest request) {
  Told told;
  request.tag = next_tag_++;
  told.request = request;
  RequestId id = 0;
  bool exhausted = false;
  const bool queue_is_full =
      num_never_admitted() + told.request.params.num_samples() > config_.max_num_waiting ||
      too_many_tokens(told.request.prompt_token_ids.size());
  try {
    id = scheduler_.add_request(std::move(request));
  } catch (const InvalidArgument&) {
  } catch (const ResourceExhausted&) {
    exhausted = true;
  }
  check();
  hold(!exhausted || queue_is_full, "the queue is said to be full");
  if (id == 0) return false;
  hold(!queue_is_full, "the queue is over-full");
  hold(id > last_id_, "ids do not ascend");
  last_id_ = id;
  const SequenceRequest& r = told.request;
  told.is_beam = r.params.beam_width > 0;
  told.heard.assign(r.prompt_token_ids.size(), false);
  told.samples.resize(told.is_beam ? 1 : r.params.num_samples());
  if (told.is_beam) {
    told.beams = fake_beam_search(r.prompt_token_ids, r.params, config_.eos_token_ids,
                                  config_.max_model_len, kVocabSize);
  }
  for (size_t i = 0; i < told.samples.size() && !told.is_beam; ++i) {
    told.samples[i].expected =
        fake_completion(r.prompt_token_ids, r.params, sample_seed(r.seed, static_cast<int32_t>(i)),
                        config_.eos_token_ids, config_.max_model_len, kVocabSize);
  }
  live_.emplace(id, std::move(told));
  idle_steps_ = 0;
  return true;
}

inline bool SchedulerDriver::too_many_tokens(size_t num_added) const {
  int64_t count = 0;
  for (const auto& [id, told] : live_) {
    if (!told.admitted) count += static_cast<int64_t>(told.request.prompt_token_ids.size());
  }
  return config_.max_num_waiting_tokens > 0 && count > 0 &&
         count + static_cast<int64_t>(num_added) > config_.max_num_waiting_tokens;
}

inline int32_t SchedulerDriver::num_never_admitted() const {
  int32_t count = 0;
  for (const auto& [id, told] : live_) {
    if (told.admitted) continue;
    if (told.is_beam) count += told.request.params.beam_width;
    for (const Sample& sample : told.samples) count += !told.is_beam && sample.live;
  }
  return count;
}

inline SchedulerDriver::Told* SchedulerDriver::any_live(Choices* choices, RequestId* id,
                                                        int32_t* index) {
  if (live_.empty()) return nullptr;
  auto it = live_.begin();
  std::advance(it, choices->below(live_.size()));
  *id = it->first;
  Told& told = it->second;
  *index = choices->between(0, static_cast<int32_t>(told.samples.size()) - 1);
  return &told;
}

inline void SchedulerDriver::abort(Choices* choices) {
  RequestId id;
  int32_t index;
  Told* told = any_live(choices, &id, &index);
  if (told == nullptr) return;
  idle_steps_ = 0;
  if (!told->is_beam && choices->one_in(2)) {
    Sample& sample = told->samples[index];
    hold(scheduler_.abort(id, index) == sample.live, "invariant 6: abort of a sample");
    check();
    hold(!scheduler_.abort(id, index), "invariant 6: a sample is freed twice");
    sample.live = false;
    told->lost_a_sample = true;
    if (!told->live()) {
      live_.erase(id);
      hold(!scheduler_.abort(id), "invariant 6: nothing is left to abort");
    }
  } else {
    if (told->is_beam) hold(!scheduler_.abort(id, 0), "beams cannot be aborted one by one");
    live_.erase(id);
    hold(scheduler_.abort(id), "invariant 6: abort");
    check();
    hold(!scheduler_.abort(id), "invariant 6: freed twice");
  }
  check();
}

inline bool SchedulerDriver::in_flight(RequestId id, int32_t index) const {
  for (const Flight& flight : flights_) {
    for (const ScheduledSequence& seq : flight.step->sequences) {
      if (seq.id == id && seq.index == index) return true;
    }
  }
  return false;
}

inline void SchedulerDriver::fork(Choices* choices) {
  RequestId id;
  int32_t index;
  Told* told = any_live(choices, &id, &index);
  if (told == nullptr || told->samples.size() > 12) return;
  const Sample& parent = told->samples[index];
  const uint64_t seed = choices->below(1000);
  const bool allowed =
      parent.live && !told->is_beam && !parent.output.empty() && !in_flight(id, index);
  int32_t child = -1;
  try {
    child = scheduler_.fork(id, index, seed);
  } catch (const InvalidArgument&) {
  }
  check();
  hold((child >= 0) == allowed, "a fork is allowed when it is not, or not when it is");
  if (!allowed) return;
  hold(child == static_cast<int32_t>(told->samples.size()), "a fork's index");
  Sample sample;
  sample.output = parent.output;
  sample.expected =
      fake_completion(told->request.prompt_token_ids, told->request.params, seed,
                      config_.eos_token_ids, config_.max_model_len, kVocabSize, parent.output);
  sample.born = true;
  sample.num_computed = parent.num_computed;
  told->samples.push_back(std::move(sample));
  told->is_uncapped = true;
  ++counts_.forks;
  idle_steps_ = 0;
}

inline void SchedulerDriver::propose(Choices* choices) {
  RequestId id;
  int32_t index;
  Told* told = any_live(choices, &id, &index);
  if (told == nullptr) return;
  const Sample& sample = told->samples[index];
  std::vector<TokenId> tokens;
  const int32_t num_tokens = choices->between(0, 6);
  for (int32_t i = 0; i < num_tokens; ++i) {
    const size_t at = sample.output.size() + i;
    const bool right = at < sample.expected.tokens.size() && !choices->one_in(6);
    tokens.push_back(right ? sample.expected.tokens[at] : choices->between(0, kVocabSize - 1));
  }
  bool taken = false;
  bool refused = false;
  try {
    taken = scheduler_.propose(id, index, tokens);
  } catch (const InvalidArgument&) {
    refused = true;
  }
  check();
  hold(refused == told->is_beam, "propose() refuses beams, and nothing else");
  const bool allowed = sample.live && !in_flight(id, index) && !told->is_beam;
  hold(!taken || allowed, "a proposal for a sample that is in a step under way, or gone");
  hold(taken || !allowed || !sample.born, "a proposal is refused");
}

inline void SchedulerDriver::reset_prefix_cache() {
  const BlockPool& pool = scheduler_.blocks().pool();
  const bool idle = pool.num_free() == pool.num_blocks();
  const bool done = scheduler_.reset_prefix_cache();
  check();
  hold(done == idle || !flights_.empty(), "reset_prefix_cache() when blocks are in use, or not");
  idle_steps_ = 0;
}

inline InputBatch* SchedulerDriver::free_batch() {
  for (InputBatch& batch : batches_) {
    const auto is_it = [&](const Flight& flight) { return flight.batch == &batch; };
    if (std::none_of(flights_.begin(), flights_.end(), is_it)) return &batch;
  }
  return nullptr;
}

inline bool SchedulerDriver::begin(Choices* choices) {
  if (static_cast<int32_t>(flights_.size()) >= config_.max_steps_in_flight) return false;
  const SchedulerOutput& step = scheduler_.schedule();
  check();
  if (step.sequences.empty()) {
    hold(!flights_.empty() || live_.empty(), "invariant 7: nothing moves");
    hold(step.transfers.empty(), "transfers of a step that is none");
    return false;
  }
  ++counts_.steps;
  counts_.overlapped += !flights_.empty();
  check_budgets(step);
  check_progress(step);
  flights_.push_back({&step, free_batch()});
  bool aborted = false;
  if (choices != nullptr && choices->one_in(40)) {
    abort(choices);
    for (const ScheduledSequence& seq : step.sequences) {
      const Told* request = told(seq.id);
      // Where others are to be born yet, one of them takes the place of the one that computes.
      aborted |= request == nullptr || (!request->is_beam && !request->samples[seq.index].live &&
                                        request->samples[seq.index].born);
    }
  }
  InputBatch* batch = flights_.back().batch;
  bool refused = false;
  try {
    scheduler_.prepare(step, batch);
  } catch (const InvalidArgument&) {
    throw;
  } catch (const Error&) {
    refused = true;
  }
  check();
  hold(!aborted || refused, "prepare() of a step that lost a sequence");
  hold(!refused || aborted, "prepare() refuses");
  if (refused) {
    discard(flights_.size() - 1);
    return true;
  }
  blocks_.check_written_slots(*batch);
  check_placeholders(step, *batch);
  // A step may also never get to the model.
  if (choices != nullptr && choices->one_in(60)) {
    discard(flights_.size() - 1);
    return true;
  }
  check_owners(flights_.back());
  model_.execute(*batch);
  if (!lazy_ && counts_.steps % 4 == 0) poison();
  return true;
}

inline void SchedulerDriver::finish() {
  const Flight flight = flights_.front();
  const ModelRunnerOutput& result = model_.wait(flight.step->step_id);
  collect_prompt_logprobs(flight, result);
  const std::vector<SequenceUpdate>& updates =
      scheduler_.update(*flight.step, result.sampled_token_ids, result.logprobs);
  flights_.pop_front();
  take_in(*flight.step, result, updates);
  check();
  if (flights_.empty() && counts_.steps % 4 == 1) poison();
}

inline void SchedulerDriver::fail(Choices* choices) {
  if (flights_.empty()) return;
  const size_t flight = choices->below(flights_.size());
  if (flight == 0 && choices->one_in(2)) model_.wait(flights_[0].step->step_id);
  discard(flight);
}

inline void SchedulerDriver::discard(size_t flight) {
  model_.forget(flights_[flight].step->step_id);
  const SchedulerOutput* step = flights_[flight].step;
  for (size_t i = flights_.size(); i-- > flight;) take_back(*flights_[i].step);
  flights_.resize(flight);
  scheduler_.discard(*step);
  check();
  ++counts_.discards;
  idle_steps_ = 0;
}

inline void SchedulerDriver::take_back(const SchedulerOutput& step) {
  for (const ScheduledSequence& seq : step.sequences) {
    Told* request = told(seq.id);
    if (request == nullptr) continue;
    request->is_uncapped = true;
    if (request->is_beam) continue;
    Sample& sample = request->samples[seq.index];
    (sample.born ? sample.num_computed : request->num_computed) = seq.num_computed_tokens;
    sample.num_in_flight -= seq.num_sampling_rows > 0;
  }
}

inline void SchedulerDriver::drain() {
  while (scheduler_.has_unfinished() || !flights_.empty()) {
    while (begin()) {
    }
    hold(!flights_.empty(), "invariant 7: unfinished, yet nothing is scheduled");
    finish();
  }
  hold(live_.empty(), "invariant 7: somebody was forgotten");
  check_stats();
  const SchedulerStats stats = scheduler_.stats();
  hold(stats.num_free_blocks == config_.num_blocks, "invariants 1 and 6: blocks are lost");
  hold(stats.num_running == 0 && stats.num_waiting == 0, "invariant 7: somebody is left over");
}

inline void SchedulerDriver::call_something(Choices* choices, int32_t max_live) {
  const int32_t dice = choices->between(0, 99);
  if (dice < 20) {
    if (static_cast<int32_t>(live_.size()) >= max_live) return;
    add(random_request(choices, std::max(1, config_.max_model_len * 2 / 3)));
  } else if (dice < 23) {
    abort(choices);
  } else if (dice < 25) {
    fork(choices);
  } else if (dice < 33) {
    propose(choices);
  } else if (dice < 34) {
    reset_prefix_cache();
  } else if (dice < 36) {
    fail(choices);
  } else if (dice < 66) {
    begin(choices);
  } else {
    if (flights_.empty()) begin(choices);
    if (!flights_.empty()) finish();
  }
}

// ---- what must hold

inline void SchedulerDriver::check() {
  scheduler_.check_integrity();
  blocks_.check_holders();
  if (!config_.enable_kv_events) return;
  scheduler_.take_kv_events(&events_);
  counts_.kv_events += static_cast<int64_t>(events_.size());
  blocks_.check_events(events_);
}

inline void SchedulerDriver::check_owners(const Flight& flight) {
  owners_.clear();
  for (const ScheduledSequence& seq : flight.step->sequences) {
    const bool shares = config_.enable_prefix_caching;
    owners_.push_back(shares ? std::hash<std::string>()(live_.at(seq.id).request.cache_salt)
                             : seq.id);
  }
  blocks_.check_owners(*flight.batch, owners_);
}

inline void SchedulerDriver::check_stats() const {
  const SchedulerStats s = scheduler_.stats();
  hold(s.kv_slots_used <= s.kv_slots_allocated, "more slots used than allocated");
  hold(s.prefix_cache_hits <= s.prefix_cache_queries, "more hits than queries");
  hold(s.preempted_cache_hits <= s.preempted_cache_queries, "more hits than queries");
  hold(s.num_preemptions_swap <= s.num_preemptions, "more swaps than preemptions");
  hold(s.num_draft_tokens == num_drafts_, "num_draft_tokens");
  hold(s.num_accepted_tokens == num_accepted_, "num_accepted_tokens");
  hold(s.num_cached_host_blocks <= s.num_host_blocks, "more on the host than fits");
}

inline void SchedulerDriver::check_budgets(const SchedulerOutput& step) {
  int32_t num_tokens = 0;
  std::map<int32_t, int32_t> num_partial;  // by priority: the urgent do not wait for the others
  std::set<std::pair<RequestId, int32_t>> seen;
  std::set<int32_t> rows;
  for (const ScheduledSequence& seq : step.sequences) {
    num_tokens += seq.num_scheduled_tokens;
    hold(seen.insert({seq.id, seq.index}).second, "invariant 3: scheduled twice");
    hold(rows.insert(seq.row).second, "invariant 3: two sequences in one row");
    check_sequence(seq, step);
    const Told& request = live_.at(seq.id);
    if (config_.max_num_partial_prefills > 0 && !request.is_uncapped &&
        seq.num_computed_tokens + seq.num_scheduled_tokens < request.num_prompt()) {
      const bool by_priority = config_.policy == SchedulingPolicy::kPriority;
      hold(++num_partial[by_priority ? request.request.priority : 0] <=
               config_.max_num_partial_prefills,
           "invariant 3: too many prompts partly computed");
    }
  }
  hold(num_tokens == step.num_scheduled_tokens, "num_scheduled_tokens");
  hold(num_tokens <= config_.max_num_batched_tokens, "invariant 3: token budget");
  hold(step.sequences.size() <= static_cast<size_t>(config_.max_num_seqs),
       "invariant 3: sequence budget");
}

inline void SchedulerDriver::check_sequence(const ScheduledSequence& seq,
                                            const SchedulerOutput& step) {
  Told* request = told(seq.id);
  hold(request != nullptr, "invariant 6: scheduled after its end");
  request->admitted = true;
  hold(seq.tag == request->request.tag, "another's tag");
  hold(seq.num_scheduled_tokens >= 1, "invariant 3: nothing of it is scheduled");
  const int32_t end = seq.num_computed_tokens + seq.num_scheduled_tokens;
  const int32_t final_length = fake_final_length(request->request.prompt_token_ids.size(),
                                                 request->request.params, config_.max_model_len);
  hold(end < final_length, "tokens are computed that no output needs");
  const BlockManager& blocks = scheduler_.blocks();
  hold(blocks.num_blocks_of(seq.row) >= blocks.blocks_for(end), "invariant 3: blocks are missing");
  hold(blocks.num_blocks_of(seq.row) <= blocks.blocks_for(final_length - 1),
       "blocks that no output needs");
  if (request->is_beam) return;
  const int32_t num_samples = static_cast<int32_t>(request->samples.size());
  hold(seq.index >= 0 && seq.index < num_samples, "no such sample");
  Sample& sample = request->samples[seq.index];
  hold(sample.live, "invariant 6: scheduled after its end");
  sample.last_step = step.step_id;

  const int32_t known =
      request->num_prompt() + static_cast<int32_t>(sample.output.size()) + sample.num_in_flight;
  int32_t num_live = 0;
  for (const Sample& s : request->samples) num_live += s.live;
  request->split = !sample.born && end == known && num_live > 1;
  if (!sample.born && end == known) {
    hold(seq.num_sampling_rows >= num_live, "a sampling row for each sample");
  } else if (end < known) {
    hold(seq.num_sampling_rows == 0, "sampled in the midst of what is known");
  } else {
    hold(seq.num_sampling_rows == 1 + end - known, "sampling rows");
  }
  if (config_.long_prefill_token_threshold > 0 && end < known) {
    hold(seq.num_scheduled_tokens <= config_.long_prefill_token_threshold,
         "invariant 3: long_prefill_token_threshold");
  }

  int32_t& num_computed = sample.born ? sample.num_computed : request->num_computed;
  if (seq.num_computed_tokens != num_computed) {
    // Admitted again, or for the first time.
    hold(seq.num_computed_tokens % config_.block_size == 0, "invariant 3: a misaligned hit");
    hold(seq.num_computed_tokens < known, "invariant 3: a hit of all tokens");
    // Its own blocks and its siblings' may be found even so.
    hold(config_.enable_prefix_caching || config_.num_host_blocks > 0 || num_samples > 1 ||
             seq.num_computed_tokens == 0,
         "a hit without caching");
    counts_.hits += seq.num_computed_tokens > 0;
  }
  num_computed = end;
  sample.num_in_flight += seq.num_sampling_rows > 0;
}

// Each step computes something of whoever comes first; it cannot go on forever without a token.
inline void SchedulerDriver::check_progress(const SchedulerOutput& step) {
  for (const ScheduledSequence& seq : step.sequences) {
    if (seq.num_sampling_rows > 0) idle_steps_ = 0;
  }
  hold(++idle_steps_ <= 2 * config_.max_model_len + 16, "invariant 7: it does not come to an end");
}

inline void SchedulerDriver::check_placeholders(const SchedulerOutput& step,
                                                const InputBatch& batch) {
  size_t num_unknown = 0;
  for (const TokenId token : batch.token_ids) num_unknown += token == -1;
  hold(num_unknown == batch.future_tokens.size(), "invariant 5: placeholders");
  hold(num_unknown == 0 || flights_.size() > 1, "invariant 5: placeholders without a step before");
  size_t num_rows = 0;
  for (const ScheduledSequence& seq : step.sequences) num_rows += seq.num_sampling_rows;
  hold(num_rows == batch.sampling_rows.size(), "sampling rows of the batch");
  for (const FutureToken& future : batch.future_tokens) {
    hold(batch.token_ids.at(future.index) == -1 && *future.token == -1,
         "invariant 5: a placeholder is known");
    const InputBatch& before = *flights_[flights_.size() - 2].batch;
    hold(static_cast<size_t>(future.sampling_row) < before.sampling_rows.size(),
         "invariant 5: a placeholder of no sampling row");
  }
}

inline void SchedulerDriver::collect_prompt_logprobs(const Flight& flight,
                                                     const ModelRunnerOutput& result) {
  for (size_t i = 0; i < result.prompt_logprobs.size(); ++i) {
    const PromptLogprobRow& row = flight.batch->prompt_logprob_rows[i];
    const ScheduledSequence& seq = flight.step->sequences.at(row.seq);
    Told* request = told(seq.id);
    if (request == nullptr || request->is_beam) continue;
    Sample& sample = request->samples[seq.index];
    if (!sample.live) continue;
    hold(row.position >= 1 && row.position < request->num_prompt(), "a prompt logprob's position");
    hold(!request->heard[row.position] || request->lost_a_sample, "a prompt logprob twice");
    request->heard[row.position] = true;
    hold(result.prompt_logprobs[i].logprobs[0] ==
             sample.expected.prompt_logprobs.at(row.position - 1),
         "invariant 4: a prompt logprob");
  }
}

// ---- what is heard

inline void SchedulerDriver::take_in(const SchedulerOutput& step, const ModelRunnerOutput& result,
                                     const std::vector<SequenceUpdate>& updates) {
  for (const SequenceUpdate& update : updates) {
    Told* request = told(update.id);
    hold(request != nullptr, "invariant 6: news of somebody who is gone");
    hold(update.tag == request->request.tag, "another's tag");
    hold(update.seq >= 0 && static_cast<size_t>(update.seq) < step.sequences.size() &&
             step.sequences[update.seq].id == update.id,
         "an update's seq");
    hold(update.num_prompt_tokens == request->num_prompt(), "num_prompt_tokens");
    hold(update.num_cached_tokens >= 0 && update.num_cached_tokens < request->num_prompt() &&
             update.num_cached_tokens % config_.block_size == 0,
         "invariant 3: num_cached_tokens");
    hold(config_.enable_prefix_caching || update.num_cached_tokens == 0, "a hit without caching");
    if (request->is_beam) {
      take_in_beam(update, request);
    } else {
      take_in_sample(step, result, update, request);
    }
  }
  for (const ScheduledSequence& seq : step.sequences) {
    const auto it = live_.find(seq.id);
    if (it == live_.end()) continue;
    Told& request = it->second;
    if (request.is_beam) {
      hold(request.num_beams_heard == 0 || request.num_beams_heard == request.beams.size(),
           "beams: some of the best are missing");
      request.samples[0].live = request.num_beams_heard == 0;
    } else if (request.samples[seq.index].live) {
      hold(request.samples[seq.index].last_update == step.step_id,
           "no update for a sequence that was scheduled");
    }
    if (!request.live()) live_.erase(it);
  }
}

inline void SchedulerDriver::take_in_sample(const SchedulerOutput& step,
                                            const ModelRunnerOutput& result,
                                            const SequenceUpdate& update, Told* request) {
  const ScheduledSequence& seq = step.sequences[update.seq];
  hold(update.index >= 0 && static_cast<size_t>(update.index) < request->samples.size(),
       "news of a sample that is none");
  Sample& sample = request->samples[update.index];
  hold(sample.live, "invariant 6: news of a sample that is gone");
  hold(sample.last_update != step.step_id, "two updates for one sample");
  sample.last_update = step.step_id;
  const size_t num_new = update.new_token_ids.size();
  if (seq.num_sampling_rows == 0) {
    hold(num_new == 0 && update.sampling_row == -1, "a token without a sampling row");
    hold(update.finish_reason == FinishReason::kNone, "it ends without a token");
    return;
  }
  hold(num_new >= 1 && num_new <= static_cast<size_t>(seq.num_sampling_rows), "new tokens");
  idle_steps_ = 0;
  if (update.index == seq.index) {
    --sample.num_in_flight;
    // The proposed tokens that were not accepted have to be computed again.
    if (!request->split) {
      num_drafts_ += seq.num_sampling_rows - 1;
      num_accepted_ += static_cast<int64_t>(num_new) - 1;
      (sample.born ? sample.num_computed : request->num_computed) -=
          seq.num_sampling_rows - static_cast<int32_t>(num_new);
    }
  } else {
    hold(!sample.born, "a sample is born twice");
    ++counts_.births;
  }
  if (!sample.born) sample.num_computed = request->num_computed;
  sample.born = true;
  for (size_t i = 0; i < num_new; ++i) {
    hold(update.new_token_ids[i] == result.sampled_token_ids.at(update.sampling_row + i),
         "a token that was not sampled");
    sample.output.push_back(update.new_token_ids[i]);
  }
  const size_t n = sample.output.size();
  const FakeCompletion& expected = sample.expected;
  hold(static_cast<size_t>(update.num_output_tokens) == n, "num_output_tokens");
  hold(n <= expected.tokens.size(), "invariant 4: it does not end where it should");
  hold(std::equal(sample.output.begin(), sample.output.end(), expected.tokens.begin()),
       "invariant 4: another output");
  if (n < expected.tokens.size()) {
    hold(update.finish_reason == FinishReason::kNone, "invariant 4: it ends too early");
    return;
  }
  hold(update.finish_reason == expected.finish_reason, "invariant 4: finish_reason");
  if (expected.finish_reason == FinishReason::kStop) {
    hold(update.stop_token_id == expected.tokens.back(), "invariant 4: stop_token_id");
  } else {
    hold(update.stop_token_id == -1, "invariant 4: stop_token_id");
  }
  if (!request->lost_a_sample && request->request.params.prompt_logprobs >= 0) {
    hold(std::all_of(request->heard.begin() + 1, request->heard.end(), [](bool h) { return h; }),
         "a prompt logprob is missing");
  }
  sample.live = false;
  ++counts_.finished;
}

inline void SchedulerDriver::take_in_beam(const SequenceUpdate& update, Told* request) {
  if (update.finish_reason == FinishReason::kNone) {
    hold(update.new_token_ids.empty(), "beams: a token before the search is over");
    return;
  }
  const size_t rank = request->num_beams_heard++;
  hold(rank < request->beams.size() && update.index == static_cast<int32_t>(rank), "beams: rank");
  const BeamHypothesis& expected = request->beams[rank];
  hold(std::equal(update.new_token_ids.begin(), update.new_token_ids.end(),
                  expected.token_ids.begin(), expected.token_ids.end()),
       "invariant 4: another beam");
  hold(update.num_output_tokens == static_cast<int32_t>(expected.token_ids.size()),
       "num_output_tokens");
  hold(update.score == expected.score, "invariant 4: another score");
  hold(update.finish_reason == expected.finish_reason, "invariant 4: finish_reason");
  hold(update.stop_token_id == expected.stop_token_id, "invariant 4: stop_token_id");
  ++counts_.finished;
  counts_.beam_searches += rank == 0;
}

// What nobody holds and nobody can find is nobody's: who reads it all the same shall notice.
inline void SchedulerDriver::poison() {
  const BlockPool& pool = scheduler_.blocks().pool();
  for (BlockId id = 0; id < pool.num_blocks(); ++id) {
    if (pool.block(id).ref_count == 0 && !pool.block(id).hash) model_.poison(id);
  }
  const BlockPool& host = scheduler_.blocks().host_pool();
  for (BlockId id = 0; id < host.num_blocks(); ++id) {
    if (host.block(id).ref_count == 0 && !host.block(id).hash) model_.poison_host(id);
  }
}

}  // namespace fastpage
