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

  // Blocks until the step is done. The result is valid until the next wait().
  virtual const ModelRunnerOutput& wait(int64_t step_id) = 0;
};

}  // namespace fastpage
