// A log of random calls, with every feature on, gives the same steps again; a log that was tampered
// with, cut off or damaged does not, and crashes nothing.
#include "fastpage/replay.h"

#include <gtest/gtest.h>

#include <deque>
#include <random>
#include <set>
#include <sstream>

#include "core/call_log.h"
#include "fastpage/scheduler.h"

namespace fastpage {
namespace {

constexpr int32_t kVocabSize = 12;  // so that a token is one byte of the log

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int32_t between(int32_t low, int32_t high) {
    return low + static_cast<int32_t>(engine_() % (static_cast<uint64_t>(high) - low + 1));
  }
  bool one_in(int32_t n) { return between(1, n) == 1; }
  template <typename T>
  T of(std::initializer_list<T> values) {
    return values.begin()[between(0, static_cast<int32_t>(values.size()) - 1)];
  }
  uint64_t word() { return engine_(); }

 private:
  std::mt19937_64 engine_;
};

// Repeats itself, so that prompt lookup proposes what comes; needs no token of a step under way.
TokenId next_token(const SamplingRow& row) {
  return static_cast<TokenId>((row.seed % 5 + row.tokens.size()) % 5);
}

TokenLogprobs beam_candidates(const SamplingRow& row) {
  TokenLogprobs out;
  const int32_t k = std::max(0, row.params->logprobs);
  for (int32_t i = 0; i <= k; ++i) {
    const uint64_t token = (row.tokens.size() * 7 + static_cast<uint64_t>(i) * 5) % kVocabSize;
    out.token_ids.push_back(static_cast<TokenId>(token));
    out.logprobs.push_back(-0.25f * static_cast<float>(i + 1) -
                           0.125f * static_cast<float>(row.tokens.size() % 3));
  }
  out.rank = 1;
  return out;
}

// Makes calls at random and writes the log of them.
class Driver {
 public:
  Driver(const SchedulerConfig& config, uint64_t seed) : random_(seed), scheduler_(config) {
    scheduler_.record(&log);
    boundary();
  }

  void run(int32_t num_operations) {
    for (int32_t i = 0; i < num_operations; ++i) one_operation();
    while (!under_way_.empty()) finish_step();
    scheduler_.record(nullptr);
  }

  std::ostringstream log;
  std::set<size_t> boundaries;                      // where a call's record ends
  std::vector<std::pair<size_t, int64_t>> updates;  // where one with a token begins; its step
  int64_t num_calls = 0;
  int64_t num_refused = 0;
  SchedulerStats stats() const { return scheduler_.stats(); }

 private:
  struct StepUnderWay {
    const SchedulerOutput* step;
    std::unique_ptr<InputBatch> batch;
    std::vector<TokenId> sampled;
    std::vector<TokenLogprobs> logprobs;
  };

  void boundary() { boundaries.insert(log.str().size()); }

  template <typename Run>
  void call(Run run) {
    try {
      run();
    } catch (const Error&) {
      ++num_refused;
    }
    ++num_calls;
    boundary();
  }

  void one_operation() {
    const int32_t dice = random_.between(0, 99);
    if (dice < 25) {
      add();
    } else if (dice < 29) {
      call([&] { scheduler_.abort(some_id()); });
    } else if (dice < 32) {
      call([&] { scheduler_.abort(some_id(), random_.between(0, 2)); });
    } else if (dice < 37) {
      call([&] {
        const RequestId id = some_id();
        scheduler_.fork(id, random_.between(0, 1), random_.word());
      });
    } else if (dice < 42) {
      const std::vector<TokenId> proposal = {1, 2, 3};
      call([&] { scheduler_.propose(some_id(), 0, proposal); });
    } else if (dice < 44) {
      call([&] { scheduler_.reset_prefix_cache(); });
    } else if (dice < 48) {
      call([&] { scheduler_.take_kv_events(&events_); });
    } else if (dice < 51 && !under_way_.empty()) {
      call([&] { scheduler_.discard(*under_way_.front().step); });
      under_way_.clear();
    } else if (static_cast<int32_t>(under_way_.size()) < scheduler_.config().max_steps_in_flight) {
      begin_step();
    } else {
      finish_step();
    }
  }

