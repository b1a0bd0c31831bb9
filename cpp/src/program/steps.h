// A Program compiled for the CPU: one typed step an op, with weights, memory and kernels resolved.
#pragma once

#include <variant>
#include <vector>

#include "fastpage/ops.h"
#include "fastpage/program.h"

namespace fastpage {

class WeightStore;

// What varies from one forward to the next.
struct Frame {
  ThreadPool& pool;
  Span<const TokenId> token_ids;
  Span<const int32_t> positions;
  Span<const int32_t> slot_mapping;
  ops::AttentionBatch attention;
  Span<const int32_t> logits_indices;  // of one slice

  int64_t rows(Rows kind) const {
    return static_cast<int64_t>(kind == Rows::kTokens ? token_ids.size() : logits_indices.size());
  }
};

// An activation's place in the workspace.
struct Slab {
  float* data = nullptr;
  Rows rows = Rows::kTokens;
  int64_t cols = 0;
  int64_t stride = 0;

  Matrix<float> at(const Frame& frame) const { return {data, frame.rows(rows), cols, stride}; }
};

struct EmbedStep {
  static constexpr OpKind kKind = OpKind::kEmbed;
  const ops::PackedWeight* table;
  Slab y;
  void run(const Frame& frame) const {
    ops::embed(frame.pool, frame.token_ids, *table, y.at(frame));
  }
};

struct EmbedPositionsStep {
  static constexpr OpKind kKind = OpKind::kEmbedPositions;
  Matrix<const float> table;  // from the row of position 0 on
  Slab y;
  void run(const Frame& frame) const {
    ops::gather_rows(frame.pool, table, frame.positions, y.at(frame));
  }
};

struct NormStep {
  static constexpr OpKind kKind = OpKind::kNorm;
  Slab x;
  ops::NormParams params;
  Slab residual;  // of no data: none
  Slab sum;
  Slab y;
  void run(const Frame& frame) const {
    const bool has_sum = residual.data != nullptr;
    if (has_sum) ops::add(frame.pool, x.at(frame), residual.at(frame), sum.at(frame));
    ops::norm(frame.pool, (has_sum ? sum : x).at(frame), params, y.at(frame));
  }
};

struct LinearStep {
  static constexpr OpKind kKind = OpKind::kLinear;
  Slab x;
  const ops::PackedWeight* weight;
  const float* bias;
  ops::Activations activations;
  ops::LinearFusion fusion;  // without the residual
  Slab residual;             // of no data: none
  Slab y;
  void run(const Frame& frame) const {
    ops::LinearFusion fused = fusion;
    if (residual.data != nullptr) fused.residual = residual.at(frame);
    ops::linear(frame.pool, x.at(frame), *weight, bias, y.at(frame), activations, fused);
  }
};

struct RotaryStep {
  static constexpr OpKind kKind = OpKind::kRotary;
  Slab x;
  Matrix<const float> cos_sin;
  int64_t head_dim;
  ops::RotaryStyle style;
  Slab y;
  void run(const Frame& frame) const {
    ops::rotary(frame.pool, x.at(frame), frame.positions, cos_sin, head_dim, style, y.at(frame));
  }
};

struct WriteCacheStep {
  static constexpr OpKind kKind = OpKind::kWriteCache;
  Slab k;
  Slab v;
  ops::KvCacheView cache;
  void run(const Frame& frame) const {
    ops::reshape_and_cache(frame.pool, k.at(frame), v.at(frame), frame.slot_mapping, cache);
  }
};

struct RotaryWriteCacheStep {
  static constexpr OpKind kKind = OpKind::kRotaryWriteCache;
  Slab q;
  Slab k;
  Slab v;
  Matrix<const float> cos_sin;
  ops::RotaryStyle style;
  ops::KvCacheView cache;
  Slab rotated_q;
  void run(const Frame& frame) const {
    ops::rotary_and_cache(frame.pool, q.at(frame), k.at(frame), v.at(frame), frame.positions,
                          frame.slot_mapping, cos_sin, style, cache, rotated_q.at(frame));
  }
};

struct AttendStep {
  static constexpr OpKind kKind = OpKind::kAttend;
  Slab q;
  ops::KvCacheView cache;
  ops::AttentionParams params;
  Slab y;
  void run(const Frame& frame) const {
    ops::paged_attention(frame.pool, q.at(frame), cache, frame.attention, params, y.at(frame));
  }
};

struct ActivateStep {
  static constexpr OpKind kKind = OpKind::kActivate;
  Slab x;
  ops::Activation activation;
  Slab y;
  void run(const Frame& frame) const {
    ops::activate(frame.pool, x.at(frame), activation, y.at(frame));
  }
};

// y = f(x, argument), element by element.
template <OpKind kind, void (*f)(ThreadPool&, Matrix<const float>, float, Matrix<float>)>
struct MapStep {
  static constexpr OpKind kKind = kind;
  Slab x;
  float argument;
  Slab y;
  void run(const Frame& frame) const { f(frame.pool, x.at(frame), argument, y.at(frame)); }
};
using ScaleStep = MapStep<OpKind::kScale, ops::scale>;
using ClampStep = MapStep<OpKind::kClamp, ops::clamp>;
using SoftCapStep = MapStep<OpKind::kSoftCap, ops::soft_cap>;

struct AddStep {
  static constexpr OpKind kKind = OpKind::kAdd;
  Slab a;
  Slab b;
  Slab y;
  void run(const Frame& frame) const {
    ops::add(frame.pool, a.at(frame), b.at(frame), y.at(frame));
  }
};

struct MoeStep {
  static constexpr OpKind kKind = OpKind::kMoe;
  Slab x;
  Slab router_logits;
  std::vector<ops::Expert> experts;
  ops::MoeParams params;
  Slab y;
  void run(const Frame& frame) const {
    ops::moe(frame.pool, x.at(frame), router_logits.at(frame), experts, params, y.at(frame));
  }
};

struct GatherRowsStep {
  static constexpr OpKind kKind = OpKind::kGatherRows;
  Slab x;
  Slab y;
  void run(const Frame& frame) const {
    ops::gather_rows(frame.pool, x.at(frame), frame.logits_indices, y.at(frame));
  }
};

using Step = std::variant<EmbedStep, EmbedPositionsStep, NormStep, LinearStep, RotaryStep,
                          WriteCacheStep, RotaryWriteCacheStep, AttendStep, ActivateStep, ScaleStep,
                          ClampStep, SoftCapStep, AddStep, MoeStep, GatherRowsStep>;

struct CompiledProgram {
  std::vector<Step> token_steps;   // once per forward
  std::vector<Step> logits_steps;  // once per slice of logits rows
  Slab output;
};

// `regions`: the base address of each region of `plan`.
CompiledProgram compile(const Program& program, const WorkspacePlan& plan,
                        const std::vector<float*>& regions, const WeightStore& weights,
                        const std::vector<ops::KvCacheView>& caches, ops::Activations activations);

}  // namespace fastpage
