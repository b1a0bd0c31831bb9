#include "program/steps.h"

#include "program/op_checks.h"
#include "program/weights.h"

namespace fastpage {

namespace {

class Compiler {
 public:
  Compiler(const Program& program, const WorkspacePlan& plan, const std::vector<float*>& regions,
           const WeightStore& weights, const std::vector<ops::KvCacheView>& caches,
           ops::Activations activations)
      : program_(program),
        plan_(plan),
        regions_(regions),
        weights_(weights),
        caches_(caches),
        activations_(activations) {}

  Step compile(const Op& op) const {
    switch (op.kind) {
      case OpKind::kEmbed:
        return EmbedStep{&weights_.packed(op.inputs[0].buffer), slab(op.outputs[0])};
      case OpKind::kEmbedPositions:
        return EmbedPositionsStep{positions_table(op), slab(op.outputs[0])};
      case OpKind::kNorm:
        return norm(op);
      case OpKind::kLinear:
        return linear(LinearParts::of(op));
      case OpKind::kRotary:
        return RotaryStep{slab(op.inputs[0]), weights_.table(op.inputs[1].buffer),
                          op.attr_int("head_dim", 0), rotary_style(op), slab(op.outputs[0])};
      case OpKind::kWriteCache:
        return WriteCacheStep{slab(op.inputs[0]), slab(op.inputs[1]), cache(op)};
      case OpKind::kRotaryWriteCache:
        if (op.attrs.count("norm_eps")) {
          throw InvalidArgument("rotary_write_cache with norms of q and k is for a GPU");
        }
        return RotaryWriteCacheStep{slab(op.inputs[0]), slab(op.inputs[1]),
                                    slab(op.inputs[2]), weights_.table(op.inputs[3].buffer),
                                    rotary_style(op),   cache(op),
                                    slab(op.outputs[0])};
      case OpKind::kAttend:
        return AttendStep{slab(op.inputs[0]), cache(op), attention_params(op), slab(op.outputs[0])};
      case OpKind::kActivate:
        return ActivateStep{slab(op.inputs[0]),
                            ops::activation_from_name(op.attr_string("kind", "")),
                            slab(op.outputs[0])};
      case OpKind::kScale:
        return map<ScaleStep>(op, "factor");
      case OpKind::kClamp:
        return map<ClampStep>(op, "limit");
      case OpKind::kSoftCap:
        return map<SoftCapStep>(op, "cap");
      case OpKind::kAdd:
        return AddStep{slab(op.inputs[0]), slab(op.inputs[1]), slab(op.outputs[0])};
      case OpKind::kMoe:
        return moe(op);
      case OpKind::kGatherRows:
        return GatherRowsStep{slab(op.inputs[0]), slab(op.outputs[0])};
    }
    throw InvalidArgument("unknown op kind");
  }

  Slab slab(const Operand& operand) const {
    const Buffer& buffer = program_.buffers()[operand.buffer];
    float* base = regions_[plan_.slots[operand.buffer].region];
    return {base + operand.offset, buffer.rows, operand.cols, buffer.shape[0]};
  }

 private:
  const float* vector(const Operand& operand) const { return weights_.table(operand.buffer).data; }

  template <typename Map>
  Map map(const Op& op, const char* attribute) const {
    return {slab(op.inputs[0]), static_cast<float>(op.attr_double(attribute, 1)),
            slab(op.outputs[0])};
  }

  Matrix<const float> positions_table(const Op& op) const {
    const Matrix<const float> table = weights_.table(op.inputs[0].buffer);
    const int64_t offset = op.attr_int("offset", 0);
    return {table.row(offset), table.rows - offset, table.cols};
  }

