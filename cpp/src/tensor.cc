#include "fastpage/tensor.h"

namespace fastpage {

namespace {
struct DTypeInfo {
  DType dtype;
  const char* name;
  size_t size;
};
constexpr DTypeInfo kDTypes[] = {
    {DType::kFloat32, "float32", 4}, {DType::kBFloat16, "bfloat16", 2},
    {DType::kFloat16, "float16", 2}, {DType::kInt32, "int32", 4},
    {DType::kInt64, "int64", 8},     {DType::kInt8, "int8", 1},
    {DType::kUInt8, "uint8", 1},
};
constexpr const char* kWeightFormats[] = {"float32", "bfloat16", "float16", "int8",
                                          "q8_0",    "q4_0",     "q4_1"};
}  // namespace

size_t dtype_size(DType dtype) { return kDTypes[static_cast<int>(dtype)].size; }

const char* dtype_name(DType dtype) { return kDTypes[static_cast<int>(dtype)].name; }

DType dtype_from_name(const std::string& name) {
  for (const DTypeInfo& info : kDTypes) {
    if (name == info.name) return info.dtype;
  }
  throw InvalidArgument("unknown dtype '" + name +
                        "': one of float32, bfloat16, float16, int32, int64, int8, uint8");
}

const char* weight_format_name(WeightFormat format) {
  return kWeightFormats[static_cast<int>(format)];
}

WeightFormat weight_format_from_name(const std::string& name) {
  int i = 0;
  for (const char* format : kWeightFormats) {
    if (name == format) return static_cast<WeightFormat>(i);
    ++i;
  }
  throw InvalidArgument("unknown weight format '" + name +
                        "': one of float32, bfloat16, float16, int8, q8_0, q4_0, q4_1");
}

WeightFormat weight_format_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return WeightFormat::kFloat32;
    case DType::kBFloat16:
      return WeightFormat::kBFloat16;
    case DType::kFloat16:
      return WeightFormat::kFloat16;
    default:
      throw InvalidArgument(std::string("weights cannot be kept as ") + dtype_name(dtype) +
                            ": one of float32, bfloat16, float16");
  }
}

}  // namespace fastpage