  RequestId some_id() {
    if (ids_.empty()) return 17;
    return ids_[random_.between(std::max(0, static_cast<int32_t>(ids_.size()) - 12),
                                static_cast<int32_t>(ids_.size()) - 1)];
  }

  void add() {
    SequenceRequest request;
    const int32_t length = random_.between(0, 40);
    const int32_t line = random_.between(0, 1);
    for (int32_t i = 0; i < length; ++i) request.prompt_token_ids.push_back((line + i) % 5);
    SamplingParams& params = request.params;
    params.max_tokens = random_.one_in(6) ? -1 : random_.between(1, 30);
    params.temperature = random_.of({0.0f, 1.0f});
    params.ignore_eos = random_.one_in(2);
    if (random_.one_in(5)) {
      params.beam_width = random_.between(2, 3);
      params.n = random_.between(1, params.beam_width);
    } else if (random_.one_in(3)) {
      params.n = random_.between(2, 3);
      params.best_of = random_.of({0, 4});
    }
    if (random_.one_in(4)) params.stop_token_ids = {3};
    if (random_.one_in(6)) params.prompt_logprobs = 1;
    if (random_.one_in(6)) params.seed = random_.word();
    request.seed = random_.word();
    request.priority = random_.between(-2, 2);
    request.tag = random_.word();
    if (random_.one_in(5)) request.cache_salt = "tenant";
    call([&] { ids_.push_back(scheduler_.add_request(request)); });
  }

  void begin_step() {
    const SchedulerOutput* step = nullptr;
    call([&] { step = &scheduler_.schedule(); });
    if (step == nullptr || step->sequences.empty()) return;
    if (random_.one_in(20)) call([&] { scheduler_.abort(some_id()); });
    bool prepared = false;
    auto batch = std::make_unique<InputBatch>();
    call([&] {
      scheduler_.prepare(*step, batch.get());
      prepared = true;
    });
    if (!prepared) {  // aborted just now
      call([&] { scheduler_.discard(*step); });
      return;
    }
    StepUnderWay next{step, std::move(batch), {}, {}};
    for (const SamplingRow& row : next.batch->sampling_rows) {
      next.sampled.push_back(next_token(row));
      next.logprobs.push_back(beam_candidates(row));
    }
    under_way_.push_back(std::move(next));
  }

  void finish_step() {
    if (random_.one_in(50)) {
      const std::vector<TokenId> wrong(99, 1);
      call([&] { scheduler_.update(*under_way_.front().step, wrong); });
    }
    const StepUnderWay done = std::move(under_way_.front());
    under_way_.pop_front();
    // The runner of the next step may be faster or slower than we are.
    const bool runner_is_faster = random_.one_in(2);
    if (runner_is_faster) begin_next(done.sampled);
    const size_t begin = log.str().size();
    size_t num_updated = 0;
    call([&] { num_updated = scheduler_.update(*done.step, done.sampled, done.logprobs).size(); });
    if (!runner_is_faster) begin_next(done.sampled);
    if (!done.sampled.empty() && num_updated == done.step->sequences.size()) {
      updates.emplace_back(begin, done.step->step_id);
    }
  }

  void begin_next(const std::vector<TokenId>& sampled) {
    if (!under_way_.empty()) under_way_.front().batch->resolve(sampled);
  }

