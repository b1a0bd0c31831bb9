#include "dlpack.h"

#include <pybind11/numpy.h>

#include <cstring>
#include <limits>

namespace fastpage {

namespace py = pybind11;

// The C structures of DLPack 1.x, as its specification lays them out.
struct DlDevice {
  int32_t type;
  int32_t id;
};
struct DlDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};
struct DlTensor {
  void* data;
  DlDevice device;
  int32_t ndim;
  DlDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: row-major
  uint64_t byte_offset;
};

namespace {

enum DlCode : uint8_t { kDlInt = 0, kDlUInt = 1, kDlFloat = 2, kDlBfloat = 4 };

struct DlManagedTensor {
  DlTensor tensor;
  void* context;
  void (*deleter)(DlManagedTensor*);
};
struct DlVersion {
  uint32_t major;
  uint32_t minor;
};
struct DlManagedTensorVersioned {
  DlVersion version;
  void* context;
  void (*deleter)(DlManagedTensorVersioned*);
  uint64_t flags;
  DlTensor tensor;
};
struct DlExchangeApi {
  DlVersion version;
  DlExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*tensor_from_py_object)(void* object, DlTensor* out);  // borrowed; may be null
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out);  // may be null
};

[[noreturn]] void fail(const char* name, const std::string& what) {
  throw InvalidArgument(std::string(name) + " " + what);
}

DType element_dtype(const char* name, DlDataType type,
                    const std::optional<std::string>& source_dtype) {
  if (source_dtype.has_value()) {
    if (*source_dtype != "bfloat16") {
      fail(name, "has source_dtype '" + *source_dtype + "': only bfloat16 needs one");
    }
    if (type.bits != 16 || (type.code != kDlUInt && type.code != kDlBfloat)) {
      fail(name, "must be uint16 to hold bfloat16 bits");
    }
    return DType::kBFloat16;
  }
  const auto is = [&](uint8_t code, uint8_t bits) {
    return type.code == code && type.bits == bits && type.lanes == 1;
  };
  if (is(kDlFloat, 32)) return DType::kFloat32;
  if (is(kDlFloat, 16)) return DType::kFloat16;
  if (is(kDlBfloat, 16)) return DType::kBFloat16;
  if (is(kDlInt, 32)) return DType::kInt32;
  if (is(kDlInt, 64)) return DType::kInt64;
  if (is(kDlInt, 8)) return DType::kInt8;
  if (is(kDlUInt, 8)) return DType::kUInt8;
  if (is(kDlUInt, 16)) fail(name, "is uint16: say source_dtype=\"bfloat16\" if that is meant");
  fail(name, "has an element type that fastpage does not know (" + std::to_string(type.bits) +
                 " bits): float32, bfloat16, float16, int32, int64, int8 or uint8 is needed");
}

TensorView view_of(const char* name, const DlTensor& tensor,
                   const std::optional<std::string>& source_dtype) {
  TensorView view;
  if (tensor.ndim > static_cast<int32_t>(view.shape.size())) {
    fail(name, "has " + std::to_string(tensor.ndim) + " dimensions: at most 4 are supported");
  }
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.dtype = element_dtype(name, tensor.dtype, source_dtype);
  view.ndim = tensor.ndim;
  int64_t stride = 1;
  for (int32_t i = tensor.ndim - 1; i >= 0; --i) {
    view.shape[i] = tensor.shape[i];
    view.strides[i] = tensor.strides != nullptr ? tensor.strides[i] : stride;
    stride *= tensor.shape[i];
  }
  return view;
}

const DlExchangeApi* exchange_api(PyTypeObject* type) {
  // Tensors come from one library as a rule: remember the last type asked (under the GIL; types
  // that die are the reason to hold a reference).
  static PyTypeObject* last_type = nullptr;
  static const DlExchangeApi* last_api = nullptr;
  if (type == last_type) return last_api;
  const DlExchangeApi* api = nullptr;
  PyObject* capsule =
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (capsule != nullptr && PyCapsule_IsValid(capsule, "dlpack_exchange_api")) {
    api = static_cast<const DlExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    while (api != nullptr && api->version.major != 1) api = api->previous;
    if (api != nullptr && api->tensor_from_py_object == nullptr) api = nullptr;
  }
  Py_XDECREF(capsule);
  PyErr_Clear();
  Py_INCREF(type);
  Py_XDECREF(last_type);
  last_type = type;
  last_api = api;
  return api;
}

