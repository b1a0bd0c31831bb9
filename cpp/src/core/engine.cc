#include "fastpage/engine.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <random>
#include <unordered_map>

#include "core/admission.h"

namespace fastpage {

namespace {

using Clock = std::chrono::steady_clock;

// SplitMix64's output function (Steele et al., OOPSLA 2014): neighbours in, strangers out.
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

uint64_t random_word() {
  static std::mutex mutex;
  static std::random_device device;
  std::lock_guard<std::mutex> lock(mutex);
  return static_cast<uint64_t>(device()) << 32 | device();
}

EngineConfig resolved(EngineConfig config) {
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

struct Sample;

// One request of a caller: n samples of one prompt.
struct Group {
  RequestId id;
  int32_t num_prompt_tokens;
  bool abort_asked = false;
  int32_t num_unfinished;
  std::vector<Sample> samples;
};

// One sequence of the scheduler, whose tag points here.
struct Sample {
  Group* group;
  int32_t index;
  RequestId seq_id = 0;   // the scheduler's
  bool finished = false;  // set with both locks held: either will do to read it
  int32_t num_output_tokens = 0;
  int32_t num_cached_tokens = 0;
};

Sample* sample_of(uint64_t tag) { return reinterpret_cast<Sample*>(tag); }

constexpr int32_t kAllSamples = -1;

// A call of abort() that waits for the step to end.
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

}  // namespace

// Two locks. step_mutex: held for a whole step, guards the scheduler and what belongs to steps.
// mutex: held for moments only, guards what callers of other threads see. Calls that arrive during
// a step are queued, and applied by whoever gives up step_mutex (help()).
struct Engine::State {
  State(const EngineConfig& c, std::shared_ptr<ModelRunner> r)
      : config(resolved(c)), runner(std::move(r)), scheduler(config.scheduler) {
    if (runner == nullptr) throw InvalidArgument("Engine: the model runner is null");
    snapshot.scheduler = scheduler.stats();
  }

  RequestId add(Request request);
  bool abort(RequestId id, int32_t index);
  void step(StepOutput* out);
  void help() noexcept;
  bool has_unfinished() const { return !live.empty() || !pending.empty(); }

  // With step_mutex held.
  void drain();
  Group* find(RequestId id);  // null once finished; only step_mutex's holder ends a request
  void admit(Arrival* arrival);
  void abort_group(Group* group, int32_t index = kAllSamples);
  void fail(const SchedulerOutput& step);
  void check(const ModelRunnerOutput& result) const;
  void collect(const std::vector<SequenceUpdate>& updates, const ModelRunnerOutput& result,
               StepOutput* out);
  RequestOutput news_of(const Sample& sample, FinishReason reason) const;
  void finish(Sample* sample);
  void take_pending(StepOutput* out);
  void refresh_snapshot();

  const EngineConfig config;
  const std::shared_ptr<ModelRunner> runner;

  std::mutex step_mutex;
  Scheduler scheduler;
  InputBatch batch;
  EngineStats totals;

  mutable std::mutex mutex;
  std::condition_variable work;
  std::unordered_map<RequestId, std::unique_ptr<Group>> live;
  std::vector<Arrival> arrivals;
  std::vector<Abort> aborts;
  std::vector<RequestOutput> pending;  // for the next StepOutput
  int64_t num_arriving = 0;            // samples among the arrivals
  RequestId next_id = 1;
  bool woken = false;
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
  const int32_t n = request.params.n;
  auto group = std::make_unique<Group>();
  group->num_prompt_tokens = static_cast<int32_t>(request.prompt_token_ids.size());
  group->num_unfinished = n;
  group->samples.resize(n);
  for (int32_t i = 0; i < n; ++i) {
    group->samples[i].group = group.get();
    group->samples[i].index = i;
  }

