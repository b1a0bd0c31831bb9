// Range checks of a batch that does not come from the scheduler.
#pragma once

#include "fastpage/executor.h"

namespace fastpage {

void check_batch(const InputBatch& batch, const Program& program, const ExecutorConfig& config);

}  // namespace fastpage
