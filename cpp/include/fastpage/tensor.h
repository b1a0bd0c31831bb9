// Element types and strided views. A view owns nothing.
#pragma once

#include <array>

#include "fastpage/types.h"

namespace fastpage {

enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16, kInt32, kInt64, kInt8, kUInt8 };

size_t dtype_size(DType dtype);                  // bytes per element
const char* dtype_name(DType dtype);             // "float32", "bfloat16", ...
DType dtype_from_name(const std::string& name);  // throws InvalidArgument

// How a weight matrix is kept. int8: one scale per out_feature; the others of 8 and 4 bits are the
// blocks of GGUF (ggml's Q8_0, Q4_0, Q4_1): 32 in_features share an fp16 scale and, q4_1, an fp16
// minimum.
enum class WeightFormat : uint8_t { kFloat32, kBFloat16, kFloat16, kInt8, kQ8_0, kQ4_0, kQ4_1 };

const char* weight_format_name(WeightFormat format);            // "float32", "int8", "q4_1", ...
WeightFormat weight_format_from_name(const std::string& name);  // throws InvalidArgument
// Of float32, bfloat16 and float16; throws InvalidArgument for others.
WeightFormat weight_format_of(DType dtype);

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int32_t ndim = 0;
  std::array<int64_t, 4> shape{};
  std::array<int64_t, 4> strides{};  // in elements

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int32_t i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
};

// A row-major matrix [rows][cols] whose rows are `stride` elements apart: what the CPU ops take.
// Column slices of a wider matrix (q, k and v of a fused projection) are views of this kind.
template <typename T>
struct Matrix {
  T* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;

  Matrix() = default;
  Matrix(T* d, int64_t r, int64_t c) : data(d), rows(r), cols(c), stride(c) {}
  Matrix(T* d, int64_t r, int64_t c, int64_t s) : data(d), rows(r), cols(c), stride(s) {}
  template <typename U>
  Matrix(const Matrix<U>& m)
      : data(m.data), rows(m.rows), cols(m.cols), stride(m.stride) {}  // NOLINT
  T* row(int64_t i) const { return data + i * stride; }
};

}  // namespace fastpage
