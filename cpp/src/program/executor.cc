#include "fastpage/executor.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>

#include "fastpage/passes.h"
#include "program/batch_checks.h"
#include "program/memory.h"
#include "program/steps.h"
#include "program/weights.h"

namespace fastpage {

namespace {

constexpr size_t kAlignment = 64;  // a cache line, and the widest vector
constexpr size_t kNumOpKinds = static_cast<size_t>(OpKind::kGatherRows) + 1;

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

bool profiling_wanted() {
  const char* value = std::getenv("FASTPAGE_PROFILE");
  return value != nullptr && std::strcmp(value, "1") == 0;
}

void check_config(const ExecutorConfig& config) {
  const auto is_float = [](DType dtype) {
    return dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16;
  };
  if (!is_float(config.weight_dtype)) {
    throw InvalidArgument(std::string("weight_dtype is ") + dtype_name(config.weight_dtype) +
                          ": one of float32, bfloat16, float16");
  }
  if (!is_float(config.kv_cache_dtype) && config.kv_cache_dtype != DType::kInt8) {
    throw InvalidArgument(std::string("kv_cache_dtype is ") + dtype_name(config.kv_cache_dtype) +
                          ": one of float32, bfloat16, float16, int8");
  }
  if (config.block_size <= 0 || config.block_size % 16 != 0) {
    throw InvalidArgument("block_size is " + std::to_string(config.block_size) +
                          ": a multiple of 16 needed");
  }
  for (const auto& [name, value] : {std::pair{"num_kv_blocks", config.num_kv_blocks},
                                    std::pair{"max_num_tokens", config.max_num_tokens},
                                    std::pair{"max_num_logits", config.max_num_logits}}) {
    if (value < 1) {
      throw InvalidArgument(std::string(name) + " is " + std::to_string(value) +
                            ": at least 1 needed");
    }
  }
  if (config.num_host_kv_blocks < 0) {
    throw InvalidArgument("num_host_kv_blocks is " + std::to_string(config.num_host_kv_blocks) +
                          ": give a positive number, or 0 for no host cache");
  }
}

// Of one layer, without its memory.
ops::KvCacheView cache_layout(const KvCacheSpec& spec, DType dtype, int32_t block_size) {
  ops::KvCacheView view;
  view.dtype = dtype;
  view.num_kv_heads = spec.num_kv_heads;
  view.block_size = block_size;
  view.head_dim = spec.head_dim;
  return view;
}

}  // namespace

struct CpuExecutor::Impl {
  Impl(const Program& p, const ExecutorConfig& c, std::shared_ptr<ThreadPool> threads)
      : program(optimized(p, Target::kCpu, c.disabled_passes)),
        config(c),
        pool(threads != nullptr ? std::move(threads) : std::make_shared<ThreadPool>()),
        weights(program, c.weight_dtype, c.quantization) {
    check_config(config);
  }

