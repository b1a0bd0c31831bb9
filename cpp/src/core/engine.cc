#include "fastpage/engine.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <fstream>
#include <iterator>
#include <mutex>
#include <random>
#include <unordered_map>

#include "core/admission.h"
#include "core/engine_requests.h"
#include "core/splitmix.h"

namespace fastpage {

namespace {

using Clock = std::chrono::steady_clock;

uint64_t random_word() {
  static std::mutex mutex;
  static std::random_device device;
  std::lock_guard<std::mutex> lock(mutex);
  return static_cast<uint64_t>(device()) << 32 | device();
}

EngineConfig resolved(EngineConfig config, const ModelRunner* runner) {
  if (runner == nullptr) throw InvalidArgument("Engine: the model runner is null");
  if (config.async_scheduling && runner->max_steps_in_flight() < 2) {
    throw InvalidArgument(
        "async_scheduling needs a model runner that takes two steps at a time, and this one takes "
        "one: turn async_scheduling off");
  }
  config.scheduler.max_steps_in_flight = config.async_scheduling ? 2 : 1;
  config.scheduler.validate();
  if (config.vocab_size < 1) {
    throw InvalidArgument("vocab_size is " + std::to_string(config.vocab_size) +
                          ": must be at least 1");
  }
  for (const TokenId id : config.scheduler.eos_token_ids) {
    if (id < 0 || id >= config.vocab_size) {
      throw InvalidArgument("eos_token_ids holds " + std::to_string(id) + ": not in [0, " +
                            std::to_string(config.vocab_size) + ")");
    }
  }
  if (config.random_hash_key) {
    config.scheduler.hash_key_lo = random_word();
    config.scheduler.hash_key_hi = random_word();
  }
  return config;
}

double seconds(Clock::duration d) { return std::chrono::duration<double>(d).count(); }

constexpr int32_t kAllSamples = -1;

// A call of abort() that waits for the call of step() to end.
struct Abort {
  RequestId id;
  int32_t index;  // or kAllSamples
};

// A request on its way from add_request() to the scheduler.
struct Arrival {
  Group* group;
  Request request;
  uint64_t seed;
};

// A step that the runner has begun.
struct StepUnderWay {
  const SchedulerOutput* step = nullptr;
  InputBatch batch;
  Clock::time_point begun;
};

}  // namespace

// Two locks. step_mutex: held for a whole call of step(), guards the scheduler and what belongs to
// steps. mutex: held for moments only, guards what callers of other threads see. Calls that arrive
// during a step are queued, and applied by whoever gives up step_mutex (help()).
struct Engine::State {
  State(const EngineConfig& c, std::shared_ptr<ModelRunner> r)
      : config(resolved(c, r.get())), runner(std::move(r)), scheduler(config.scheduler) {
    snapshot.scheduler = scheduler.stats();
  }
  ~State() { wait_for(0); }

  RequestId add(Request request);
  bool abort(RequestId id, int32_t index);
  void step(StepOutput* out);
  void record(std::ostream* log);
  void record(const std::string& path);
  void help() noexcept;
  bool has_unfinished() const { return !live.empty() || !pending.empty() || work_under_way; }

  // With step_mutex held.
  void drain();
  Group* find(RequestId id);  // null once finished; only step_mutex's holder ends a request
  void admit(Arrival* arrival);
  void abort_group(Group* group, int32_t index = kAllSamples);
  void abort_requests_of(const SchedulerOutput& step);
  bool begin_step();
  void end_step(StepOutput* out);
  void fail();
  void abort_lost();
  void wait_for(int32_t first) noexcept;
  void count_model_time(double waited, double sampled);
  void collect(const StepUnderWay& done, const std::vector<SequenceUpdate>& updates,
               const ModelRunnerOutput& result, StepOutput* out);
  void deliver_best(Group* group, StepOutput* out);
  void finish(Group* group, int32_t index);
  void take_pending(StepOutput* out);
  void count_arriving(SchedulerStats* stats) const {
    stats->num_waiting += static_cast<int32_t>(arriving.num_sequences);
    stats->num_never_admitted += static_cast<int32_t>(arriving.num_sequences);
    stats->num_waiting_tokens += arriving.num_prompt_tokens;
  }
  void refresh_snapshot();

  const EngineConfig config;
  const std::shared_ptr<ModelRunner> runner;
  std::ofstream log_file;

