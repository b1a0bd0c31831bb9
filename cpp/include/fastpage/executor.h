// Runs a Program on the CPU, and the ModelRunner made of a Program and a Sampler.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>

#include "fastpage/model_runner.h"
#include "fastpage/ops.h"
#include "fastpage/program.h"
#include "fastpage/sampler.h"

namespace fastpage {

// What float weights are turned into as they are loaded. A mixture's router (the weight of its
// router logits) stays as kNone has it.
enum class Quantization : uint8_t {
  kNone,  // ExecutorConfig::weight_dtype
  kInt8,  // linear weights and embedding tables: int8
  kInt4   // linear weights q4_1; embedding tables, and the logits' weight, int8
};
const char* quantization_name(Quantization quantization);      // "none", "int8", "int4"
Quantization quantization_from_name(const std::string& name);  // throws InvalidArgument

struct ExecutorConfig {
  DType weight_dtype =
      DType::kBFloat16;  // of linear weights and embedding tables: fp32, bf16 or fp16
  Quantization quantization = Quantization::kNone;
  ops::Activations activations = ops::Activations::kQuantized;  // in linear layers, attention
  DType kv_cache_dtype = DType::kBFloat16;
  int32_t num_kv_blocks = 0;
  int32_t num_host_kv_blocks = 0;  // of the host cache, where blocks are swapped to; 0 = none
  int32_t block_size = 16;
  int32_t max_num_tokens = 2048;  // rows of a step
  int32_t max_num_logits =
      256;  // rows of logits computed at once; steps that want more are run in slices
  // Passes over the program (passes.h) that are left out, by name, or "all". Those that
  // FASTPAGE_DISABLED_PASSES names in the environment, separated by commas, come to them.
  std::vector<std::string> disabled_passes;
};

class CpuExecutor {
 public:
  CpuExecutor(const Program& program, const ExecutorConfig& config,
              std::shared_ptr<ThreadPool> pool);
  ~CpuExecutor();

  // Packs (linear, embed) or copies (norms, biases, tables: to fp32) one weight by its buffer name.
  // Throws InvalidArgument for an unknown name, a wrong shape or a second loading.
  void load_weight(const std::string& name, const TensorView& weight);
  // A linear weight or embedding table as blocks of GGUF, which it stays: see
  // ops::PackedWeight::pack_blocks.
  void load_weight_blocks(const std::string& name, const TensorView& blocks, WeightFormat format);
  // Allocates cache and workspace. Throws InvalidArgument listing weights not loaded,
  // ResourceExhausted if memory is short.
  void finish_loading();

  // What a step asks to be done to the cache before forward(), in every layer: swap_outs, then
  // block_copies, then swap_ins. Throws InvalidArgument for blocks that do not exist.
  void apply_transfers(const BlockTransfers& transfers);

  // Runs the step. `sink` is called with consecutive slices of at most max_num_logits rows of the
  // logits, fp32 [rows][vocab_size], which it may overwrite; first_row counts from the batch's
  // first logits row.
  using LogitsSink = std::function<void(int32_t first_row, Matrix<float> logits)>;
  void forward(const InputBatch& batch, const LogitsSink& sink);

  // Throws InvalidArgument unless every id, position, slot and block of `batch` is in range. The
  // scheduler's batches are; forward() trusts them.
  void check_batch(const InputBatch& batch) const;

  const Program& program() const;  // as it is run: after the passes
  const ExecutorConfig& config() const;
  ops::KvCacheView kv_cache(int32_t layer) const;
  ops::KvCacheView kv_host_cache(int32_t layer) const;  // of 0 blocks if there is none
  size_t weight_bytes() const;  // read by one step of one row: every linear weight once (packed),
                                // of a mixture's experts as many as it goes to
  size_t kv_cache_bytes() const;
  size_t kv_host_cache_bytes() const;
  static size_t kv_block_bytes(const KvCacheSpec& spec, DType dtype,
                               int32_t block_size);  // all layers, k and v
  ThreadPool& pool() const;
  int64_t num_ops_run() const;  // so far; from any thread
  // Seconds per op kind since the start, if profiling is on (FASTPAGE_PROFILE=1 or set_profiling).
  void set_profiling(bool on);
  std::map<std::string, double> profile() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Runs the steps of an Engine on a CpuExecutor, and samples their tokens.
class ProgramRunner : public ModelRunner {
 public:
  // With max_steps_in_flight = 1 execute() computes in the caller's thread. With 2 it only
  // enqueues, and a thread of the runner's own computes the steps in their order. (In a child of
  // fork(), which does not have that thread, the caller computes.) A step's exception comes out of
  // its wait(); a step whose future tokens were to come from a failed one fails too.
  explicit ProgramRunner(std::shared_ptr<CpuExecutor> executor, int32_t max_steps_in_flight = 1);
  // Waits for the step that is being computed, if any. Steps not begun yet are dropped.
  ~ProgramRunner() override;

  // Throws InvalidArgument if max_steps_in_flight steps have not been waited for.
  void execute(const InputBatch& batch) override;
  int32_t max_steps_in_flight() const override;
  // Throws InvalidArgument for a step that was not executed, or is older than the last ones.
  const ModelRunnerOutput& wait(int64_t step_id) override;
  int64_t progress() const override;  // op by op

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace fastpage
