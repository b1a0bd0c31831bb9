// A model of one layer with random weights, loaded into a CpuExecutor.
#pragma once

#include <random>

#include "fastpage/executor.h"

namespace fastpage {

inline constexpr int64_t kVocab = 40;
inline constexpr int64_t kHidden = 8;  // 2 heads of 4, 1 KV head

// One layer without residuals, so that attention decides alone.
inline Program one_layer() {
  Program p;
  const auto value = [&](OpKind kind, std::vector<Operand> inputs, Rows rows, int64_t cols,
                         std::map<std::string, AttrValue> attrs = {}) {
    const Operand y{p.add_activation("", rows, cols), 0, cols};
    p.add_op({kind, std::move(inputs), {y}, std::move(attrs)});
    return y;
  };
  const BufferId table = p.add_weight("embed", {kVocab, kHidden});
  const Operand x = value(OpKind::kEmbed, {{table}}, Rows::kTokens, kHidden);
  const Operand normed = value(OpKind::kNorm, {x, {p.add_weight("norm", {kHidden})}}, Rows::kTokens,
                               kHidden, {{"kind", std::string("rms")}, {"eps", 1e-5}});
  const Operand qkv =
      value(OpKind::kLinear, {normed, {p.add_weight("qkv", {16, kHidden})}}, Rows::kTokens, 16);
  const Operand qk =
      value(OpKind::kRotary, {{qkv.buffer, 0, 12}, {p.add_weight("cos_sin", {64, 4})}},
            Rows::kTokens, 12, {{"head_dim", int64_t{4}}, {"style", std::string("neox")}});
  p.add_op(
      {OpKind::kWriteCache, {{qk.buffer, 8, 4}, {qkv.buffer, 12, 4}}, {}, {{"layer", int64_t{0}}}});
  const Operand heads = value(OpKind::kAttend, {{qk.buffer, 0, 8}}, Rows::kTokens, 8,
                              {{"layer", int64_t{0}},
                               {"num_heads", int64_t{2}},
                               {"num_kv_heads", int64_t{1}},
                               {"head_dim", int64_t{4}},
                               {"scale", 0.5}});
  const Operand wanted = value(OpKind::kGatherRows, {heads}, Rows::kLogits, kHidden);
  p.set_output(value(OpKind::kLinear, {wanted, {table}}, Rows::kLogits, kVocab).buffer);
  return p;
}

inline std::shared_ptr<CpuExecutor> loaded(const ExecutorConfig& config) {
  auto executor =
      std::make_shared<CpuExecutor>(one_layer(), config, std::make_shared<ThreadPool>(2));
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (const Buffer& buffer : executor->program().buffers()) {
    if (buffer.kind != Buffer::Kind::kWeight) continue;
    TensorView view;
    view.ndim = static_cast<int32_t>(buffer.shape.size());
    for (int32_t i = 0; i < view.ndim; ++i) view.shape[i] = buffer.shape[i];
    view.strides = {view.ndim == 2 ? buffer.shape[1] : 1, 1};
    std::vector<float> values(static_cast<size_t>(view.numel()));
    for (float& v : values) v = 0.3f * normal(random);  // keeps the softmax flat
    view.data = values.data();
    executor->load_weight(buffer.name, view);
  }
  executor->finish_loading();
  return executor;
}

inline ExecutorConfig small_config() {
  ExecutorConfig config;
  config.weight_dtype = DType::kFloat32;
  config.kv_cache_dtype = DType::kFloat32;
  config.num_kv_blocks = 8;
  config.max_num_tokens = 32;
  config.max_num_logits = 4;
  return config;
}

}  // namespace fastpage