  std::mutex step_mutex;
  Scheduler scheduler;
  std::array<StepUnderWay, 2> steps;  // a ring: num_under_way from `oldest` on
  int32_t oldest = 0;
  int32_t num_under_way = 0;
  int64_t num_with_logprobs = 0;  // requests in the scheduler whose rows ask for some
  EngineStats totals;

  mutable std::mutex mutex;
  std::condition_variable work;
  std::unordered_map<RequestId, std::unique_ptr<Group>> live;
  std::vector<Arrival> arrivals;
  std::vector<Abort> aborts;
  std::vector<RequestOutput> pending;  // for the next StepOutput
  QueueLoad arriving;                  // the arrivals
  RequestId next_id = 1;
  bool woken = false;
  bool work_under_way = false;  // num_under_way > 0
  EngineStats snapshot;
};

RequestId Engine::State::add(Request request) {
  request.params.validate(config.vocab_size);
  check_fits(config.scheduler, request.prompt_token_ids.size(), request.params);
  for (size_t i = 0; i < request.prompt_token_ids.size(); ++i) {
    const TokenId id = request.prompt_token_ids[i];
    if (id < 0 || id >= config.vocab_size) {
      throw InvalidArgument("prompt token " + std::to_string(i) + " is " + std::to_string(id) +
                            ": not in [0, " + std::to_string(config.vocab_size) + ")");
    }
  }
  const QueueLoad added = {request.params.num_samples(),
                           static_cast<int64_t>(request.prompt_token_ids.size())};
  auto group = std::make_unique<Group>(request.params, request.prompt_token_ids.size());

  std::lock_guard<std::mutex> lock(mutex);
  SchedulerStats waiting = snapshot.scheduler;
  count_arriving(&waiting);
  check_queue(config.scheduler, {waiting.num_never_admitted, waiting.num_waiting_tokens}, added);
  const RequestId id = next_id++;
  group->id = id;
  const uint64_t seed = request.params.seed.value_or(mix(config.seed ^ mix(id)));
  Group* const address = group.get();
  const auto place = live.emplace(id, std::move(group)).first;
  try {
    arrivals.push_back({address, std::move(request), seed});
  } catch (...) {
    live.erase(place);
    throw;
  }
  arriving.num_sequences += added.num_sequences;
  arriving.num_prompt_tokens += added.num_prompt_tokens;
  work.notify_all();
  return id;
}

bool Engine::State::abort(RequestId id, int32_t index) {
  {
    std::lock_guard<std::mutex> lock(mutex);
    const auto it = live.find(id);
    if (it == live.end()) return false;
    Group& group = *it->second;
    if (index == kAllSamples) {
      if (!group.abort_asked) aborts.push_back({id, index});
      group.abort_asked = true;
    } else {
      if (group.delivery != Group::Delivery::kAsMade) return false;
      if (index < 0 || static_cast<size_t>(index) >= group.samples.size()) return false;
      if (group.samples[index].finished) return false;
      aborts.push_back({id, index});
    }
  }
  help();
  return true;
}

// Whoever could not have step_mutex leaves its call in the queue: its holder comes by here after
// giving it up, and so nothing is left lying.
void Engine::State::help() noexcept {
  while (true) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      if (aborts.empty()) return;
    }
    std::unique_lock<std::mutex> step_lock(step_mutex, std::try_to_lock);
    if (!step_lock.owns_lock()) return;
    try {
      drain();
    } catch (const std::bad_alloc&) {
      return;  // the next step() tries again
    }
    refresh_snapshot();
  }
}

void Engine::State::drain() {
  std::vector<Arrival> new_arrivals;
  std::vector<Abort> new_aborts;
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (arrivals.empty() && aborts.empty()) return;
    new_arrivals.swap(arrivals);
    new_aborts.swap(aborts);
    // They count as waiting until the scheduler's own count says so.
    count_arriving(&snapshot.scheduler);
    arriving = {};
  }
  for (Arrival& arrival : new_arrivals) {
    try {
      admit(&arrival);
    } catch (...) {  // memory ran out: that costs this request alone
      abort_group(arrival.group);
    }
  }
  auto abort = new_aborts.begin();
  try {
    for (; abort != new_aborts.end(); ++abort) {
      if (Group* group = find(abort->id)) abort_group(group, abort->index);
    }
  } catch (...) {  // memory ran out: another time
    std::lock_guard<std::mutex> lock(mutex);
    aborts.insert(aborts.end(), abort, new_aborts.end());
    throw;
  }
}

