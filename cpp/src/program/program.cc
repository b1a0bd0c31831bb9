#include "fastpage/program.h"

#include <cstdio>
#include <set>

#include "program/op_checks.h"

namespace fastpage {

namespace {

constexpr const char* kOpNames[] = {
    "embed",       "embed_positions",    "norm",   "linear",   "rotary",
    "write_cache", "rotary_write_cache", "attend", "activate", "scale",
    "clamp",       "soft_cap",           "add",    "moe",      "gather_rows"};

std::string rows_name(Rows rows) {
  return rows == Rows::kTokens ? "tokens" : rows == Rows::kLogits ? "logits" : "fixed";
}

std::string attr_to_string(const AttrValue& value) {
  if (const auto* i = std::get_if<int64_t>(&value)) return std::to_string(*i);
  if (const auto* s = std::get_if<std::string>(&value)) return '"' + *s + '"';
  char text[32];
  std::snprintf(text, sizeof(text), "%.9g", std::get<double>(value));
  return text;
}

}  // namespace

const char* op_name(OpKind kind) { return kOpNames[static_cast<int>(kind)]; }

OpKind op_from_name(const std::string& name) {
  std::string known;
  for (size_t i = 0; i < std::size(kOpNames); ++i) {
    if (name == kOpNames[i]) return static_cast<OpKind>(i);
    known += std::string(i == 0 ? "" : ", ") + kOpNames[i];
  }
  throw InvalidArgument("unknown op '" + name + "': one of " + known);
}

int64_t Op::attr_int(const std::string& name, int64_t fallback) const {
  const auto it = attrs.find(name);
  if (it == attrs.end()) return fallback;
  if (const auto* i = std::get_if<int64_t>(&it->second)) return *i;
  throw InvalidArgument(std::string(op_name(kind)) + ": attribute " + name + " must be an integer");
}

double Op::attr_double(const std::string& name, double fallback) const {
  const auto it = attrs.find(name);
  if (it == attrs.end()) return fallback;
  if (const auto* d = std::get_if<double>(&it->second)) return *d;
  if (const auto* i = std::get_if<int64_t>(&it->second)) return static_cast<double>(*i);
  throw InvalidArgument(std::string(op_name(kind)) + ": attribute " + name + " must be a number");
}

std::string Op::attr_string(const std::string& name, const std::string& fallback) const {
  const auto it = attrs.find(name);
  if (it == attrs.end()) return fallback;
  if (const auto* s = std::get_if<std::string>(&it->second)) return *s;
  throw InvalidArgument(std::string(op_name(kind)) + ": attribute " + name + " must be a string");
}

std::string shape_to_string(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

BufferId Program::add_activation(const std::string& name, Rows rows, int64_t cols) {
  if (rows == Rows::kFixed) {
    throw InvalidArgument("activation '" + name + "': rows are tokens or logits, not fixed");
  }
  if (cols <= 0) {
    throw InvalidArgument("activation '" + name + "': " + std::to_string(cols) +
                          " columns, at least 1 needed");
  }
  buffers_.push_back({name, Buffer::Kind::kActivation, rows, {cols}});
  return static_cast<BufferId>(buffers_.size() - 1);
}

BufferId Program::add_weight(const std::string& name, std::vector<int64_t> shape) {
  if (name.empty()) throw InvalidArgument("a weight needs a name");
  if (weight_names_.count(name) > 0) {
    throw InvalidArgument("weight '" + name + "' is declared twice");
  }
  if (shape.empty() || shape.size() > 2) {
    throw InvalidArgument("weight '" + name + "': shape " + shape_to_string(shape) +
                          ", one or two dimensions needed");
  }
  for (int64_t size : shape) {
    if (size <= 0) {
      throw InvalidArgument("weight '" + name + "': shape " + shape_to_string(shape) +
                            " has a dimension below 1");
    }
  }
  weight_names_.insert(name);
  buffers_.push_back({name, Buffer::Kind::kWeight, Rows::kFixed, std::move(shape)});
  return static_cast<BufferId>(buffers_.size() - 1);
}

void Program::add_op(Op op) {
  check_op(*this, op);
  ops_.push_back(std::move(op));
}

void Program::set_output(BufferId logits) {
  if (logits < 0 || logits >= static_cast<BufferId>(buffers_.size())) {
    throw InvalidArgument("output: there is no buffer " + std::to_string(logits));
  }
  if (buffers_[logits].rows != Rows::kLogits) {
    throw InvalidArgument("output: buffer '" + buffers_[logits].name +
                          "' must have a row per logit (gather_rows makes them)");
  }
  output_ = logits;
}

KvCacheSpec Program::kv_cache_spec() const {
  KvCacheSpec spec;
  std::set<int64_t> layers;
  for (const Op& op : ops_) {
    if (writes_cache(op.kind)) layers.insert(op.attr_int("layer", 0));
    if (op.kind != OpKind::kAttend) continue;
    const auto num_kv_heads = static_cast<int32_t>(op.attr_int("num_kv_heads", 0));
    const auto head_dim = static_cast<int32_t>(op.attr_int("head_dim", 0));
    if (spec.head_dim == 0) {
      spec.num_kv_heads = num_kv_heads;
      spec.head_dim = head_dim;
    } else if (spec.num_kv_heads != num_kv_heads || spec.head_dim != head_dim) {
      throw InvalidArgument("attend: layer " + std::to_string(op.attr_int("layer", 0)) + " has " +
                            std::to_string(num_kv_heads) + " KV heads of " +
                            std::to_string(head_dim) + ", earlier layers " +
                            std::to_string(spec.num_kv_heads) + " of " +
                            std::to_string(spec.head_dim));
    }
  }
  spec.num_layers = static_cast<int32_t>(layers.size());
  if (!layers.empty() && *layers.rbegin() + 1 != spec.num_layers) {
    throw InvalidArgument("write_cache: layers are numbered from 0 without gaps, but layer " +
                          std::to_string(*layers.rbegin()) + " is one of " +
                          std::to_string(spec.num_layers));
  }
  return spec;
}

int64_t Program::vocab_size() const { return output_ < 0 ? 0 : buffers_[output_].shape[0]; }

namespace {

// "%7", "%7[0:576]" for a range of columns, or a weight's name.
std::string operand_to_string(const Program& program, const Operand& operand) {
  const Buffer& buffer = program.buffers()[operand.buffer];
  if (buffer.kind == Buffer::Kind::kWeight) return buffer.name;
  std::string text = "%" + buffer.name;
  if (operand.offset != 0 || operand.cols != buffer.shape[0]) {
    text += "[" + std::to_string(operand.offset) + ":" +
            std::to_string(operand.offset + operand.cols) + "]";
  }
  return text;
}

// Of the many weights of a mixture, the first and the last.
std::string inputs_to_string(const Program& program, const Op& op) {
  std::string text;
  for (size_t i = 0; i < op.inputs.size(); ++i) {
    const bool is_long =
        op.kind == OpKind::kMoe && i == MoeParts::kFirstExpert + 1 && i + 1 < op.inputs.size();
    text += i == 0 ? "" : is_long ? " .. " : ", ";
    if (is_long) i = op.inputs.size() - 1;
    text += operand_to_string(program, op.inputs[i]);
  }
  return text;
}

std::string op_to_string(const Program& program, const Op& op) {
  std::string text;
  for (const Operand& out : op.outputs) {
    const Buffer& buffer = program.buffers()[out.buffer];
    text += operand_to_string(program, out) + ": " + rows_name(buffer.rows) + " x " +
            std::to_string(buffer.shape[0]) + " = ";
  }
  text += std::string(op_name(op.kind)) + "(" + inputs_to_string(program, op);
  const char* separator = op.inputs.empty() ? "" : ", ";
  for (const auto& [name, value] : op.attrs) {
    text += separator + name + "=" + attr_to_string(value);
    separator = ", ";
  }
  return text + ")";
}

}  // namespace

std::string Program::to_string() const {
  std::string text;
  for (const Buffer& buffer : buffers_) {
    if (buffer.kind != Buffer::Kind::kWeight) continue;
    text += "weight " + buffer.name + " " + shape_to_string(buffer.shape) + "\n";
  }
  for (const Op& op : ops_) text += op_to_string(*this, op) + "\n";
  if (output_ >= 0) text += "output %" + buffers_[output_].name + "\n";
  return text;
}

void Program::validate() const {
  if (output_ < 0) throw InvalidArgument("the program has no output: call set_output");
  Program replay;
  replay.buffers_ = buffers_;
  for (const Op& op : ops_) replay.add_op(op);
  bool written = false;
  for (const Op& op : ops_) {
    for (const Operand& out : op.outputs) written = written || out.buffer == output_;
  }
  if (!written) {
    throw InvalidArgument("output: buffer '" + buffers_[output_].name + "' is never written");
  }
  kv_cache_spec();
}

}  // namespace fastpage
