// Arrays of other libraries as TensorViews, without a copy: numpy arrays, and whatever speaks
// DLPack (https://dmlc.github.io/dlpack), on the CPU.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

#include "fastpage/tensor.h"

namespace fastpage {

struct DlTensor;

// Keeps the source alive; must be destroyed with the GIL held.
class ImportedTensor {
 public:
  // DLPack's numbers.
  enum class Device : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };

  // Throws InvalidArgument, naming the argument `name`, for anything but a tensor on `device` of at
  // most four dimensions and an element type that fastpage knows. source_dtype="bfloat16" reads a
  // uint16 array as bfloat16 bits (numpy has no such type).
  ImportedTensor(pybind11::handle source, const char* name,
                 const std::optional<std::string>& source_dtype = std::nullopt,
                 Device device = Device::kCpu);
  ~ImportedTensor();
  ImportedTensor(const ImportedTensor&) = delete;
  ImportedTensor& operator=(const ImportedTensor&) = delete;

  const TensorView& view() const { return view_; }
  const char* name() const { return name_; }
  int32_t device_index() const { return device_index_; }
  // The stream on which its library would use it now; null: the default one. Throws InvalidArgument
  // if the library does not say: to guess would be to race with it.
  void* current_stream() const;

  // The same, checked: float32, two (one) dimensions, unit stride within a row.
  Matrix<const float> matrix() const;
  const float* vector(int64_t size) const;

 private:
  void import_numpy(const std::optional<std::string>& source_dtype);
  bool import_exchange_api(const std::optional<std::string>& source_dtype);
  void import_capsule(const std::optional<std::string>& source_dtype);

  TensorView checked(const DlTensor& tensor, const std::optional<std::string>& source_dtype);

  const char* name_;
  Device device_;
  int32_t device_index_ = 0;
  TensorView view_;
  pybind11::object source_;
  void* managed_ = nullptr;  // DLManagedTensor[Versioned]
  void (*release_)(void*) = nullptr;
};

// A copy of a one-dimensional (or, if `columns` is given, two-dimensional) array of int32 or int64.
std::vector<int32_t> import_indices(pybind11::handle source, const char* name,
                                    int64_t* columns = nullptr);

// A copy of an array [n][2] of indices, as n structs of two.
template <typename Pair>
std::vector<Pair> import_pairs(pybind11::handle source, const char* name) {
  int64_t columns = 0;
  const std::vector<int32_t> indices = import_indices(source, name, &columns);
  if (columns != 2) throw InvalidArgument(std::string(name) + " must be an array [n][2]");
  std::vector<Pair> pairs;
  for (size_t i = 0; i < indices.size(); i += 2) pairs.push_back({indices[i], indices[i + 1]});
  return pairs;
}

}  // namespace fastpage
