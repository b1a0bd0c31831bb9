#include "program/op_checks.h"

#include <algorithm>
#include <initializer_list>
#include <limits>

#include "fastpage/ops.h"

namespace fastpage {

namespace {

// One op under examination: looks up its operands and words its errors.
class OpChecker {
 public:
  OpChecker(const Program& program, const Op& op) : program_(program), op_(op) {}

  void check() {
    check_operands_exist();
    switch (op_.kind) {
      case OpKind::kEmbed:
        return check_embed();
      case OpKind::kEmbedPositions:
        return check_embed_positions();
      case OpKind::kNorm:
        return check_norm();
      case OpKind::kLinear:
        return check_linear();
      case OpKind::kRotary:
        return check_rotary();
      case OpKind::kWriteCache:
        return check_write_cache();
      case OpKind::kRotaryWriteCache:
        return check_rotary_write_cache();
      case OpKind::kAttend:
        return check_attend();
      case OpKind::kActivate:
        return check_activate();
      case OpKind::kScale:
        return check_map("factor");
      case OpKind::kClamp:
        return check_map("limit");
      case OpKind::kSoftCap:
        return check_map("cap");
      case OpKind::kAdd:
        return check_add();
      case OpKind::kMoe:
        return check_moe();
      case OpKind::kGatherRows:
        return check_gather_rows();
    }
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw InvalidArgument("op " + std::to_string(program_.ops().size()) + " (" + op_name(op_.kind) +
                          "): " + what);
  }
  void require(bool condition, const std::string& what) const {
    if (!condition) fail(what);
  }

  // ---- operands

  const Buffer& buffer(const Operand& operand) const { return program_.buffers()[operand.buffer]; }

  std::string describe(const Operand& operand) const {
    const Buffer& b = buffer(operand);
    return b.kind == Buffer::Kind::kWeight
               ? "'" + b.name + "' " + shape_to_string(b.shape)
               : "'" + b.name + "' (" + std::to_string(operand.cols) + " columns)";
  }

  bool is_written(BufferId id) const {
    return std::any_of(program_.ops().begin(), program_.ops().end(), [&](const Op& op) {
      return std::any_of(op.outputs.begin(), op.outputs.end(),
                         [&](const Operand& out) { return out.buffer == id; });
    });
  }

  void check_operands_exist() const {
    const auto count = static_cast<BufferId>(program_.buffers().size());
    for (const std::vector<Operand>* operands : {&op_.inputs, &op_.outputs}) {
      for (const Operand& operand : *operands) {
        require(operand.buffer >= 0 && operand.buffer < count,
                "there is no buffer " + std::to_string(operand.buffer));
      }
    }
  }

  void check_counts(size_t min_inputs, size_t max_inputs, size_t outputs) const {
    require(op_.inputs.size() >= min_inputs && op_.inputs.size() <= max_inputs,
            std::to_string(op_.inputs.size()) + " inputs, " + std::to_string(min_inputs) +
                (max_inputs > min_inputs ? " to " + std::to_string(max_inputs) : "") + " needed");
    require(op_.outputs.size() == outputs, std::to_string(op_.outputs.size()) + " outputs, " +
                                               std::to_string(outputs) + " needed");
  }

  // An input that is an activation: a range of columns of a buffer already written.
  const Operand& activation(size_t index) const {
    const Operand& x = op_.inputs[index];
    const Buffer& b = buffer(x);
    require(
        b.kind == Buffer::Kind::kActivation,
        "input " + std::to_string(index) + " must be an activation, not weight '" + b.name + "'");
    require(x.offset >= 0 && x.cols > 0 && x.offset + x.cols <= b.shape[0],
            "columns [" + std::to_string(x.offset) + ", " + std::to_string(x.offset + x.cols) +
                ") of '" + b.name + "', which has " + std::to_string(b.shape[0]));
    require(is_written(x.buffer), "'" + b.name + "' is read before it is written");
    return x;
  }

  // An input that is a weight, whole, of `ndim` dimensions.
  const Buffer& weight(size_t index, size_t ndim) const {
    const Operand& w = op_.inputs[index];
    const Buffer& b = buffer(w);
    require(b.kind == Buffer::Kind::kWeight,
            "input " + std::to_string(index) + " must be a weight, not '" + b.name + "'");
    require(w.offset == 0 && w.cols == 0, "weight '" + b.name + "' must be used whole");
    require(b.shape.size() == ndim,
            "weight " + describe(w) + " must have " + std::to_string(ndim) + " dimension(s)");
    return b;
  }