void Engine::State::admit(Arrival* arrival) {
  Group* group = arrival->group;
  SequenceRequest sequences;
  sequences.prompt_token_ids = std::move(arrival->request.prompt_token_ids);
  sequences.params = std::move(arrival->request.params);
  if (group->delivery == Group::Delivery::kBestOf) {
    sequences.params.logprobs = std::max(sequences.params.logprobs, 0);
  }
  sequences.seed = arrival->seed;
  sequences.priority = arrival->request.priority;
  sequences.cache_salt = std::move(arrival->request.cache_salt);
  sequences.tag = tag_of(group);
  group->scheduler_id = scheduler.add_request(std::move(sequences));
  num_with_logprobs += group->needs_logprobs;
}

void Engine::State::abort_group(Group* group, int32_t index) {
  std::vector<RequestOutput> news;
  for (int32_t i = 0; i < static_cast<int32_t>(group->samples.size()); ++i) {
    if (group->samples[i].finished || (index != kAllSamples && i != index)) continue;
    news.push_back(group->news_of(i, FinishReason::kAbort));
  }
  std::vector<int32_t> ended;
  for (const RequestOutput& output : news) ended.push_back(output.index);
  {
    std::lock_guard<std::mutex> lock(mutex);
    pending.insert(pending.end(), std::make_move_iterator(news.begin()),
                   std::make_move_iterator(news.end()));
    work.notify_all();
  }
  // Nothing from here on needs memory.
  if (index == kAllSamples) {
    scheduler.abort(group->scheduler_id);
  } else {
    scheduler.abort(group->scheduler_id, index);
  }
  for (const int32_t i : ended) finish(group, i);  // the last one takes the group with it
}

// False from abort(): aborted already, by a caller or with its group; the tag points nowhere then.
void Engine::State::abort_requests_of(const SchedulerOutput& step) {
  for (const ScheduledSequence& scheduled : step.sequences) {
    if (scheduler.abort(scheduled.id)) abort_group(group_of(scheduled.tag));
  }
}

Group* Engine::State::find(RequestId id) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto it = live.find(id);
  return it == live.end() ? nullptr : it->second.get();
}

void Engine::State::step(StepOutput* out) {
  const Clock::time_point start = Clock::now();
  drain();
  totals.schedule_seconds += seconds(Clock::now() - start);
  while (num_under_way < config.scheduler.max_steps_in_flight && begin_step()) {
  }
  if (num_under_way > 0) end_step(out);
  take_pending(out);
  if (config.scheduler.enable_kv_events) scheduler.take_kv_events(&out->kv_events);
  refresh_snapshot();
}

// False if there is nothing to compute (before a step under way is done).
bool Engine::State::begin_step() {
  const Clock::time_point start = Clock::now();
  const SchedulerOutput& step = scheduler.schedule();
  const Clock::time_point scheduled = Clock::now();
  totals.schedule_seconds += seconds(scheduled - start);
  refresh_snapshot();  // whoever was just admitted waits no longer
  if (step.sequences.empty()) return false;
  StepUnderWay& begun = steps[(oldest + num_under_way) % steps.size()];
  try {
    scheduler.prepare(step, &begun.batch);
    const Clock::time_point prepared = Clock::now();
    runner->execute(begun.batch);
    totals.prepare_seconds += seconds(prepared - scheduled);
    totals.model_seconds += seconds(Clock::now() - prepared);
  } catch (...) {
    scheduler.discard(step);
    abort_requests_of(step);
    refresh_snapshot();
    throw;
  }
  begun.step = &step;
  begun.begun = start;
  ++num_under_way;
  return true;
}

void Engine::State::end_step(StepOutput* out) {
  const StepUnderWay& done = steps[oldest];
  const SchedulerOutput& step = *done.step;
  try {
    const Clock::time_point start = Clock::now();
    const ModelRunnerOutput& result = runner->wait(step.step_id);
    const Clock::time_point computed = Clock::now();
    check_result(done.batch, result, config.vocab_size, num_with_logprobs > 0);
    drain();
    collect(done, scheduler.update(step, result.sampled_token_ids, result.logprobs), result, out);
    count_model_time(seconds(computed - start), result.sample_seconds);
    totals.output_seconds += seconds(Clock::now() - computed);
  } catch (...) {
    fail();
    throw;
  }
  oldest = (oldest + 1) % static_cast<int32_t>(steps.size());
  --num_under_way;
  out->step_id = step.step_id;
  out->num_tokens = step.num_scheduled_tokens;
  ++totals.num_steps;
  totals.num_computed_tokens += step.num_scheduled_tokens;
}

