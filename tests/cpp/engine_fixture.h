// An Engine over the fake model, with a gate before it and accidents on demand.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fake_model.h"
#include "fastpage/engine.h"

namespace fastpage {

inline constexpr int32_t kVocabSize = 50;

inline EngineConfig small_config(bool async_scheduling = false) {
  EngineConfig config;
  config.scheduler.num_blocks = 32;
  config.scheduler.block_size = 4;
  config.scheduler.max_num_seqs = 8;
  config.scheduler.max_num_batched_tokens = 32;
  config.scheduler.max_model_len = 64;
  config.scheduler.eos_token_ids = {0};
  config.vocab_size = kVocabSize;
  config.async_scheduling = async_scheduling;
  return config;
}

inline Request request(std::vector<TokenId> prompt, int32_t max_tokens = 6) {
  Request out;
  out.prompt_token_ids = std::move(prompt);
  out.params.max_tokens = max_tokens;
  out.params.ignore_eos = true;
  out.params.temperature = 0;
  return out;
}

// With async_scheduling it computes on a thread of its own, while the engine schedules.
class GatedModel : public ModelRunner {
 public:
  explicit GatedModel(const EngineConfig& config)
      : fake_(config.scheduler.num_blocks, config.scheduler.block_size, config.vocab_size,
              fake_options(config)),
        is_async_(config.async_scheduling) {
    if (is_async_) worker_ = std::thread([this] { work(); });
  }
  ~GatedModel() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      changed_.notify_all();
    }
    if (worker_.joinable()) worker_.join();
  }

  int32_t max_steps_in_flight() const override { return is_async_ ? 2 : 1; }

  void execute(const InputBatch& batch) override {
    if (fail_in_execute) throw std::runtime_error("out of luck");
    num_future_tokens += batch.future_tokens.size();
    {
      std::lock_guard<std::mutex> lock(fake_mutex_);
      fake_.execute(batch);
    }
    if (is_async_) {
      std::lock_guard<std::mutex> lock(mutex_);
      queue_.push_back(batch.step_id);
      changed_.notify_all();
    } else {
      compute(batch.step_id);
    }
  }

  const ModelRunnerOutput& wait(int64_t step_id) override {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return results_.count(step_id) != 0; });
    auto [output, error] = std::move(results_[step_id]);
    results_.erase(step_id);
    waited_for.push_back(step_id);
    if (error != nullptr) std::rethrow_exception(error);
    if (fail_in_wait || fail_in_wait_for == step_id) throw std::runtime_error("out of luck");
    output_ = std::move(output);
    if (tamper) tamper(&output_);
    return output_;
  }

  int64_t progress() const override {
    if (when_asked) when_asked();
    return num_parts_done;
  }

  void close() { set_open(false); }
  void open() { set_open(true); }
  void wait_until_inside() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return inside_; });
  }

  bool fail_in_execute = false;
  bool fail_in_wait = false;
  int64_t fail_in_wait_for = -1;
  std::function<void(ModelRunnerOutput*)> tamper;
  std::vector<int64_t> waited_for;
  std::atomic<int64_t> num_parts_done{0};
  std::function<void()> when_asked;  // for its progress
  size_t num_future_tokens = 0;

 private:
  static FakeModelOptions fake_options(const EngineConfig& config) {
    FakeModelOptions options;
    options.num_host_blocks = config.scheduler.num_host_blocks;
    options.max_steps_in_flight = config.async_scheduling ? 2 : 1;
    options.lazy = true;
    return options;
  }

  void set_open(bool open) {
    std::lock_guard<std::mutex> lock(mutex_);
    open_ = open;
    changed_.notify_all();
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return stop_ || !queue_.empty(); });
      if (stop_) return;
      const int64_t step_id = queue_.front();
      queue_.pop_front();
      lock.unlock();
      compute(step_id);
      lock.lock();
    }
  }

  void compute(int64_t step_id) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      inside_ = true;
      changed_.notify_all();
      changed_.wait(lock, [this] { return open_ || stop_; });
      inside_ = false;
    }
    std::pair<ModelRunnerOutput, std::exception_ptr> result;
    try {
      std::lock_guard<std::mutex> lock(fake_mutex_);
      result.first = fake_.wait(step_id);
    } catch (...) {
      result.second = std::current_exception();
    }
    std::lock_guard<std::mutex> lock(mutex_);
    results_[step_id] = std::move(result);
    changed_.notify_all();
  }

  std::mutex fake_mutex_;
  FakeModel fake_;
  const bool is_async_;
  ModelRunnerOutput output_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<int64_t> queue_;  // steps to be computed
  std::map<int64_t, std::pair<ModelRunnerOutput, std::exception_ptr>> results_;
  bool open_ = true;
  bool inside_ = false;
  bool stop_ = false;
  std::thread worker_;
};

using Outputs = std::map<std::pair<RequestId, int32_t>, std::vector<RequestOutput>>;

struct Fixture {
  explicit Fixture(EngineConfig config = small_config())
      : model(std::make_shared<GatedModel>(config)), engine(config, model) {}

  // All that comes until nothing is left, by (request, index).
  Outputs drain() {
    Outputs all;
    for (int i = 0; engine.has_unfinished(); ++i) {
      if (i == 1000) throw std::logic_error("it does not come to an end");
      for (RequestOutput& output : engine.step().outputs) {
        all[{output.request_id, output.index}].push_back(output);
      }
      engine.check_integrity();
    }
    const SchedulerStats stats = engine.stats().scheduler;
    EXPECT_EQ(stats.num_free_blocks, stats.num_blocks);
    return all;
  }

  std::shared_ptr<GatedModel> model;
  Engine engine;
};

inline std::vector<TokenId> tokens_of(const std::vector<RequestOutput>& outputs) {
  std::vector<TokenId> tokens;
  for (const RequestOutput& output : outputs) {
    tokens.insert(tokens.end(), output.new_token_ids.begin(), output.new_token_ids.end());
  }
  return tokens;
}

template <typename E, typename F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const E& e) {
    return e.what();
  }
  return "no error";
}

}  // namespace fastpage