  // An output: a whole activation of `cols` columns, written here and nowhere else.
  void check_output(Rows rows, int64_t cols, size_t index = 0) const {
    const Operand& y = op_.outputs[index];
    const Buffer& b = buffer(y);
    require(b.kind == Buffer::Kind::kActivation, "weight '" + b.name + "' cannot be written");
    require(y.offset == 0 && y.cols == b.shape[0], "output '" + b.name + "' must be written whole");
    require(!is_written(y.buffer), "'" + b.name + "' is written twice");
    require(b.rows == rows, "output '" + b.name + "' must have rows of the same kind as its input");
    require(y.cols == cols,
            "output " + describe(y) + " must have " + std::to_string(cols) + " columns");
    check_phase(rows);
  }

  // Once rows are gathered, what follows runs slice by slice: nothing may touch token rows again.
  void check_phase(Rows rows) const {
    if (rows != Rows::kTokens) return;
    for (const Op& op : program_.ops()) {
      require(op.kind != OpKind::kGatherRows, "an op on token rows cannot follow gather_rows");
    }
  }

  // ---- attributes

  void check_attrs(std::initializer_list<const char*> known) const {
    for (const auto& entry : op_.attrs) {
      require(std::find(known.begin(), known.end(), entry.first) != known.end(),
              "unknown attribute " + entry.first);
    }
  }

  int64_t positive(const char* name) const {
    const int64_t value = op_.attr_int(name, 0);
    require(value > 0 && value <= INT32_MAX, std::string("attribute ") + name + " is " +
                                                 std::to_string(value) +
                                                 ", a positive number needed");
    return value;
  }

  int64_t non_negative(const char* name) const {
    const int64_t value = op_.attr_int(name, -1);
    require(value >= 0 && value <= INT32_MAX,
            std::string("attribute ") + name + " must be given, 0 or more");
    return value;
  }

  void one_of(const char* name, std::initializer_list<const char*> values) const {
    const std::string value = op_.attr_string(name, "");
    std::string known;
    for (const char* v : values) {
      if (value == v) return;
      known += (known.empty() ? "" : ", ") + std::string(v);
    }
    fail(std::string("attribute ") + name + " is '" + value + "': one of " + known);
  }

  ops::Activation activation_of(const char* name) const {
    try {
      return ops::activation_from_name(op_.attr_string(name, ""));
    } catch (const InvalidArgument& error) {
      fail(std::string("attribute ") + name + ": " + error.what());
    }
  }

  // ---- the kinds

  void check_embed() const {
    check_counts(1, 1, 1);
    check_attrs({});
    check_output(Rows::kTokens, weight(0, 2).shape[1]);
  }

  void check_embed_positions() const {
    check_counts(1, 1, 1);
    check_attrs({"offset"});
    const Buffer& table = weight(0, 2);
    require(non_negative("offset") < table.shape[0],
            "offset lies past the rows of " + describe(op_.inputs[0]));
    check_output(Rows::kTokens, table.shape[1]);
  }

  void check_norm() const {
    const bool has_residual = op_.attrs.count("residual") > 0;
    check_counts(2u + has_residual, 3u + has_residual, 1u + has_residual);
    check_attrs({"kind", "eps", "group", "residual"});
    require(!has_residual || op_.attr_int("residual", 0) == 1, "attribute residual must be 1");
    const NormParts parts = NormParts::of(op_);
    one_of("kind", {"rms", "layer"});
    const Operand& x = activation(0);
    const int64_t group = op_.attr_int("group", x.cols);
    require(group > 0 && x.cols % group == 0,
            "group " + std::to_string(group) + " does not divide the columns of " + describe(x));
    const int64_t width = weight(1, 1).shape[0];
    require(width == group || width == x.cols, "weight " + describe(op_.inputs[1]) + " must be [" +
                                                   std::to_string(group) + "] or [" +
                                                   std::to_string(x.cols) + "]");
    require(parts.bias.buffer < 0 || weight(2, 1).shape[0] == width,
            "bias and weight " + describe(op_.inputs[1]) + " differ in shape");
    require(op_.attr_double("eps", -1) >= 0, "attribute eps must be given, 0 or more");
    check_output(buffer(x).rows, x.cols);
    if (!has_residual) return;
    const Operand& residual = activation(op_.inputs.size() - 1);
    require(residual.cols == x.cols && buffer(residual).rows == buffer(x).rows,
            "residual " + describe(residual) + " differs in shape from what it is added to");
    require(parts.sum.buffer != parts.y.buffer, "both outputs are " + describe(parts.y));
    check_output(buffer(x).rows, x.cols, 1);
  }

