// The one virtual seam between the core and whatever computes a model.
#pragma once

#include "fastpage/input_batch.h"

namespace fastpage {

class ModelRunner {
 public:
  virtual ~ModelRunner() = default;

  // Begins one step. `batch` and all that it points to stay valid and unchanged until
  // wait(batch.step_id) has returned. May compute at once or only enqueue.
  virtual void execute(const InputBatch& batch) = 0;

  // How many steps may be begun before the first of them is waited for: 1, or 2 for asynchronous
  // scheduling. With 2, a batch may hold future_tokens, and the runner calls resolve() once it
  // knows what the step before has sampled: in execute() if that step is done by then, else before
  // wait() for that step returns. So nobody writes tokens while the scheduler takes them in.
  virtual int32_t max_steps_in_flight() const { return 1; }

  // Blocks until the step is done. The result is valid until the next wait().
  virtual const ModelRunnerOutput& wait(int64_t step_id) = 0;

  // Another value whenever a part of a step is done, from a runner that can tell: a step that takes
  // minutes is no step that hangs. Called from any thread, at any time.
  virtual int64_t progress() const { return 0; }
};

}  // namespace fastpage
