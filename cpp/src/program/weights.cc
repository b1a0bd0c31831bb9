#include "program/weights.h"

#include <numeric>

#include "program/op_checks.h"

namespace fastpage {

namespace {

// ops::embed widens rows of any float type: here all of them, in order.
std::vector<float> to_float32(TensorView view, ThreadPool& pool) {
  if (view.ndim == 1) {
    view.shape = {1, view.shape[0]};
    view.strides = {view.shape[1], 1};
    view.ndim = 2;
  }
  std::vector<TokenId> rows(static_cast<size_t>(view.shape[0]));
  std::iota(rows.begin(), rows.end(), 0);
  std::vector<float> values(static_cast<size_t>(view.numel()));
  ops::embed(pool, rows, view, {values.data(), view.shape[0], view.shape[1]});
  return values;
}

}  // namespace

WeightStore::WeightStore(const Program& program, DType dtype, Quantization quantization)
    : program_(program),
      dtype_(dtype),
      quantization_(quantization),
      entries_(program.buffers().size()) {
  for (size_t i = 0; i < program.buffers().size(); ++i) {
    const Buffer& buffer = program.buffers()[i];
    if (buffer.kind == Buffer::Kind::kWeight) ids_[buffer.name] = static_cast<BufferId>(i);
  }
  std::vector<bool> is_routing(program.buffers().size());
  for (const Op& op : program.ops()) {
    if (op.kind == OpKind::kMoe) is_routing[op.inputs[1].buffer] = true;
  }
  for (const Op& op : program.ops()) {
    if (op.kind == OpKind::kEmbed) entries_[op.inputs[0].buffer].is_packed = true;
    if (op.kind == OpKind::kRotary) entries_[op.inputs[1].buffer].is_table = true;
    if (op.kind == OpKind::kRotaryWriteCache) entries_[op.inputs[3].buffer].is_table = true;
    if (op.kind == OpKind::kMoe) add_experts(op);
    if (op.kind != OpKind::kLinear) continue;
    Entry& entry = entries_[op.inputs[1].buffer];
    entry.is_int4 = !entry.is_packed && op.outputs[0].buffer != program.output();
    entry.is_float = is_routing[op.outputs[0].buffer];
    entry.is_packed = true;
    entry.read_by_a_row = 1.0;
  }
}

void WeightStore::add_experts(const Op& op) {
  const int64_t num_experts = MoeParts::num_experts(op);
  for (size_t i = MoeParts::kFirstExpert; i < op.inputs.size(); ++i) {
    Entry& entry = entries_[op.inputs[i].buffer];
    entry.is_int4 = !entry.is_packed;
    entry.is_packed = true;
    entry.read_by_a_row = static_cast<double>(op.attr_int("top_k", 0)) / num_experts;
  }
}

WeightFormat WeightStore::format_of(const Entry& entry) const {
  if (quantization_ == Quantization::kNone || entry.is_float) return weight_format_of(dtype_);
  return quantization_ == Quantization::kInt4 && entry.is_int4 ? WeightFormat::kQ4_1
                                                               : WeightFormat::kInt8;
}

WeightStore::Entry& WeightStore::entry_to_load(const std::string& name,
                                               const std::vector<int64_t>& shape) {
  const auto it = ids_.find(name);
  if (it == ids_.end()) throw InvalidArgument("the program has no weight '" + name + "'");
  const std::vector<int64_t>& expected = program_.buffers()[it->second].shape;
  if (shape != expected) {
    throw InvalidArgument("weight '" + name + "' has shape " + shape_to_string(shape) +
                          ", the program wants " + shape_to_string(expected));
  }
  Entry& entry = entries_[it->second];
  if (entry.is_loaded) throw InvalidArgument("weight '" + name + "' is loaded twice");
  return entry;
}

void WeightStore::load(const std::string& name, const TensorView& weight, ThreadPool& pool) {
  Entry& entry = entry_to_load(
      name, std::vector<int64_t>(weight.shape.begin(), weight.shape.begin() + weight.ndim));
  if (weight.dtype != DType::kFloat32 && weight.dtype != DType::kBFloat16 &&
      weight.dtype != DType::kFloat16) {
    throw InvalidArgument("weight '" + name + "' is " + dtype_name(weight.dtype) +
                          ": one of float32, bfloat16, float16 needed");
  }
  if (weight.strides[weight.ndim - 1] != 1 && weight.shape[weight.ndim - 1] > 1) {
    throw InvalidArgument("weight '" + name + "' must be contiguous within a row");
  }
  if (entry.is_packed) {
    try {
      entry.packed = ops::PackedWeight::pack(weight, format_of(entry), pool);
    } catch (const InvalidArgument& error) {
      throw InvalidArgument("weight '" + name + "': " + error.what());
    }
  }
  if (!entry.is_packed || entry.is_table) {
    entry.values = to_float32(weight, pool);
  }
  entry.is_loaded = true;
}

void WeightStore::load_blocks(const std::string& name, const TensorView& blocks,
                              WeightFormat format, ThreadPool& pool) {
  ops::PackedWeight packed;
  try {
    packed = ops::PackedWeight::pack_blocks(blocks, format, pool);
  } catch (const InvalidArgument& error) {
    throw InvalidArgument("weight '" + name + "': " + error.what());
  }
  Entry& entry = entry_to_load(name, {packed.out_features(), packed.in_features()});
  if (!entry.is_packed || entry.is_table) {
    throw InvalidArgument("weight '" + name + "' cannot be kept in blocks: give its values");
  }
  entry.packed = std::move(packed);
  entry.is_loaded = true;
}

void WeightStore::check_complete() const {
  std::string missing;
  int count = 0;
  for (const auto& [name, id] : ids_) {
    if (entries_[id].is_loaded) continue;
    if (count++ < 8) missing += (missing.empty() ? "" : ", ") + name;
  }
  if (count == 0) return;
  throw InvalidArgument(std::to_string(count) + " weight(s) not loaded: " + missing +
                        (count > 8 ? ", ..." : ""));
}

Matrix<const float> WeightStore::table(BufferId id) const {
  const std::vector<int64_t>& shape = program_.buffers()[id].shape;
  return {entries_[id].values.data(), shape.size() == 2 ? shape[0] : 1, shape.back()};
}

size_t WeightStore::linear_bytes() const {
  double bytes = 0;
  for (const Entry& entry : entries_) {
    bytes += entry.read_by_a_row * static_cast<double>(entry.packed.bytes());
  }
  return static_cast<size_t>(bytes);
}

}  // namespace fastpage