  void check_linear() const {
    const size_t fused =
        (op_.attrs.count("norm_eps") ? 1 : 0) + (op_.attrs.count("residual") ? 1 : 0);
    check_counts(2 + fused, 3 + fused, 1);
    check_attrs({"norm_eps", "activation", "residual"});
    const LinearParts parts = LinearParts::of(op_);
    const Operand& x = activation(0);
    const Buffer& w = weight(1, 2);
    require(w.shape[1] == x.cols,
            "weight " + describe(op_.inputs[1]) + " does not fit input " + describe(x));
    size_t next = 2;
    if (parts.bias.buffer >= 0) {
      require(weight(next, 1).shape[0] == w.shape[0],
              "bias " + describe(parts.bias) + " does not fit weight " + describe(parts.weight));
      ++next;
    }
    if (parts.norm_weight.buffer >= 0) {
      require(weight(next, 1).shape[0] == x.cols,
              "norm weight " + describe(parts.norm_weight) + " does not fit input " + describe(x));
      require(parts.norm_eps >= 0, "attribute norm_eps is negative");
      ++next;
    }
    int64_t cols = w.shape[0];
    if (!parts.activation.empty()) {
      if (activation_of("activation").is_gated) {
        require(cols % 2 == 0, "weight " + describe(parts.weight) + " must hold gate and up");
        cols /= 2;
      }
    }
    if (parts.residual.buffer >= 0) {
      const Operand& residual = activation(next);
      require(residual.cols == cols && buffer(residual).rows == buffer(x).rows,
              "residual " + describe(residual) + " differs in shape from what it is added to");
    }
    check_output(buffer(x).rows, cols);
  }

  // Of input `index`, with the table at input `table`.
  void check_rotated(size_t index, size_t table) const {
    one_of("style", {"neox", "interleaved"});
    const Operand& x = activation(index);
    const int64_t head_dim = positive("head_dim");
    require(x.cols % head_dim == 0, "head_dim " + std::to_string(head_dim) +
                                        " does not divide the columns of " + describe(x));
    const int64_t rotary_dim = weight(table, 2).shape[1];
    require(rotary_dim <= head_dim && rotary_dim % 2 == 0,
            "table " + describe(op_.inputs[table]) +
                " must have an even width of at most head_dim " + std::to_string(head_dim));
    require(buffer(x).rows == Rows::kTokens, "positions belong to token rows");
  }

  void check_rotary() const {
    check_counts(2, 2, 1);
    check_attrs({"head_dim", "style"});
    check_rotated(0, 1);
    check_output(Rows::kTokens, op_.inputs[0].cols);
  }

  void check_rotary_write_cache() const {
    const bool is_normed = op_.attrs.count("norm_eps") > 0;
    check_counts(is_normed ? 6 : 4, is_normed ? 6 : 4, 1);
    check_attrs({"layer", "head_dim", "style", "norm_eps"});
    for (size_t i = 4; i < op_.inputs.size(); ++i) {
      require(weight(i, 1).shape[0] == op_.attr_int("head_dim", 0),
              "weight " + describe(op_.inputs[i]) + " must be [head_dim]");
    }
    require(op_.attr_double("norm_eps", 0) >= 0, "attribute norm_eps is negative");
    check_rotated(0, 3);
    check_rotated(1, 3);
    check_cache_inputs();
    check_output(Rows::kTokens, op_.inputs[0].cols);
  }

  void check_write_cache() const {
    check_counts(2, 2, 0);
    check_attrs({"layer"});
    check_cache_inputs();
    check_phase(Rows::kTokens);
  }

