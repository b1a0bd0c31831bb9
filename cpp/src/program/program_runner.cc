#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#include "fastpage/executor.h"
#include "ops/fork_depth.h"

namespace fastpage {

namespace {

using Clock = std::chrono::steady_clock;

struct RunnerStep {
  const InputBatch* batch = nullptr;
  int64_t step_id = 0;
  ModelRunnerOutput output;
  std::exception_ptr error;
};

void check_arguments(const std::shared_ptr<CpuExecutor>& executor, int32_t max_steps_in_flight) {
  if (executor == nullptr) throw InvalidArgument("ProgramRunner: the executor is null");
  if (max_steps_in_flight < 1 || max_steps_in_flight > 2) {
    throw InvalidArgument("max_steps_in_flight is " + std::to_string(max_steps_in_flight) +
                          ": must be 1 or 2");
  }
}

}  // namespace

// Steps are counted from 0 in the order of execute(). They are computed in that order, and those
// from num_waited on are in flight. The counts, and a step that is not being computed, are guarded
// by the mutex.
struct ProgramRunner::Impl {
  Impl(std::shared_ptr<CpuExecutor> e, int32_t max_steps)
      : executor(std::move(e)),
        max_steps_in_flight(max_steps),
        sampler(static_cast<int32_t>(executor->program().vocab_size()), &executor->pool()),
        steps(static_cast<size_t>(max_steps) + 1) {}

  ~Impl() {
    if (!worker.joinable()) return;
    {
      std::lock_guard<std::mutex> lock(mutex);
      stop = true;
    }
    begun.notify_one();
    worker.join();
  }

  void start_worker() {
    try {
      worker = std::thread([this] { work(); });
    } catch (const std::system_error& e) {
      throw ResourceExhausted(std::string("the runner's thread could not be started: ") + e.what());
    }
  }

  bool worker_is_elsewhere() const { return worker.joinable() && made_at_depth != fork_depth(); }

  // One place more than steps may be in flight: what wait() returned stays valid until the next.
  RunnerStep& step(int64_t i) { return steps[static_cast<size_t>(i) % steps.size()]; }

  int64_t begin(const InputBatch& batch);
  void resolve(int64_t i);
  void compute(RunnerStep* step);
  void finish(int64_t i);
  int64_t find(int64_t step_id);
  void work();

  const std::shared_ptr<CpuExecutor> executor;
  const int32_t max_steps_in_flight;
  Sampler sampler;
  std::vector<RunnerStep> steps;
  int64_t num_begun = 0;
  int64_t num_done = 0;
  int64_t num_waited = 0;
  bool stop = false;
  std::mutex mutex;
  std::condition_variable begun;
  std::condition_variable done;
  std::thread worker;
  const int made_at_depth = fork_depth();
};

int64_t ProgramRunner::Impl::begin(const InputBatch& batch) {
  if (num_begun - num_waited >= max_steps_in_flight) {
    throw InvalidArgument("step " + std::to_string(batch.step_id) +
                          " is one too many: wait() for " + "step " +
                          std::to_string(step(num_waited).step_id) + " first");
  }
  const int64_t i = num_begun++;
  step(i).batch = &batch;
  step(i).step_id = batch.step_id;
  step(i).error = nullptr;
  if (num_done == i) resolve(i);
  return i;
}

// Step i - 1 is done.
void ProgramRunner::Impl::resolve(int64_t i) {
  const InputBatch& batch = *step(i).batch;
  if (batch.future_tokens.empty()) return;
  try {
    if (i == 0 || step(i - 1).error != nullptr) {
      throw Error("step " + std::to_string(batch.step_id) +
                  " needs tokens of the step before, which has none: it failed, or never was");
    }
    batch.resolve(step(i - 1).output.sampled_token_ids);
  } catch (...) {
    step(i).error = std::current_exception();
  }
}

void ProgramRunner::Impl::compute(RunnerStep* step) {
  if (step->error != nullptr) return;
  try {
    const InputBatch& batch = *step->batch;
    executor->apply_transfers(batch.transfers);
    sampler.begin(batch, &step->output);
    step->output.sample_seconds = 0;
    executor->forward(batch, [this, step](int32_t first_row, Matrix<float> logits) {
      const Clock::time_point start = Clock::now();
      sampler.sample(logits, first_row, *step->batch, &step->output);
      const std::chrono::duration<double> taken = Clock::now() - start;
      step->output.sample_seconds += taken.count();
    });
  } catch (...) {
    step->error = std::current_exception();
  }
}

// The next step's tokens are written before anybody learns that this one is done.
void ProgramRunner::Impl::finish(int64_t i) {
  if (i + 1 < num_begun) resolve(i + 1);
  num_done = i + 1;
}

int64_t ProgramRunner::Impl::find(int64_t step_id) {
  const int64_t oldest = std::max<int64_t>(0, num_begun - static_cast<int64_t>(steps.size()));
  for (int64_t i = num_begun - 1; i >= oldest; --i) {
    if (step(i).step_id == step_id) return i;
  }
  throw InvalidArgument("wait for step " + std::to_string(step_id) +
                        ", which is not among the last ones executed");
}

void ProgramRunner::Impl::work() {
  std::unique_lock<std::mutex> lock(mutex);
  while (true) {
    begun.wait(lock, [&] { return stop || num_done < num_begun; });
    if (stop) return;
    const int64_t i = num_done;
    lock.unlock();
    compute(&step(i));
    lock.lock();
    finish(i);
    done.notify_all();
  }
}

ProgramRunner::ProgramRunner(std::shared_ptr<CpuExecutor> executor, int32_t max_steps_in_flight) {
  check_arguments(executor, max_steps_in_flight);
  impl_ = std::make_unique<Impl>(std::move(executor), max_steps_in_flight);
  if (max_steps_in_flight > 1) impl_->start_worker();
}

ProgramRunner::~ProgramRunner() {
  // A thread that is not here can be neither joined nor woken: leave it where it is.
  if (impl_->worker_is_elsewhere()) static_cast<void>(impl_.release());
}

void ProgramRunner::execute(const InputBatch& batch) {
  if (impl_->worker_is_elsewhere()) {
    Impl* const parents = impl_.release();
    impl_ = std::make_unique<Impl>(parents->executor, parents->max_steps_in_flight);
  }
  if (impl_->worker.joinable()) {
    std::lock_guard<std::mutex> lock(impl_->mutex);
    impl_->begin(batch);
    impl_->begun.notify_one();
    return;
  }
  const int64_t i = impl_->begin(batch);
  impl_->compute(&impl_->step(i));
  impl_->finish(i);
}

int32_t ProgramRunner::max_steps_in_flight() const { return impl_->max_steps_in_flight; }

int64_t ProgramRunner::progress() const { return impl_->executor->num_ops_run(); }

const ModelRunnerOutput& ProgramRunner::wait(int64_t step_id) {
  if (impl_->worker_is_elsewhere()) {
    throw Error("step " + std::to_string(step_id) + " is under way in the process that forked");
  }
  std::unique_lock<std::mutex> lock(impl_->mutex);
  const int64_t i = impl_->find(step_id);
  impl_->done.wait(lock, [&] { return impl_->num_done > i; });
  impl_->num_waited = std::max(impl_->num_waited, i + 1);
  if (impl_->step(i).error != nullptr) std::rethrow_exception(impl_->step(i).error);
  return impl_->step(i).output;
}

}  // namespace fastpage