void check_device(const char* name, int32_t type, ImportedTensor::Device wanted) {
  using Device = ImportedTensor::Device;
  if (type == static_cast<int32_t>(wanted)) return;
  // Pinned memory is the CPU's: some ways to export a tensor name it so, others do not.
  if (wanted == Device::kCpu && type == static_cast<int32_t>(Device::kCudaHost)) return;
  const char* const device = wanted == Device::kCpu ? "CPU" : "CUDA";
  fail(name, std::string("is not in ") + device + " memory (DLPack device type " +
                 std::to_string(type) + "): move it there first");
}

}  // namespace

TensorView ImportedTensor::checked(const DlTensor& tensor,
                                   const std::optional<std::string>& source_dtype) {
  check_device(name_, tensor.device.type, device_);
  device_index_ = tensor.device.id;
  return view_of(name_, tensor, source_dtype);
}

void* ImportedTensor::current_stream() const {
  const DlExchangeApi* api = exchange_api(Py_TYPE(source_.ptr()));
  if (api == nullptr || api->current_work_stream == nullptr) {
    fail(name_, std::string("is a ") + Py_TYPE(source_.ptr())->tp_name +
                    ", which does not tell its current stream by DLPack's exchange API: a tensor "
                    "of torch >= 2.11 is needed");
  }
  void* stream = nullptr;
  if (api->current_work_stream(static_cast<int32_t>(device_), device_index_, &stream) != 0) {
    py::error_already_set error;
    fail(name_, std::string("has no current stream: ") + error.what());
  }
  return stream;
}

ImportedTensor::ImportedTensor(py::handle source, const char* name,
                               const std::optional<std::string>& source_dtype, Device device)
    : name_(name), device_(device), source_(py::reinterpret_borrow<py::object>(source)) {
  if (py::isinstance<py::array>(source)) {
    import_numpy(source_dtype);
  } else if (!import_exchange_api(source_dtype)) {
    import_capsule(source_dtype);
  }
}

ImportedTensor::~ImportedTensor() {
  if (release_ != nullptr) release_(managed_);
}

// numpy's own __dlpack__ refuses read-only arrays (memory-mapped weights) up to numpy 2.0.
void ImportedTensor::import_numpy(const std::optional<std::string>& source_dtype) {
  const auto array = py::reinterpret_borrow<py::array>(source_);
  const auto type = array.dtype();
  const char order = type.byteorder();
  const char kind = type.kind();
  const int64_t size = type.itemsize();
  if (size == 0) fail(name_, "has elements of no size");
  DlDataType element{0xff, static_cast<uint8_t>(size * 8), 1};
  if (kind == 'f') element.code = kDlFloat;
  if (kind == 'i') element.code = kDlInt;
  if (kind == 'u') element.code = kDlUInt;
  if (order != '=' && order != '|') element.code = 0xff;
  int64_t shape[4];
  int64_t strides[4];
  const int32_t ndim = static_cast<int32_t>(array.ndim());
  for (int32_t i = 0; i < ndim && i < 4; ++i) {
    shape[i] = array.shape(i);
    strides[i] = array.strides(i) / size;
    if (shape[i] > 1 && array.strides(i) % size != 0) {
      fail(name_, "has strides that are no multiple of its element size: copy it");
    }
  }
  const DlTensor tensor{const_cast<void*>(array.data()),
                        {static_cast<int32_t>(Device::kCpu), 0},
                        ndim,
                        element,
                        shape,
                        strides,
                        0};
  view_ = checked(tensor, source_dtype);
}

bool ImportedTensor::import_exchange_api(const std::optional<std::string>& source_dtype) {
  const DlExchangeApi* api = exchange_api(Py_TYPE(source_.ptr()));
  if (api == nullptr) return false;
  DlTensor tensor;
  if (api->tensor_from_py_object(source_.ptr(), &tensor) != 0) {
    py::error_already_set error;
    fail(name_, std::string("cannot be read: ") + error.what());
  }
  view_ = checked(tensor, source_dtype);
  return true;
}