  void check_cache_inputs() const {
    const size_t first = first_cache_input(op_.kind);
    const Operand& k = activation(first);
    const Operand& v = activation(first + 1);
    require(k.cols == v.cols, "k " + describe(k) + " and v " + describe(v) + " differ in width");
    require(buffer(k).rows == Rows::kTokens && buffer(v).rows == Rows::kTokens,
            "k and v must have a row per token");
    const int64_t layer = non_negative("layer");
    for (const Op& op : program_.ops()) {
      require(!writes_cache(op.kind) || op.attr_int("layer", 0) != layer,
              "layer " + std::to_string(layer) + " is written twice");
    }
  }

  void check_attend() const {
    check_counts(1, 2, 1);
    check_attrs(
        {"layer", "num_heads", "num_kv_heads", "head_dim", "scale", "sliding_window", "soft_cap"});
    const Operand& q = activation(0);
    const int64_t num_heads = positive("num_heads");
    const int64_t num_kv_heads = positive("num_kv_heads");
    const int64_t head_dim = positive("head_dim");
    require(num_heads % num_kv_heads == 0, std::to_string(num_heads) + " heads cannot share " +
                                               std::to_string(num_kv_heads) + " KV heads evenly");
    require(q.cols == num_heads * head_dim, "q " + describe(q) + " is not " +
                                                std::to_string(num_heads) + " heads of " +
                                                std::to_string(head_dim));
    require(op_.attr_double("scale", 0) > 0, "attribute scale must be given, above 0");
    require(op_.attr_int("sliding_window", 0) >= 0, "attribute sliding_window is negative");
    require(op_.attr_double("soft_cap", 0) >= 0, "attribute soft_cap is negative");
    if (op_.inputs.size() == 2) {
      require(weight(1, 1).shape[0] == num_heads,
              "ALiBi slopes " + describe(op_.inputs[1]) + " must be [num_heads]");
    }
    check_cache_written(non_negative("layer"), num_kv_heads * head_dim);
    check_output(buffer(q).rows, q.cols);
    require(buffer(q).rows == Rows::kTokens, "q must have a row per token");
  }

  void check_cache_written(int64_t layer, int64_t cols) const {
    for (const Op& op : program_.ops()) {
      if (!writes_cache(op.kind) || op.attr_int("layer", 0) != layer) continue;
      const int64_t held = op.inputs[first_cache_input(op.kind)].cols;
      require(held == cols, "the cache of layer " + std::to_string(layer) + " holds " +
                                std::to_string(held) + " columns, not " + std::to_string(cols));
      return;
    }
    fail("the cache of layer " + std::to_string(layer) + " is read before it is written");
  }

  void check_activate() const {
    check_counts(1, 1, 1);
    check_attrs({"kind"});
    const bool is_gated = activation_of("kind").is_gated;
    const Operand& x = activation(0);
    require(!is_gated || x.cols % 2 == 0,
            "x " + describe(x) + " must hold gate and up side by side");
    check_output(buffer(x).rows, is_gated ? x.cols / 2 : x.cols);
  }

  // One activation in, one of the same shape out, and a number above 0, also as a float.
  void check_map(const char* attribute) const {
    check_counts(1, 1, 1);
    check_attrs({attribute});
    const double value = op_.attr_double(attribute, 0);
    using Limits = std::numeric_limits<float>;
    require(value >= Limits::min() && value <= Limits::max(),
            std::string("attribute ") + attribute + " must be given, a number above 0");
    const Operand& x = activation(0);
    check_output(buffer(x).rows, x.cols);
  }

  void check_add() const {
    check_counts(2, 2, 1);
    check_attrs({});
    const Operand& a = activation(0);
    const Operand& b = activation(1);
    require(a.cols == b.cols && buffer(a).rows == buffer(b).rows,
            describe(a) + " and " + describe(b) + " differ in shape");
    check_output(buffer(a).rows, a.cols);
  }