// A step sampled on another thread may have taken longer for it than this one waited.
void Engine::State::count_model_time(double waited, double sampled) {
  totals.sample_seconds += sampled;
  totals.model_seconds = std::max(totals.model_seconds + waited - sampled, 0.0);
}

// The oldest step under way has failed. What was begun after it builds upon it.
void Engine::State::fail() {
  const int32_t num_lost = num_under_way;
  wait_for(1);
  num_under_way = 0;
  for (int32_t i = 0; i < num_lost; ++i) {
    try {
      scheduler.discard(*steps[(oldest + i) % steps.size()].step);
      break;                            // and with it those after it
    } catch (const InvalidArgument&) {  // memory ran out in update() or later: the step is over
    }
  }
  for (int32_t i = 0; i < num_lost; ++i) {
    abort_requests_of(*steps[(oldest + i) % steps.size()].step);
  }
  abort_lost();
  refresh_snapshot();
}

// Requests that the scheduler has ended and whose end has not got here.
void Engine::State::abort_lost() {
  std::vector<Group*> lost;
  {
    std::lock_guard<std::mutex> lock(mutex);
    for (const auto& [id, group] : live) {
      if (group->scheduler_id != 0 && !scheduler.has(group->scheduler_id)) {
        lost.push_back(group.get());
      }
    }
  }
  for (Group* group : lost) abort_group(group);
}

// The steps under way from the first-th on. Failed or not, nobody needs their results.
void Engine::State::wait_for(int32_t first) noexcept {
  for (int32_t i = first; i < num_under_way; ++i) {
    try {
      runner->wait(steps[(oldest + i) % steps.size()].step->step_id);
    } catch (...) {
    }
  }
}

namespace {

// Those of one sequence of the step.
Span<const PromptLogprobRow> rows_of(Span<const PromptLogprobRow> rows, int32_t seq) {
  const auto before = [](const PromptLogprobRow& row, int32_t value) { return row.seq < value; };
  const PromptLogprobRow* first = std::lower_bound(rows.begin(), rows.end(), seq, before);
  const PromptLogprobRow* last = std::lower_bound(first, rows.end(), seq + 1, before);
  return {first, static_cast<size_t>(last - first)};
}

}  // namespace

void Engine::State::collect(const StepUnderWay& done, const std::vector<SequenceUpdate>& updates,
                            const ModelRunnerOutput& result, StepOutput* out) {
  const Span<const PromptLogprobRow> prompt_rows = done.batch.prompt_logprob_rows;
  int32_t last_seq = -1;
  out->outputs.reserve(updates.size());
  for (const SequenceUpdate& update : updates) {
    Span<const PromptLogprobRow> prompt;
    // Samples that are born here follow the one that computed the prompt, and have its seq.
    if (!prompt_rows.empty() && update.seq != last_seq) prompt = rows_of(prompt_rows, update.seq);
    last_seq = update.seq;
    Group* group = group_of(update.tag);
    group->start(done.begun);
    if (update.new_token_ids.empty() && prompt.empty()) continue;
    totals.num_generated_tokens += static_cast<int64_t>(update.new_token_ids.size());
    group->num_cached_tokens = update.num_cached_tokens;
    const bool held = group->delivery == Group::Delivery::kBestOf;
    if (!held || !prompt.empty()) {
      RequestOutput& news =
          out->outputs.emplace_back(group->news_of(held ? 0 : update.index, FinishReason::kNone));
      for (const PromptLogprobRow& row : prompt) {
        news.prompt_logprobs.push_back(result.prompt_logprobs[&row - prompt_rows.data()]);
      }
      if (!held) group->append(update, result, &news);
    }
    if (held) {
      if (group->hold(update, result)) deliver_best(group, out);
    } else {
      Sample& sample = group->samples[update.index];
      sample.num_output_tokens = update.num_output_tokens;
      sample.cumulative_logprob = out->outputs.back().cumulative_logprob;
      if (update.finish_reason != FinishReason::kNone) finish(group, update.index);
    }
  }
}

void Engine::State::deliver_best(Group* group, StepOutput* out) {
  std::vector<RequestOutput> best = group->take_best();
  std::move(best.begin(), best.end(), std::back_inserter(out->outputs));
  const auto n = static_cast<int32_t>(group->samples.size());
  for (int32_t i = 0; i < n; ++i) finish(group, i);
}