  std::lock_guard<std::mutex> lock(mutex);
  check_queue(config.scheduler, snapshot.scheduler.num_waiting + num_arriving, n);
  const RequestId id = next_id++;
  group->id = id;
  const uint64_t seed = request.params.seed.value_or(mix(config.seed ^ mix(id)));
  arrivals.push_back({group.get(), std::move(request), seed});
  live.emplace(id, std::move(group));
  num_arriving += n;
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
    drain();
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
    snapshot.scheduler.num_waiting += static_cast<int32_t>(num_arriving);
    num_arriving = 0;
  }
  for (Arrival& arrival : new_arrivals) {
    try {
      admit(&arrival);
    } catch (...) {  // memory ran out: that costs this request alone
      abort_group(arrival.group);
    }
  }
  for (const Abort& abort : new_aborts) {
    if (Group* group = find(abort.id)) abort_group(group, abort.index);
  }
}

void Engine::State::admit(Arrival* arrival) {
  Request& request = arrival->request;
  std::vector<Sample>& samples = arrival->group->samples;
  for (size_t i = 0; i < samples.size(); ++i) {
    SequenceRequest seq;
    seq.params = request.params;
    if (i > 0) seq.params.prompt_logprobs = SamplingParams::kNoLogprobs;
    seq.prompt_token_ids =
        i + 1 < samples.size() ? request.prompt_token_ids : std::move(request.prompt_token_ids);
    seq.seed = i == 0 ? arrival->seed : mix(arrival->seed + i);
    seq.priority = request.priority;
    seq.cache_salt = request.cache_salt;
    seq.tag = reinterpret_cast<uint64_t>(&samples[i]);
    samples[i].seq_id = scheduler.add_request(std::move(seq));
  }
}

void Engine::State::abort_group(Group* group, int32_t index) {
  std::vector<RequestOutput> news;
  std::vector<Sample*> ended;
  for (Sample& sample : group->samples) {
    if (sample.finished || (index != kAllSamples && sample.index != index)) continue;
    scheduler.abort(sample.seq_id);
    news.push_back(news_of(sample, FinishReason::kAbort));
    ended.push_back(&sample);
  }
  {
    std::lock_guard<std::mutex> lock(mutex);
    std::move(news.begin(), news.end(), std::back_inserter(pending));
    work.notify_all();
  }
  for (Sample* sample : ended) finish(sample);  // the last one takes the group with it
}

Group* Engine::State::find(RequestId id) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto it = live.find(id);
  return it == live.end() ? nullptr : it->second.get();
}

void Engine::State::step(StepOutput* out) {
  drain();
  const Clock::time_point start = Clock::now();
  const SchedulerOutput& step = scheduler.schedule();
  refresh_snapshot();  // whoever was just admitted waits no longer
  if (step.sequences.empty()) {
    take_pending(out);
    return;
  }
  try {
    scheduler.prepare(step, &batch);
    const Clock::time_point prepared = Clock::now();
    runner->execute(batch);
    const ModelRunnerOutput& result = runner->wait(step.step_id);
    const Clock::time_point computed = Clock::now();
    check(result);
    drain();
    collect(scheduler.update(step, result.sampled_token_ids), result, out);
    totals.model_seconds += seconds(computed - prepared);
    totals.schedule_seconds += seconds(prepared - start) + seconds(Clock::now() - computed);
  } catch (...) {
    fail(step);
    refresh_snapshot();
    throw;
  }
  out->step_id = step.step_id;
  out->num_tokens = step.num_scheduled_tokens;
  ++totals.num_steps;
  totals.num_computed_tokens += step.num_scheduled_tokens;
  take_pending(out);
  refresh_snapshot();
}

void Engine::State::fail(const SchedulerOutput& step) {
  for (const ScheduledSequence& scheduled : step.sequences) {
    // False: aborted already, by a caller or with its group; the tag points nowhere then.
    if (scheduler.abort(scheduled.id)) abort_group(sample_of(scheduled.tag)->group);
  }
}

