#include "program/weights.h"

#include <cstring>

#include "program/op_checks.h"

namespace fastpage {

namespace {

float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 0x1f;
  const uint32_t mantissa = half & 0x3ff;
  if (exponent == 0) {
    const float value = static_cast<float>(mantissa) * (1.0f / (1 << 24));
    return sign != 0 ? -value : value;
  }
  const uint32_t wide_exponent = exponent == 31 ? 255 : exponent + 112;
  return bits_to_float(sign | wide_exponent << 23 | mantissa << 13);
}

float element(const TensorView& view, int64_t index) {
  switch (view.dtype) {
    case DType::kFloat32:
      return view.as<const float>()[index];
    case DType::kBFloat16:
      return bits_to_float(static_cast<uint32_t>(view.as<const uint16_t>()[index]) << 16);
    default:
      return half_to_float(view.as<const uint16_t>()[index]);
  }
}

std::vector<float> to_float32(const TensorView& view) {
  const int64_t rows = view.ndim == 2 ? view.shape[0] : 1;
  const int64_t cols = view.shape[view.ndim - 1];
  std::vector<float> values;
  values.reserve(static_cast<size_t>(rows * cols));
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t begin = view.ndim == 2 ? i * view.strides[0] : 0;
    for (int64_t j = 0; j < cols; ++j) {
      values.push_back(element(view, begin + j * view.strides[view.ndim - 1]));
    }
  }
  return values;
}

}  // namespace

WeightStore::WeightStore(const Program& program, DType dtype)
    : program_(program), dtype_(dtype), entries_(program.buffers().size()) {
  for (size_t i = 0; i < program.buffers().size(); ++i) {
    const Buffer& buffer = program.buffers()[i];
    if (buffer.kind == Buffer::Kind::kWeight) ids_[buffer.name] = static_cast<BufferId>(i);
  }
  for (const Op& op : program.ops()) {
    if (op.kind == OpKind::kEmbed) entries_[op.inputs[0].buffer].is_packed = true;
    if (op.kind != OpKind::kLinear) continue;
    entries_[op.inputs[1].buffer].is_packed = true;
    entries_[op.inputs[1].buffer].is_linear = true;
  }
}

void WeightStore::load(const std::string& name, const TensorView& weight, ThreadPool& pool) {
  const auto it = ids_.find(name);
  if (it == ids_.end()) throw InvalidArgument("the program has no weight '" + name + "'");
  const std::vector<int64_t>& expected = program_.buffers()[it->second].shape;
  const std::vector<int64_t> shape(weight.shape.begin(), weight.shape.begin() + weight.ndim);
  if (shape != expected) {
    throw InvalidArgument("weight '" + name + "' has shape " + shape_to_string(shape) +
                          ", the program wants " + shape_to_string(expected));
  }
  if (weight.dtype != DType::kFloat32 && weight.dtype != DType::kBFloat16 &&
      weight.dtype != DType::kFloat16) {
    throw InvalidArgument("weight '" + name + "' is " + dtype_name(weight.dtype) +
                          ": one of float32, bfloat16, float16 needed");
  }
  Entry& entry = entries_[it->second];
  if (entry.is_loaded) throw InvalidArgument("weight '" + name + "' is loaded twice");
  if (entry.is_packed) {
    entry.packed = ops::PackedWeight::pack(weight, dtype_, pool);
  } else {
    entry.values = to_float32(weight);
  }
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
  size_t bytes = 0;
  for (const Entry& entry : entries_) {
    if (entry.is_linear && entry.is_loaded) bytes += entry.packed.bytes();
  }
  return bytes;
}

}  // namespace fastpage
