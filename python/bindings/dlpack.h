// Arrays of other libraries as TensorViews, without a copy: numpy arrays, and whatever speaks
// DLPack (https://dmlc.github.io/dlpack), on the CPU.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

#include "fastpage/tensor.h"

namespace fastpage {

// Keeps the source alive; must be destroyed with the GIL held.
class ImportedTensor {
 public:
  // Throws InvalidArgument, naming the argument `name`, for anything but a CPU tensor of at most
  // four dimensions and an element type that fastpage knows. source_dtype="bfloat16" reads a uint16
  // array as bfloat16 bits (numpy has no such type).
  ImportedTensor(pybind11::handle source, const char* name,
                 const std::optional<std::string>& source_dtype = std::nullopt);
  ~ImportedTensor();
  ImportedTensor(const ImportedTensor&) = delete;
  ImportedTensor& operator=(const ImportedTensor&) = delete;

  const TensorView& view() const { return view_; }
  const char* name() const { return name_; }

  // The same, checked: float32, two (one) dimensions, unit stride within a row.
  Matrix<const float> matrix() const;
  const float* vector(int64_t size) const;

 private:
  void import_numpy(const std::optional<std::string>& source_dtype);
  bool import_exchange_api(const std::optional<std::string>& source_dtype);
  void import_capsule(const std::optional<std::string>& source_dtype);

  const char* name_;
  TensorView view_;
  pybind11::object source_;
  void* managed_ = nullptr;  // DLManagedTensor[Versioned]
  void (*release_)(void*) = nullptr;
};

// A copy of a one-dimensional (or, if `columns` is given, two-dimensional) array of int32 or int64.
std::vector<int32_t> import_indices(pybind11::handle source, const char* name,
                                    int64_t* columns = nullptr);

}  // namespace fastpage
