#include "fastpage/executor.h"

namespace fastpage {

namespace {

std::shared_ptr<CpuExecutor> checked(std::shared_ptr<CpuExecutor> executor) {
  if (executor == nullptr) throw InvalidArgument("ProgramRunner: the executor is null");
  return executor;
}

}  // namespace

ProgramRunner::ProgramRunner(std::shared_ptr<CpuExecutor> executor)
    : executor_(checked(std::move(executor))),
      sampler_(static_cast<int32_t>(executor_->program().vocab_size()), &executor_->pool()) {}

ProgramRunner::~ProgramRunner() = default;

void ProgramRunner::execute(const InputBatch& batch) {
  if (!batch.block_copies.empty()) {
    const int32_t num_layers = executor_->program().kv_cache_spec().num_layers;
    for (int32_t layer = 0; layer < num_layers; ++layer) {
      ops::copy_blocks(executor_->pool(), executor_->kv_cache(layer), batch.block_copies);
    }
  }
  sampler_.begin(batch, &output_);
  executor_->forward(batch, [this, &batch](int32_t first_row, Matrix<float> logits) {
    sampler_.sample(logits, first_row, batch, &output_);
  });
}

const ModelRunnerOutput& ProgramRunner::wait(int64_t step_id) {
  if (output_.step_id != step_id) {
    throw InvalidArgument("wait for step " + std::to_string(step_id) + ", but step " +
                          std::to_string(output_.step_id) + " is the last one executed");
  }
  return output_;
}

}  // namespace fastpage