// The last one takes the group with it.
void Engine::State::finish(Group* group, int32_t index) {
  std::lock_guard<std::mutex> lock(mutex);
  group->samples[index].finished = true;
  if (--group->num_unfinished > 0) return;
  if (group->scheduler_id != 0) num_with_logprobs -= group->needs_logprobs;
  live.erase(live.find(group->id));
}

void Engine::State::take_pending(StepOutput* out) {
  std::lock_guard<std::mutex> lock(mutex);
  std::move(pending.begin(), pending.end(), std::back_inserter(out->outputs));
  pending.clear();
}

void Engine::State::refresh_snapshot() {
  totals.scheduler = scheduler.stats();
  std::lock_guard<std::mutex> lock(mutex);
  snapshot = totals;
  work_under_way = num_under_way > 0;
}

void Engine::State::record(std::ostream* log) {
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (next_id != 1) throw InvalidArgument("record() has to come before the first request");
  }
  scheduler.record(log);
}

void Engine::State::record(const std::string& path) {
  record(nullptr);  // it may be log_file that is written so far
  log_file = std::ofstream(path, std::ios::binary | std::ios::trunc);
  if (!log_file) {
    throw InvalidArgument("record(): cannot write " + path + ": " + std::strerror(errno));
  }
  log_file << std::unitbuf;  // the call that ends the process must not stay in the buffer
  record(&log_file);
}

namespace {

// Declared before the lock it follows, so that it acts once the lock is gone.
template <typename F>
struct OnExit {
  F f;
  ~OnExit() { f(); }
};
template <typename F>
OnExit(F) -> OnExit<F>;

}  // namespace

Engine::Engine(const EngineConfig& config, std::shared_ptr<ModelRunner> runner)
    : s_(std::make_unique<State>(config, std::move(runner))) {}
Engine::~Engine() = default;

RequestId Engine::add_request(Request request) { return s_->add(std::move(request)); }

bool Engine::abort(RequestId id) { return s_->abort(id, kAllSamples); }

bool Engine::abort(RequestId id, int32_t index) { return index >= 0 && s_->abort(id, index); }

StepOutput Engine::step() {
  StepOutput out;
  const OnExit help{[this] { s_->help(); }};
  std::lock_guard<std::mutex> lock(s_->step_mutex);
  s_->step(&out);
  return out;
}

bool Engine::has_unfinished() const {
  std::lock_guard<std::mutex> lock(s_->mutex);
  return s_->has_unfinished();
}

int64_t Engine::progress() const { return s_->runner->progress(); }

bool Engine::wait_for_work(double timeout_seconds) {
  constexpr double kLongest = 365 * 86400.0;  // what the clock can add without overflow
  const double timeout = timeout_seconds > 0 ? std::min(timeout_seconds, kLongest) : 0;
  std::unique_lock<std::mutex> lock(s_->mutex);
  s_->work.wait_for(lock, std::chrono::duration<double>(timeout),
                    [this] { return s_->woken || s_->has_unfinished(); });
  s_->woken = false;
  return s_->has_unfinished();
}

void Engine::wake() {
  std::lock_guard<std::mutex> lock(s_->mutex);
  s_->woken = true;
  s_->work.notify_all();
}

void Engine::record(std::ostream* log) {
  const OnExit help{[this] { s_->help(); }};
  std::lock_guard<std::mutex> lock(s_->step_mutex);
  s_->record(log);
}

void Engine::record(const std::string& path) {
  const OnExit help{[this] { s_->help(); }};
  std::lock_guard<std::mutex> lock(s_->step_mutex);
  s_->record(path);
}

bool Engine::reset_prefix_cache() {
  const OnExit help{[this] { s_->help(); }};
  std::lock_guard<std::mutex> lock(s_->step_mutex);
  return s_->scheduler.reset_prefix_cache();
}

EngineStats Engine::stats() const {
  std::lock_guard<std::mutex> lock(s_->mutex);
  EngineStats stats = s_->snapshot;
  s_->count_arriving(&stats.scheduler);
  return stats;
}

void Engine::check_integrity() const {
  const OnExit help{[this] { s_->help(); }};
  std::lock_guard<std::mutex> lock(s_->step_mutex);
  s_->scheduler.check_integrity();
}

const EngineConfig& Engine::config() const { return s_->config; }

}  // namespace fastpage