void ImportedTensor::import_capsule(const std::optional<std::string>& source_dtype) {
  if (!py::hasattr(source_, "__dlpack__") || !py::hasattr(source_, "__dlpack_device__")) {
    fail(name_, std::string("is a ") + Py_TYPE(source_.ptr())->tp_name +
                    ": a numpy array, a torch tensor or another DLPack tensor is needed");
  }
  const auto device = source_.attr("__dlpack_device__")().cast<py::tuple>();
  check_device(name_, device[0].cast<int32_t>(), device_);
  py::object capsule;
  try {
    capsule = source_.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(1, 0));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError))
      fail(name_, std::string("cannot be read: ") + error.what());
    capsule = source_.attr("__dlpack__")();  // a producer from before DLPack 1.0
  }
  // A consumed capsule is renamed, and whoever consumed it calls the deleter.
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    auto* managed = static_cast<DlManagedTensorVersioned*>(
        PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    if (managed->version.major != 1) fail(name_, "speaks a DLPack version other than 1");
    view_ = checked(managed->tensor, source_dtype);  // before the tensor is ours: may throw
    PyCapsule_SetName(capsule.ptr(), "used_dltensor_versioned");
    managed_ = managed;
    release_ = [](void* p) {
      auto* m = static_cast<DlManagedTensorVersioned*>(p);
      if (m->deleter != nullptr) m->deleter(m);
    };
  } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
    auto* managed = static_cast<DlManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    view_ = checked(managed->tensor, source_dtype);
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");
    managed_ = managed;
    release_ = [](void* p) {
      auto* m = static_cast<DlManagedTensor*>(p);
      if (m->deleter != nullptr) m->deleter(m);
    };
  } else {
    fail(name_, "gave no DLPack capsule");
  }
}

Matrix<const float> ImportedTensor::matrix() const {
  if (view_.dtype != DType::kFloat32) {
    fail(name_, std::string("is ") + dtype_name(view_.dtype) + ": float32 is needed");
  }
  if (view_.ndim != 2) {
    fail(name_, "has " + std::to_string(view_.ndim) + " dimensions: [rows][cols] is needed");
  }
  if (view_.numel() > 0 && view_.shape[1] > 1 && view_.strides[1] != 1) {
    fail(name_, "is not row-major: make it contiguous");
  }
  return {view_.as<const float>(), view_.shape[0], view_.shape[1], view_.strides[0]};
}

const float* ImportedTensor::vector(int64_t size) const {
  if (view_.dtype != DType::kFloat32) {
    fail(name_, std::string("is ") + dtype_name(view_.dtype) + ": float32 is needed");
  }
  if (view_.ndim != 1 || view_.shape[0] != size) {
    fail(name_, "must be a vector of " + std::to_string(size) + " elements");
  }
  if (size > 1 && view_.strides[0] != 1) fail(name_, "is strided: make it contiguous");
  return view_.as<const float>();
}

std::vector<int32_t> import_indices(py::handle source, const char* name, int64_t* columns) {
  const ImportedTensor tensor(source, name);
  const TensorView& view = tensor.view();
  if (view.dtype != DType::kInt32 && view.dtype != DType::kInt64) {
    fail(name, std::string("is ") + dtype_name(view.dtype) + ": int32 or int64 is needed");
  }
  const int32_t want = columns == nullptr ? 1 : 2;
  if (view.ndim != want) {
    fail(name, "has " + std::to_string(view.ndim) + " dimensions, not " + std::to_string(want));
  }
  const int64_t rows = columns == nullptr ? 1 : view.shape[0];
  const int64_t cols = view.shape[want - 1];
  const int64_t row_stride = columns == nullptr ? 0 : view.strides[0];
  std::vector<int32_t> values(static_cast<size_t>(rows * cols));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      const int64_t at = r * row_stride + c * view.strides[want - 1];
      const int64_t x =
          view.dtype == DType::kInt32 ? view.as<const int32_t>()[at] : view.as<const int64_t>()[at];
      if (x < std::numeric_limits<int32_t>::min() || x > std::numeric_limits<int32_t>::max()) {
        fail(name, "holds " + std::to_string(x) + ", which does not fit 32 bits");
      }
      values[static_cast<size_t>(r * cols + c)] = static_cast<int32_t>(x);
    }
  }
  if (columns != nullptr) *columns = cols;
  return values;
}

}  // namespace fastpage
