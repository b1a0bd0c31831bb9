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

}  // namespace fastpage
