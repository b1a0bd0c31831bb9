// The scheduler alone, from C++: the C++ side of scheduler.py, which says what S1, S2, S5 and
// `pool` are (scheduler_work.py). S1 comes once more with each feature that touches every step.
// Prints one figure a line, name and value.
//
//   scheduler_bench TRACE REPEATS      TRACE: lines of prompt and output lengths
#include "fastpage/scheduler.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <ostream>
#include <streambuf>
#include <string>
#include <vector>

namespace {

using namespace fastpage;

constexpr int32_t kBlockSize = 16;
constexpr int32_t kWarmUp = 24;
constexpr int32_t kSteps = 320;
constexpr int32_t kColdSteps = 48;
constexpr size_t kColdBytes = size_t{64} << 20;

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

double median_us(std::vector<int64_t> ns) {
  std::nth_element(ns.begin(), ns.begin() + ns.size() / 2, ns.end());
  return 1e-3 * static_cast<double>(ns[ns.size() / 2]);
}

// The lowest of all repeats, by name.
std::map<std::string, double> figures;

void record(const std::string& name, double value) {
  const auto [at, is_new] = figures.emplace(name, value);
  if (!is_new) at->second = std::min(at->second, value);
}

std::vector<TokenId> tokens(uint64_t stream, int32_t count) {
  std::vector<TokenId> out(count);
  for (int32_t i = 0; i < count; ++i) {  // splitmix64 (Steele, Lea, Flood 2014)
    uint64_t x = ((stream << 32) + i) * 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    out[i] = static_cast<TokenId>((x ^ (x >> 31)) % 32000);
  }
  return out;
}

SequenceRequest make_request(std::vector<TokenId> prompt, int32_t max_tokens) {
  SequenceRequest request;
  request.prompt_token_ids = std::move(prompt);
  request.params.temperature = 0;
  request.params.max_tokens = max_tokens;
  request.params.ignore_eos = true;
  return request;
}

SchedulerConfig make_config(int32_t num_blocks, int32_t max_num_seqs, int32_t max_tokens,
                            int32_t max_model_len) {
  SchedulerConfig config;
  config.num_blocks = num_blocks;
  config.block_size = kBlockSize;
  config.max_num_seqs = max_num_seqs;
  config.max_num_batched_tokens = max_tokens;
  config.max_model_len = max_model_len;
  config.hash_key_lo = 1;
  return config;
}

// Evicts what the scheduler has in the caches, as a model's forward pass would.
void stream_memory() {
  static std::vector<uint64_t> memory(kColdBytes / sizeof(uint64_t));
  for (uint64_t& word : memory) ++word;
}

// What a beam search gets for each row: `k` candidates, none of which ends it.
TokenLogprobs candidates(int32_t k, int64_t step, size_t row) {
  TokenLogprobs out;
  for (int32_t i = 0; i <= k; ++i) {
    out.token_ids.push_back(static_cast<TokenId>((step * 31 + i * 7) % 32000));
    out.logprobs.push_back(-0.1f * static_cast<float>(i) - 0.01f * static_cast<float>(row % 4));
  }
  return out;
}

// Runs steps and remembers what each took.
class Driver {
 public:
  explicit Driver(const SchedulerConfig& config) : scheduler(config) {}
  virtual ~Driver() = default;

  virtual void step(bool cold = false) {
    if (cold) stream_memory();
    const int64_t t0 = now_ns();
    const SchedulerOutput& step = scheduler.schedule();
    const int64_t t1 = now_ns();
    scheduler.prepare(step, &batch);
    const int64_t t2 = now_ns();
    sample(step);
    if (cold) stream_memory();
    const int64_t t3 = now_ns();
    scheduler.update(step, sampled, logprobs);
    const int64_t t4 = now_ns();
    note(t1 - t0, t2 - t1, t4 - t3);
    num_tokens += step.num_scheduled_tokens;
  }

  void run(int32_t num_steps, bool cold = false) {
    for (int32_t i = 0; i < num_steps; ++i) step(cold);
  }

  void forget() {
    for (auto* ns : {&schedule, &prepare, &update, &both}) ns->clear();
  }

  void record_medians(const std::string& name) const {
    record(name + "_us", median_us(both));
    record(name + "_schedule_us", median_us(schedule));
    record(name + "_prepare_us", median_us(prepare));
    record(name + "_update_us", median_us(update));
  }