// What a runner gets wrong must not become an index into something.
void Engine::State::check(const ModelRunnerOutput& result) const {
  const auto require = [](const char* what, size_t size, size_t wanted) {
    if (size == wanted) return;
    throw Error("the model runner returned " + std::to_string(size) + " " + what + ", not " +
                std::to_string(wanted));
  };
  require("sampled_token_ids", result.sampled_token_ids.size(), batch.sampling_rows.size());
  require("prompt_logprobs", result.prompt_logprobs.size(), batch.prompt_logprob_rows.size());
  if (!result.logprobs.empty()) {
    require("logprobs", result.logprobs.size(), batch.sampling_rows.size());
  }
  for (const TokenId id : result.sampled_token_ids) {
    if (id < 0 || id >= config.vocab_size) {
      throw Error("the model runner returned token " + std::to_string(id) + ", not in [0, " +
                  std::to_string(config.vocab_size) + ")");
    }
  }
}

void Engine::State::collect(const std::vector<SequenceUpdate>& updates,
                            const ModelRunnerOutput& result, StepOutput* out) {
  const std::vector<PromptLogprobRow>& prompt_rows = batch.prompt_logprob_rows;
  size_t prompt_row = 0;  // both ascend in seq
  for (const SequenceUpdate& update : updates) {
    while (prompt_row < prompt_rows.size() && prompt_rows[prompt_row].seq < update.seq) {
      ++prompt_row;
    }
    const bool has_prompt_logprobs =
        prompt_row < prompt_rows.size() && prompt_rows[prompt_row].seq == update.seq;
    Sample* sample = sample_of(update.tag);
    sample->num_output_tokens = update.num_output_tokens;
    sample->num_cached_tokens = update.num_cached_tokens;
    if (!update.has_new_token && !has_prompt_logprobs) continue;

    RequestOutput news = news_of(*sample, update.finish_reason);
    news.stop_token_id = update.stop_token_id;
    if (update.has_new_token) {
      ++totals.num_generated_tokens;
      news.new_token_ids.push_back(update.new_token_id);
      // (The row's params may be gone by now, with the sequence.)
      if (!result.logprobs.empty() && !result.logprobs[update.sampling_row].token_ids.empty()) {
        news.logprobs.push_back(result.logprobs[update.sampling_row]);
      }
    }
    for (; prompt_row < prompt_rows.size() && prompt_rows[prompt_row].seq == update.seq;
         ++prompt_row) {
      news.prompt_logprobs.push_back(result.prompt_logprobs[prompt_row]);
    }
    out->outputs.push_back(std::move(news));
    if (update.finish_reason != FinishReason::kNone) finish(sample);
  }
}

RequestOutput Engine::State::news_of(const Sample& sample, FinishReason reason) const {
  RequestOutput news;
  news.request_id = sample.group->id;
  news.index = sample.index;
  news.finish_reason = reason;
  news.num_prompt_tokens = sample.group->num_prompt_tokens;
  news.num_output_tokens = sample.num_output_tokens;
  news.num_cached_tokens = sample.num_cached_tokens;
  return news;
}

void Engine::State::finish(Sample* sample) {
  std::lock_guard<std::mutex> lock(mutex);
  sample->finished = true;
  Group* group = sample->group;
  if (--group->num_unfinished == 0) live.erase(live.find(group->id));
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

bool Engine::reset_prefix_cache() {
  const OnExit help{[this] { s_->help(); }};
  std::lock_guard<std::mutex> lock(s_->step_mutex);
  return s_->scheduler.reset_prefix_cache();
}

EngineStats Engine::stats() const {
  std::lock_guard<std::mutex> lock(s_->mutex);
  EngineStats stats = s_->snapshot;
  stats.scheduler.num_waiting += static_cast<int32_t>(s_->num_arriving);
  return stats;
}

void Engine::check_integrity() const {
  const OnExit help{[this] { s_->help(); }};
  std::lock_guard<std::mutex> lock(s_->step_mutex);
  s_->scheduler.check_integrity();
}

const EngineConfig& Engine::config() const { return s_->config; }

}  // namespace fastpage