  void check_moe() const {
    require(op_.inputs.size() >= 4 && op_.inputs.size() % 2 == 0,
            std::to_string(op_.inputs.size()) +
                " inputs: x, router_logits, and gate_up and down of each expert needed");
    check_counts(op_.inputs.size(), op_.inputs.size(), 1);
    check_attrs({"top_k", "renormalize", "kind"});
    require(activation_of("kind").is_gated, "attribute kind must be of a gate, as silu_and_mul");
    const Operand& x = activation(0);
    const Operand& logits = activation(1);
    const int64_t num_experts = MoeParts::num_experts(op_);
    require(logits.cols == num_experts && buffer(logits).rows == buffer(x).rows,
            "router_logits " + describe(logits) +
                " must have a row like x and a column for each of " + std::to_string(num_experts) +
                " experts");
    require(positive("top_k") <= num_experts,
            "attribute top_k is " + std::to_string(op_.attr_int("top_k", 0)) + ", there are " +
                std::to_string(num_experts) + " experts");
    require(non_negative("renormalize") <= 1, "attribute renormalize must be 0 or 1");
    check_experts(x.cols);
    check_output(buffer(x).rows, x.cols);
  }

  void check_experts(int64_t hidden) const {
    const int64_t width = weight(MoeParts::kFirstExpert + 1, 2).shape[1];
    for (size_t i = MoeParts::kFirstExpert; i < op_.inputs.size(); i += 2) {
      if (weight(i, 2).shape == std::vector<int64_t>{2 * width, hidden} &&
          weight(i + 1, 2).shape == std::vector<int64_t>{hidden, width}) {
        continue;
      }
      fail("expert weights " + describe(op_.inputs[i]) + " and " + describe(op_.inputs[i + 1]) +
           " must be " + shape_to_string({2 * width, hidden}) + " and " +
           shape_to_string({hidden, width}));
    }
  }

  void check_gather_rows() const {
    check_counts(1, 1, 1);
    check_attrs({});
    const Operand& x = activation(0);
    require(buffer(x).rows == Rows::kTokens, "x " + describe(x) + " must have a row per token");
    check_output(Rows::kLogits, x.cols);
  }

  const Program& program_;
  const Op& op_;
};

}  // namespace

void check_op(const Program& program, const Op& op) { OpChecker(program, op).check(); }

bool writes_cache(OpKind kind) {
  return kind == OpKind::kWriteCache || kind == OpKind::kRotaryWriteCache;
}

size_t first_cache_input(OpKind kind) { return kind == OpKind::kRotaryWriteCache ? 1 : 0; }

LinearParts LinearParts::of(const Op& op) {
  const bool has_norm = op.attrs.count("norm_eps") > 0;
  const bool has_residual = op.attr_int("residual", 0) != 0;
  const bool has_bias = op.inputs.size() > 2u + has_norm + has_residual;
  LinearParts parts;
  size_t next = 0;
  parts.x = op.inputs[next++];
  parts.weight = op.inputs[next++];
  if (has_bias) parts.bias = op.inputs[next++];
  if (has_norm) parts.norm_weight = op.inputs[next++];
  if (has_residual) parts.residual = op.inputs[next++];
  parts.norm_eps = op.attr_double("norm_eps", 0);
  parts.activation = op.attr_string("activation", "");
  parts.y = op.outputs[0];
  return parts;
}

Op LinearParts::op() const {
  Op op{OpKind::kLinear, {x, weight}, {y}, {}};
  if (bias.buffer >= 0) op.inputs.push_back(bias);
  if (norm_weight.buffer >= 0) {
    op.inputs.push_back(norm_weight);
    op.attrs["norm_eps"] = norm_eps;
  }
  if (!activation.empty()) op.attrs["activation"] = activation;
  if (residual.buffer >= 0) {
    op.inputs.push_back(residual);
    op.attrs["residual"] = int64_t{1};
  }
  return op;
}

NormParts NormParts::of(const Op& op) {
  NormParts parts;
  parts.x = op.inputs[0];
  parts.weight = op.inputs[1];
  parts.y = op.outputs[0];
  const bool has_residual = op.attr_int("residual", 0) != 0;
  if (op.inputs.size() > 2u + has_residual) parts.bias = op.inputs[2];
  if (has_residual) {
    parts.residual = op.inputs.back();
    parts.sum = op.outputs[1];
  }
  return parts;
}

bool may_run_in_place(OpKind kind, size_t index) {
  switch (kind) {
    case OpKind::kRotary:
    case OpKind::kScale:
    case OpKind::kClamp:
    case OpKind::kSoftCap:
      return index == 0;
    case OpKind::kNorm:  // x, or the residual
    case OpKind::kAdd:
      return true;
    default:
      return false;
  }
}

}  // namespace fastpage