  Scheduler scheduler;
  InputBatch batch;
  std::vector<TokenId> sampled;
  std::vector<TokenLogprobs> logprobs;  // empty but with beams
  std::vector<int64_t> schedule, prepare, update, both;
  int64_t num_tokens = 0;
  int32_t period = 32000;  // of the text that is sampled

 protected:
  void note(int64_t schedule_ns, int64_t prepare_ns, int64_t update_ns) {
    schedule.push_back(schedule_ns);
    prepare.push_back(prepare_ns);
    update.push_back(update_ns);
    both.push_back(schedule_ns + update_ns);
  }

  void sample(const SchedulerOutput& step) {
    sampled.clear();
    logprobs.clear();
    for (const SamplingRow& row : batch.sampling_rows) {
      sampled.push_back(static_cast<TokenId>(row.tokens.size() % period));
      if (row.params->beam_width > 0) {
        logprobs.push_back(candidates(row.params->logprobs, step.step_id, logprobs.size()));
      }
    }
  }
};

// Two steps under way: the next is scheduled and laid out before the results of one come.
class AsyncDriver : public Driver {
 public:
  using Driver::Driver;

  void step(bool) override {
    const int64_t t0 = now_ns();
    const SchedulerOutput& step = scheduler.schedule();
    const int64_t t1 = now_ns();
    if (!step.sequences.empty()) scheduler.prepare(step, &batch);
    const int64_t t2 = now_ns();
    const std::vector<TokenId> before = sampled;
    if (!step.sequences.empty()) {
      batch.resolve(before);
      sample(step);
    }
    const int64_t t3 = now_ns();
    if (previous_ != nullptr) scheduler.update(*previous_, before);
    const int64_t t4 = now_ns();
    note(t1 - t0, t2 - t1, t4 - t3);
    previous_ = step.sequences.empty() ? nullptr : &step;
    num_tokens += step.num_scheduled_tokens;
  }

 private:
  const SchedulerOutput* previous_ = nullptr;
};

void add_decoding(Driver* driver, int32_t num_seqs, int32_t base, int32_t num_steps,
                  int32_t n = 1) {
  for (int32_t i = 0; i < num_seqs / n; ++i) {
    SequenceRequest request =
        make_request(tokens(i, base + i * 7 % kBlockSize), kWarmUp + num_steps + 2);
    request.params.n = n;
    driver->scheduler.add_request(std::move(request));
  }
  driver->run(kWarmUp);
  driver->forget();
}

SchedulerConfig s1_config(int32_t num_seqs, int32_t num_steps) {
  const int32_t blocks_each = (1008 + kWarmUp + num_steps) / kBlockSize + 2;
  return make_config(num_seqs * blocks_each + 64, num_seqs, num_seqs * 1100, 2048);
}

void s1(int32_t num_seqs, bool cold) {
  const int32_t num_steps = cold ? kColdSteps : kSteps;
  Driver driver(s1_config(num_seqs, num_steps));
  add_decoding(&driver, num_seqs, 992, num_steps);
  driver.run(num_steps, cold);
  if (driver.batch.num_tokens() != num_seqs) throw Error("S1: not in a steady state");
  driver.record_medians("s1_" + std::to_string(num_seqs) + (cold ? "_cold" : ""));
}

constexpr int32_t kFeatureSeqs = 256;

void s1_with(const std::string& feature, Driver* driver, int32_t n = 1) {
  add_decoding(driver, kFeatureSeqs, 992, kSteps, n);
  driver->run(kSteps);
  if (driver->batch.num_seqs != kFeatureSeqs) throw Error(feature + ": not in a steady state");
  driver->record_medians("s1_256_" + feature);
}

void s1_async() {
  SchedulerConfig config = s1_config(kFeatureSeqs, kSteps);
  config.max_steps_in_flight = 2;
  AsyncDriver driver(config);
  s1_with("async", &driver);
}

// What is looked for is never found: the whole text is searched each time.
void s1_speculation_in_vain() {
  SchedulerConfig config = s1_config(kFeatureSeqs, kSteps);
  config.num_speculative_tokens = 4;
  Driver driver(config);
  s1_with("speculation_in_vain", &driver);
  if (driver.scheduler.stats().num_draft_tokens > 0) throw Error("speculation: it found something");
}

// A text that repeats itself: 4 of 4 proposed tokens are accepted, so that a step is 5 tokens.
void s1_speculation() {
  SchedulerConfig config = s1_config(kFeatureSeqs, 5 * kColdSteps);
  config.num_speculative_tokens = 4;
  Driver driver(config);
  driver.period = 16;
  for (int32_t i = 0; i < kFeatureSeqs; ++i) {
    driver.scheduler.add_request(make_request(tokens(i, 992), 5 * kColdSteps));
  }
  driver.run(kWarmUp);
  driver.forget();
  driver.run(kColdSteps / 2);
  const SchedulerStats stats = driver.scheduler.stats();
  if (driver.batch.num_tokens() != 5 * kFeatureSeqs) throw Error("speculation: not steady");
  driver.record_medians("s1_256_speculation");
  record("s1_256_speculation_accepted", static_cast<double>(stats.num_accepted_tokens) /
                                            static_cast<double>(stats.num_draft_tokens));
}

void s1_samples() {
  Driver driver(s1_config(kFeatureSeqs, kSteps));
  s1_with("n4", &driver, 4);
}

void s1_host_tier() {
  SchedulerConfig config = s1_config(kFeatureSeqs, kSteps);
  config.num_host_blocks = config.num_blocks;
  Driver driver(config);
  s1_with("host_tier", &driver);
}

// Takes everything and keeps nothing.
class CountingBuffer : public std::streambuf {
 public:
  int64_t num_bytes = 0;