  NormStep norm(const Op& op) const {
    const NormParts parts = NormParts::of(op);
    NormStep step;
    step.x = slab(parts.x);
    step.params.kind =
        op.attr_string("kind", "") == "layer" ? ops::NormKind::kLayer : ops::NormKind::kRms;
    step.params.weight = vector(parts.weight);
    if (parts.bias.buffer >= 0) step.params.bias = vector(parts.bias);
    step.params.eps = static_cast<float>(op.attr_double("eps", 0));
    step.params.group = op.attr_int("group", parts.x.cols);
    step.params.is_per_column = program_.buffers()[parts.weight.buffer].shape[0] == parts.x.cols;
    if (parts.residual.buffer >= 0) {
      step.residual = slab(parts.residual);
      step.sum = slab(parts.sum);
    }
    step.y = slab(parts.y);
    return step;
  }

  LinearStep linear(const LinearParts& parts) const {
    LinearStep step;
    step.x = slab(parts.x);
    step.weight = &weights_.packed(parts.weight.buffer);
    step.bias = parts.bias.buffer < 0 ? nullptr : vector(parts.bias);
    step.activations = activations_;
    if (parts.norm_weight.buffer >= 0) {
      step.fusion.norm_weight = vector(parts.norm_weight);
      step.fusion.norm_eps = static_cast<float>(parts.norm_eps);
    }
    if (!parts.activation.empty()) {
      step.fusion.activation = ops::activation_from_name(parts.activation);
    }
    if (parts.residual.buffer >= 0) step.residual = slab(parts.residual);
    step.y = slab(parts.y);
    return step;
  }

  MoeStep moe(const Op& op) const {
    MoeStep step;
    step.x = slab(op.inputs[0]);
    step.router_logits = slab(op.inputs[1]);
    for (int64_t i = 0; i < MoeParts::num_experts(op); ++i) {
      step.experts.push_back({&weights_.packed(MoeParts::gate_up(op, i).buffer),
                              &weights_.packed(MoeParts::down(op, i).buffer)});
    }
    step.params.top_k = static_cast<int32_t>(op.attr_int("top_k", 0));
    step.params.renormalize = op.attr_int("renormalize", 0) != 0;
    step.params.activation = ops::activation_from_name(op.attr_string("kind", ""));
    step.params.activations = activations_;
    step.y = slab(op.outputs[0]);
    return step;
  }

  static ops::RotaryStyle rotary_style(const Op& op) {
    return op.attr_string("style", "") == "neox" ? ops::RotaryStyle::kNeox
                                                 : ops::RotaryStyle::kInterleaved;
  }

  const ops::KvCacheView& cache(const Op& op) const { return caches_[op.attr_int("layer", 0)]; }

  ops::AttentionParams attention_params(const Op& op) const {
    ops::AttentionParams params;
    params.num_heads = static_cast<int32_t>(op.attr_int("num_heads", 0));
    params.scale = static_cast<float>(op.attr_double("scale", 1));
    params.sliding_window = static_cast<int32_t>(op.attr_int("sliding_window", 0));
    params.soft_cap = static_cast<float>(op.attr_double("soft_cap", 0));
    params.activations = activations_;
    if (op.inputs.size() == 2) params.alibi_slopes = vector(op.inputs[1]);
    return params;
  }

  const Program& program_;
  const WorkspacePlan& plan_;
  const std::vector<float*>& regions_;
  const WeightStore& weights_;
  const std::vector<ops::KvCacheView>& caches_;
  ops::Activations activations_;
};

bool is_logits_op(const Program& program, const Op& op) {
  return !op.outputs.empty() && program.buffers()[op.outputs[0].buffer].rows == Rows::kLogits;
}

}  // namespace

CompiledProgram compile(const Program& program, const WorkspacePlan& plan,
                        const std::vector<float*>& regions, const WeightStore& weights,
                        const std::vector<ops::KvCacheView>& caches, ops::Activations activations) {
  const Compiler compiler(program, plan, regions, weights, caches, activations);
  CompiledProgram compiled;
  for (const Op& op : program.ops()) {
    auto& steps = is_logits_op(program, op) ? compiled.logits_steps : compiled.token_steps;
    steps.push_back(compiler.compile(op));
  }
  const BufferId output = program.output();
  compiled.output = compiler.slab({output, 0, program.buffers()[output].shape[0]});
  return compiled;
}

}  // namespace fastpage