  void allocate_caches();
  std::vector<float*> allocate_workspace(const WorkspacePlan& plan);
  void run(const std::vector<Step>& steps, const Frame& frame);
  // Only the thread that runs a step writes it.
  void count_op() {
    num_ops_run.store(num_ops_run.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  }

  const Program program;
  const ExecutorConfig config;
  const std::shared_ptr<ThreadPool> pool;
  WeightStore weights;
  ZeroedMemory cache_memory;
  std::vector<ops::KvCacheView> caches;  // per layer
  ZeroedMemory host_cache_memory;
  std::vector<ops::KvCacheView> host_caches;  // per layer
  ZeroedMemory workspace;
  CompiledProgram compiled;
  bool is_ready = false;
  bool is_profiling = profiling_wanted();
  std::array<double, kNumOpKinds> seconds{};
  std::atomic<int64_t> num_ops_run{0};
};

void CpuExecutor::Impl::allocate_caches() {
  const KvCacheSpec spec = program.kv_cache_spec();
  ops::KvCacheView view = cache_layout(spec, config.kv_cache_dtype, config.block_size);
  const auto block = static_cast<size_t>(view.bytes_per_block());
  const auto allocate = [&](int32_t num_blocks, const char* what, size_t promised,
                            std::vector<ops::KvCacheView>* layers) {
    view.num_blocks = num_blocks;
    const size_t half = aligned(block * static_cast<size_t>(num_blocks));
    ZeroedMemory memory(2 * half * spec.num_layers, what, promised);
    std::byte* next = memory.data();
    for (int32_t layer = 0; layer < spec.num_layers; ++layer, next += 2 * half) {
      view.k = next;
      view.v = next + half;
      layers->push_back(view);
    }
    return memory;
  };
  cache_memory = allocate(config.num_kv_blocks, "the KV cache", 0, &caches);
  host_cache_memory =
      allocate(config.num_host_kv_blocks, "the host KV cache", cache_memory.size(), &host_caches);
}

std::vector<float*> CpuExecutor::Impl::allocate_workspace(const WorkspacePlan& plan) {
  std::vector<size_t> offsets;
  size_t bytes = 0;
  for (size_t r = 0; r < plan.region_cols.size(); ++r) {
    const int32_t rows =
        plan.region_rows[r] == Rows::kTokens ? config.max_num_tokens : config.max_num_logits;
    offsets.push_back(bytes);
    bytes += aligned(static_cast<size_t>(plan.region_cols[r]) * rows * sizeof(float));
  }
  workspace = ZeroedMemory(bytes, "the workspace of activations");
  std::vector<float*> regions;
  for (size_t offset : offsets) {
    regions.push_back(reinterpret_cast<float*>(workspace.data() + offset));
  }
  return regions;
}

void CpuExecutor::Impl::run(const std::vector<Step>& steps, const Frame& frame) {
  if (!is_profiling) {
    for (const Step& step : steps) {
      std::visit([&](const auto& s) { s.run(frame); }, step);
      count_op();
    }
    return;
  }
  using Clock = std::chrono::steady_clock;
  for (const Step& step : steps) {
    const Clock::time_point begin = Clock::now();
    const OpKind kind = std::visit(
        [&](const auto& s) {
          s.run(frame);
          return s.kKind;
        },
        step);
    seconds[static_cast<size_t>(kind)] +=
        std::chrono::duration<double>(Clock::now() - begin).count();
    count_op();
  }
}

const char* quantization_name(Quantization quantization) {
  constexpr const char* kNames[] = {"none", "int8", "int4"};
  return kNames[static_cast<int>(quantization)];
}

Quantization quantization_from_name(const std::string& name) {
  for (const Quantization q : {Quantization::kNone, Quantization::kInt8, Quantization::kInt4}) {
    if (name == quantization_name(q)) return q;
  }
  throw InvalidArgument("unknown quantization '" + name + "': one of none, int8, int4");
}

CpuExecutor::CpuExecutor(const Program& program, const ExecutorConfig& config,
                         std::shared_ptr<ThreadPool> pool)
    : impl_(std::make_unique<Impl>(program, config, std::move(pool))) {}

CpuExecutor::~CpuExecutor() = default;

void CpuExecutor::load_weight(const std::string& name, const TensorView& weight) {
  if (impl_->is_ready) {
    throw InvalidArgument("weight '" + name + "' comes after finish_loading");
  }
  impl_->weights.load(name, weight, *impl_->pool);
}

void CpuExecutor::load_weight_blocks(const std::string& name, const TensorView& blocks,
                                     WeightFormat format) {
  if (impl_->is_ready) {
    throw InvalidArgument("weight '" + name + "' comes after finish_loading");
  }
  impl_->weights.load_blocks(name, blocks, format, *impl_->pool);
}

void CpuExecutor::finish_loading() {
  if (impl_->is_ready) throw InvalidArgument("finish_loading is called twice");
  impl_->weights.check_complete();
  impl_->allocate_caches();
  const WorkspacePlan plan = plan_workspace(impl_->program);
  const std::vector<float*> regions = impl_->allocate_workspace(plan);
  impl_->compiled = compile(impl_->program, plan, regions, impl_->weights, impl_->caches,
                            impl_->config.activations);
  impl_->is_ready = true;
}

void CpuExecutor::apply_transfers(const BlockTransfers& transfers) {
  if (transfers.empty()) return;
  if (!impl_->is_ready) throw InvalidArgument("apply_transfers comes before finish_loading");
  ops::transfer_blocks(*impl_->pool, impl_->caches, impl_->host_caches, transfers);
}

void CpuExecutor::forward(const InputBatch& batch, const LogitsSink& sink) {
  if (!impl_->is_ready) throw InvalidArgument("forward comes before finish_loading");
  if (batch.num_tokens() > impl_->config.max_num_tokens) {
    throw InvalidArgument("a step of " + std::to_string(batch.num_tokens()) +
                          " tokens exceeds max_num_tokens " +
                          std::to_string(impl_->config.max_num_tokens));
  }
  if (batch.num_tokens() == 0) return;
  Frame frame{*impl_->pool, batch.token_ids, batch.positions, batch.slot_mapping, {}, {}};
  frame.attention.num_seqs = batch.num_seqs;
  frame.attention.query_start_loc = batch.query_start_loc.data();
  frame.attention.seq_lens = batch.seq_lens.data();
  frame.attention.block_tables = batch.block_tables;
  frame.attention.block_table_rows = batch.block_table_rows.data();
  frame.attention.block_table_stride = batch.block_table_stride;
  impl_->run(impl_->compiled.token_steps, frame);

  const Span<const int32_t> indices(batch.logits_indices);
  const auto slice = static_cast<size_t>(impl_->config.max_num_logits);
  for (size_t first = 0; first < indices.size(); first += slice) {
    frame.logits_indices = indices.subspan(first, std::min(slice, indices.size() - first));
    impl_->run(impl_->compiled.logits_steps, frame);
    sink(static_cast<int32_t>(first), impl_->compiled.output.at(frame));
  }
}

void CpuExecutor::check_batch(const InputBatch& batch) const {
  fastpage::check_batch(batch, impl_->program, impl_->config);
}

const Program& CpuExecutor::program() const { return impl_->program; }
const ExecutorConfig& CpuExecutor::config() const { return impl_->config; }
ops::KvCacheView CpuExecutor::kv_cache(int32_t layer) const { return impl_->caches.at(layer); }
ops::KvCacheView CpuExecutor::kv_host_cache(int32_t layer) const {
  return impl_->host_caches.at(layer);
}
size_t CpuExecutor::weight_bytes() const { return impl_->weights.linear_bytes(); }
size_t CpuExecutor::kv_cache_bytes() const { return impl_->cache_memory.size(); }
size_t CpuExecutor::kv_host_cache_bytes() const { return impl_->host_cache_memory.size(); }
ThreadPool& CpuExecutor::pool() const { return *impl_->pool; }

int64_t CpuExecutor::num_ops_run() const { return impl_->num_ops_run; }

size_t CpuExecutor::kv_block_bytes(const KvCacheSpec& spec, DType dtype, int32_t block_size) {
  const ops::KvCacheView view = cache_layout(spec, dtype, block_size);
  return static_cast<size_t>(spec.num_layers) * 2 * static_cast<size_t>(view.bytes_per_block());
}

void CpuExecutor::set_profiling(bool on) { impl_->is_profiling = on; }

std::map<std::string, double> CpuExecutor::profile() const {
  std::map<std::string, double> seconds;
  for (size_t kind = 0; kind < kNumOpKinds; ++kind) {
    seconds[op_name(static_cast<OpKind>(kind))] = impl_->seconds[kind];
  }
  return seconds;
}

}  // namespace fastpage