 protected:
  std::streamsize xsputn(const char*, std::streamsize size) override {
    num_bytes += size;
    return size;
  }
  int overflow(int byte) override {
    ++num_bytes;
    return byte;
  }
};

void s1_recorded() {
  CountingBuffer buffer;
  std::ostream log(&buffer);
  Driver driver(s1_config(kFeatureSeqs, kSteps));
  driver.scheduler.record(&log);
  add_decoding(&driver, kFeatureSeqs, 992, kSteps);
  const int64_t before = buffer.num_bytes;
  driver.run(kSteps);
  driver.record_medians("s1_256_recorded");
  record("recorded_bytes_a_step", static_cast<double>(buffer.num_bytes - before) / kSteps);
  driver.scheduler.record(nullptr);
}

// A sample more of sequences of about 1,000 tokens; then the step that copies the blocks which both
// would write.
void fork() {
  constexpr int32_t kForks = 128;
  Driver driver(s1_config(2 * kForks, kSteps));
  std::vector<RequestId> ids;
  for (int32_t i = 0; i < kForks; ++i) {
    ids.push_back(driver.scheduler.add_request(make_request(tokens(i, 1000), kSteps)));
  }
  driver.run(4);
  const int64_t began = now_ns();
  for (const RequestId id : ids) driver.scheduler.fork(id, 0, id);
  record("fork_us", 1e-3 * static_cast<double>(now_ns() - began) / kForks);
  driver.forget();
  driver.step();
  record("fork_first_step_us", median_us(driver.both));
}

// 8 searches of 4 beams, about 1,000 tokens each.
void beams() {
  constexpr int32_t kGroups = 8, kWidth = 4;
  Driver driver(s1_config(kGroups * kWidth, kSteps));
  for (int32_t i = 0; i < kGroups; ++i) {
    SequenceRequest request = make_request(tokens(i, 992 + i), kWarmUp + kSteps + 2);
    request.params.beam_width = kWidth;
    driver.scheduler.add_request(std::move(request));
  }
  driver.run(kWarmUp);
  driver.forget();
  driver.run(kSteps);
  if (driver.batch.num_seqs != kGroups * kWidth) throw Error("beams: not in a steady state");
  driver.record_medians("beams_8x4");
}

void s2() {
  constexpr int32_t kRequests = 1000, kTokens = 1000;
  Driver driver(make_config(kRequests * (kTokens / kBlockSize + 2) + 1000, kRequests,
                            kRequests * kTokens, 2048));
  std::vector<std::vector<TokenId>> prompts;
  for (int32_t i = 0; i < kRequests; ++i) prompts.push_back(tokens(100000 + i, kTokens));
  const int64_t began = now_ns();
  for (const auto& prompt : prompts) driver.scheduler.add_request(make_request(prompt, 64));
  const double add = 1e-3 * static_cast<double>(now_ns() - began) / kRequests;
  driver.step();
  if (driver.num_tokens != kRequests * kTokens) throw Error("S2: not all of it in one step");
  const double schedule = 1e-3 * static_cast<double>(driver.schedule[0]) / kRequests;
  const double update = 1e-3 * static_cast<double>(driver.update[0]) / kRequests;
  record("s2_us", add + schedule);
  record("s2_add_us", add);
  record("s2_schedule_us", schedule);
  record("s2_update_us", update);
  record("s2_with_update_us", add + schedule + update);
}

void s5(const std::vector<std::pair<int32_t, int32_t>>& trace) {
  Driver driver(make_config(8192, 256, 2048, 4096));
  std::vector<SequenceRequest> requests;
  for (size_t i = 0; i < trace.size(); ++i) {
    requests.push_back(make_request(tokens(300000 + i, trace[i].first), trace[i].second));
  }
  const int64_t began = now_ns();
  for (SequenceRequest& request : requests) driver.scheduler.add_request(std::move(request));
  const int64_t add = now_ns() - began;
  double waste = 0;
  SchedulerStats before;
  while (driver.scheduler.has_unfinished()) {
    driver.step();
    const SchedulerStats after = driver.scheduler.stats();
    const int64_t allocated = after.kv_slots_allocated - before.kv_slots_allocated;
    const int64_t used = after.kv_slots_used - before.kv_slots_used;
    waste += static_cast<double>(allocated - used) / static_cast<double>(allocated);
    before = after;
  }
  const auto seconds = [](const std::vector<int64_t>& ns) {
    int64_t sum = 0;
    for (int64_t each : ns) sum += each;
    return 1e-9 * static_cast<double>(sum);
  };
  const double num_steps = static_cast<double>(driver.both.size());
  record("s5_total_s", seconds(driver.both));
  record("s5_add_s", 1e-9 * static_cast<double>(add));
  record("s5_prepare_s", seconds(driver.prepare));
  record("s5_steps", num_steps);
  record("s5_preemptions", static_cast<double>(before.num_preemptions));
  record("s5_tokens", static_cast<double>(driver.num_tokens));
  record("s5_kv_waste", waste / num_steps);
}

void pool(int32_t num_blocks, bool cold) {
  constexpr int32_t kSeqs = 32, kPrompt = 240, kFill = 992, kPoolSteps = 160;
  const int32_t num_steps = cold ? kColdSteps : kPoolSteps;
  Driver driver(make_config(num_blocks, kSeqs, kSeqs * 1000, 1024));
  for (int32_t i = 0; i <= num_blocks / (kFill / kBlockSize); ++i) {
    driver.scheduler.add_request(make_request(tokens(400000 + i, kFill), 1));
  }
  while (driver.scheduler.has_unfinished()) driver.step();
  add_decoding(&driver, kSeqs, kPrompt, num_steps);
  driver.run(num_steps, cold);
  if (driver.scheduler.stats().num_preemptions > 0) throw Error("pool: preempted");
  record("pool_" + std::to_string(num_blocks) + (cold ? "_cold_us" : "_us"),
         median_us(driver.both));
}

void measure(const std::vector<std::pair<int32_t, int32_t>>& trace, int repeats) {
  for (int repeat = 0; repeat < repeats; ++repeat) {
    for (int32_t num_seqs : {16, 64, 256, 1024}) {
      s1(num_seqs, /*cold=*/false);
      s1(num_seqs, /*cold=*/true);
    }
    s1_async();
    s1_speculation_in_vain();
    s1_speculation();
    s1_samples();
    s1_host_tier();
    s1_recorded();
    fork();
    beams();
    s2();
    s5(trace);
    for (int32_t num_blocks : {1000, 10000, 100000, 1000000}) {
      pool(num_blocks, /*cold=*/false);
      pool(num_blocks, /*cold=*/true);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int repeats = argc == 3 ? std::atoi(argv[2]) : 0;
  if (repeats < 1) {
    std::fprintf(stderr, "usage: scheduler_bench TRACE REPEATS\n");
    return 2;
  }
  std::ifstream file(argv[1]);
  std::vector<std::pair<int32_t, int32_t>> trace;
  for (std::pair<int32_t, int32_t> each; file >> each.first >> each.second;) trace.push_back(each);
  if (trace.empty()) {
    std::fprintf(stderr, "error: %s holds no requests\n", argv[1]);
    return 1;
  }
  try {
    measure(trace, repeats);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  for (const auto& [name, value] : figures) std::printf("%s %.9g\n", name.c_str(), value);
}