  Random random_;
  Scheduler scheduler_;
  std::deque<StepUnderWay> under_way_;
  std::vector<RequestId> ids_;
  std::vector<KvEvent> events_;
};

SchedulerConfig random_config(uint64_t seed) {
  Random random(seed);
  SchedulerConfig config;
  config.block_size = random.of({1, 4, 16});
  config.max_model_len = 64;
  config.num_blocks = random.between(64 / config.block_size + 2, 64 / config.block_size * 5);
  config.num_host_blocks = random.of({0, 8, 64});
  config.max_num_seqs = random.between(4, 8);
  config.max_num_batched_tokens = random.of({8, 32, 200});
  config.long_prefill_token_threshold = random.of({0, 6});
  config.max_num_partial_prefills = random.of({0, 1});
  config.max_num_waiting = random.of({8, 1000});
  config.max_num_waiting_tokens = random.of({0, 100});
  config.policy = random.of({SchedulingPolicy::kFcfs, SchedulingPolicy::kPriority});
  config.max_steps_in_flight = random.of({1, 2});
  config.num_speculative_tokens = random.of({0, 3});
  config.enable_kv_events = random.one_in(2);
  config.enable_prefix_caching = !random.one_in(4);
  config.hash_key_lo = random.word();
  config.eos_token_ids = {4};
  return config;
}

SchedulerConfig everything_on() {
  SchedulerConfig config;
  config.block_size = 4;
  config.max_model_len = 64;
  config.num_blocks = 40;
  config.num_host_blocks = 64;
  config.swap_cost_per_block = 0.5f;
  config.max_num_seqs = 8;
  config.max_num_batched_tokens = 24;
  config.long_prefill_token_threshold = 12;
  config.max_num_partial_prefills = 2;
  config.policy = SchedulingPolicy::kPriority;
  config.max_steps_in_flight = 2;
  config.num_speculative_tokens = 3;
  config.enable_kv_events = true;
  config.hash_key_lo = 3;
  config.eos_token_ids = {4};
  return config;
}

ReplayResult replay_text(const std::string& text) {
  std::istringstream log(text);
  return replay(log);
}

void expect_same(const Driver& driver) {
  const ReplayResult result = replay_text(driver.log.str());
  ASSERT_EQ(result.divergence, "");
  ASSERT_TRUE(result.complete);
  ASSERT_EQ(result.num_calls, driver.num_calls);
}

TEST(Replay, RandomCallsGiveTheSameSteps) {
  for (uint64_t seed = 1; seed <= 200; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Driver driver(random_config(seed), seed);
    driver.run(200);
    expect_same(driver);
    if (HasFatalFailure()) return;
  }
}

TEST(Replay, EveryFeatureTakesPart) {
  SchedulerStats sum;
  int64_t num_refused = 0;
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    Driver driver(everything_on(), seed);
    driver.run(400);
    expect_same(driver);
    const SchedulerStats stats = driver.stats();
    sum.num_preemptions += stats.num_preemptions;
    sum.num_blocks_swapped_out += stats.num_blocks_swapped_out;
    sum.num_blocks_swapped_in += stats.num_blocks_swapped_in;
    sum.num_blocks_copied += stats.num_blocks_copied;
    sum.num_accepted_tokens += stats.num_accepted_tokens;
    sum.prefix_cache_hits += stats.prefix_cache_hits;
    num_refused += driver.num_refused;
  }
  EXPECT_GT(sum.num_preemptions, 0);
  EXPECT_GT(sum.num_blocks_swapped_out, 0);
  EXPECT_GT(sum.num_blocks_swapped_in, 0);
  EXPECT_GT(sum.num_blocks_copied, 0);
  EXPECT_GT(sum.num_accepted_tokens, 0);
  EXPECT_GT(sum.prefix_cache_hits, 0);
  EXPECT_GT(num_refused, 0);
}

TEST(Replay, ATokenThatWasTamperedWithIsFound) {
  Driver driver(everything_on(), 5);
  driver.run(600);
  size_t num_found = 0;
  for (const auto& [begin, step_id] : driver.updates) {
    std::string log = driver.log.str();
    const size_t first_token = begin + 3;  // after the kind, the step, and how many
    ASSERT_LT(log[first_token], kVocabSize);
    log[first_token] ^= 1;
    const ReplayResult result = replay_text(log);
    const std::string where = "step " + std::to_string(step_id);
    // A beam search goes by its candidates alone.
    if (result.divergence.empty()) continue;
    EXPECT_NE(result.divergence.find(where), std::string::npos) << result.divergence;
    EXPECT_NE(result.divergence.find("update"), std::string::npos) << result.divergence;
    ++num_found;
  }
  EXPECT_GT(num_found, 10u);
}

TEST(Replay, ALogThatIsCutOffIsRunAsFarAsItGoes) {
  Driver driver(everything_on(), 6);
  driver.run(60);
  const std::string log = driver.log.str();
  const size_t header = *driver.boundaries.begin();
  for (size_t size = 0; size < log.size(); ++size) {
    if (size < header) {
      EXPECT_THROW(replay_text(log.substr(0, size)), InvalidArgument);
      continue;
    }
    const ReplayResult result = replay_text(log.substr(0, size));
    ASSERT_EQ(result.divergence, "") << "cut at byte " << size;
    ASSERT_EQ(result.complete, driver.boundaries.count(size) == 1) << "cut at byte " << size;
  }
}

// --gtest_shuffle --gtest_repeat=N brings other damage each time.
TEST(Replay, DamageDoesNotCrashIt) {
  Random random(1000 + testing::UnitTest::GetInstance()->random_seed());
  int32_t num_refused = 0;
  int32_t num_diverged = 0;
  for (int32_t source = 0; source < 20; ++source) {
    Driver driver(random_config(random.word()), random.word());
    driver.run(random.between(5, 120));
    const std::string whole = driver.log.str();
    for (int32_t i = 0; i < 100; ++i) {
      std::string log = whole;
      for (int32_t flips = random.between(1, 3); flips > 0; --flips) {
        const int32_t at = random.between(0, static_cast<int32_t>(log.size()) - 1);
        log[at] = static_cast<char>(random.one_in(2) ? random.between(0, 255)
                                                     : log[at] ^ (1 << random.between(0, 7)));
      }
      try {
        num_diverged += !replay_text(log).divergence.empty();
      } catch (const InvalidArgument&) {
        ++num_refused;
      }
    }
  }
  EXPECT_GT(num_refused, 0);
  EXPECT_GT(num_diverged, 0);
}

std::string message_of(const std::string& log) {
  try {
    replay_text(log);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(Replay, WhatIsNoLogIsRefused) {
  EXPECT_NE(message_of("").find("ends within its header"), std::string::npos);
  EXPECT_EQ(message_of("#!/bin/sh and more"), "not a log of Scheduler::record()");

  Driver driver(everything_on(), 7);
  std::string log = driver.log.str();
  log[sizeof kLogMagic - 1] = 99;
  EXPECT_EQ(message_of(log),
            "the log is of version 99: this library reads version " + std::to_string(kLogVersion));

  log = driver.log.str();
  log[sizeof kLogMagic + 4] ^= 2;
  EXPECT_NE(message_of(log).find("checksum"), std::string::npos);
}

TEST(Replay, ASchedulerThatWouldTakeAllMemoryIsRefused) {
  SchedulerConfig config;
  config.num_blocks = 1 << 27;
  config.block_size = 1;
  LogWriter log;
  log.raw(kLogMagic, sizeof kLogMagic - 1);
  log.fixed32(kLogVersion);
  log(config);
  log(check_of(config));
  std::istringstream stream(log.bytes());
  EXPECT_THROW(replay(stream), ResourceExhausted);
}

TEST(Replay, RecordingFromTheMiddleIsRefused) {
  std::ostringstream log;
  Scheduler has_stepped(everything_on());
  has_stepped.schedule();
  EXPECT_THROW(has_stepped.record(&log), InvalidArgument);
  Scheduler has_request(everything_on());
  SequenceRequest request;
  request.prompt_token_ids = {1};
  has_request.add_request(request);
  EXPECT_THROW(has_request.record(&log), InvalidArgument);
  has_request.record(nullptr);
  EXPECT_EQ(log.str(), "");
}

// Takes so many bytes and no more.
class FullDisk : public std::stringbuf {
 public:
  explicit FullDisk(std::streamsize room) : room_(room) {}
  std::streamsize xsputn(const char* data, std::streamsize size) override {
    if (size > room_) return 0;
    room_ -= size;
    return std::stringbuf::xsputn(data, size);
  }

 private:
  std::streamsize room_;
};

TEST(Replay, AFullDiskEndsTheRecordingAndNothingElse) {
  for (const bool throws : {false, true}) {
    FullDisk disk(400);
    std::ostream log(&disk);
    if (throws) log.exceptions(std::ios::badbit | std::ios::failbit);
    Scheduler scheduler(everything_on());
    scheduler.record(&log);
    for (int i = 0; i < 30; ++i) {
      SequenceRequest request;
      request.prompt_token_ids = {1, 2, 3};
      scheduler.add_request(request);
    }
    EXPECT_EQ(scheduler.stats().num_waiting, 30);
    const ReplayResult result = replay_text(disk.str());
    EXPECT_EQ(result.divergence, "");
    EXPECT_GT(result.num_calls, 0);
    EXPECT_LT(result.num_calls, 30);
  }
}

}  // namespace
}  // namespace fastpage
