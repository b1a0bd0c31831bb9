#include "arrays.h"

#include <limits>

namespace fastpage {

namespace py = pybind11;

namespace {

TokenId narrow(int64_t id, const char* what) {
  if (id < std::numeric_limits<TokenId>::min() || id > std::numeric_limits<TokenId>::max()) {
    throw InvalidArgument(std::string(what) + ": " + std::to_string(id) +
                          " is out of range for a token id");
  }
  return static_cast<TokenId>(id);
}

std::vector<TokenId> from_array(const py::array& array, const char* what) {
  const char kind = array.dtype().kind();
  if (array.ndim() != 1 || (kind != 'i' && kind != 'u' && array.size() > 0)) {
    throw py::type_error(std::string(what) + " must be a one-dimensional array of integers, got " +
                         std::to_string(array.ndim()) + " dimensions of " +
                         std::string(py::str(array.dtype())));
  }
  std::vector<TokenId> ids(array.size());
  if (py::isinstance<py::array_t<TokenId>>(array)) {
    const auto view = py::reinterpret_borrow<py::array_t<TokenId>>(array).unchecked<1>();
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = view(i);
    return ids;
  }
  const auto wide = py::array_t<int64_t, py::array::forcecast>::ensure(array);
  if (!wide) throw py::error_already_set();
  const auto view = wide.unchecked<1>();
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = narrow(view(i), what);
  return ids;
}

}  // namespace

std::vector<TokenId> to_token_ids(py::handle values, const char* what) {
  if (py::isinstance<py::array>(values)) {
    return from_array(py::reinterpret_borrow<py::array>(values), what);
  }
  if (py::isinstance<py::str>(values) || py::isinstance<py::bytes>(values) ||
      !PySequence_Check(values.ptr())) {
    throw py::type_error(std::string(what) + " must be a sequence of integers, got " +
                         std::string(py::str(py::type::of(values))));
  }
  const auto items = py::reinterpret_steal<py::object>(PySequence_Fast(values.ptr(), what));
  if (!items) throw py::error_already_set();
  const Py_ssize_t n = PySequence_Fast_GET_SIZE(items.ptr());
  std::vector<TokenId> ids(n);
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* item = PySequence_Fast_GET_ITEM(items.ptr(), i);
    if (!PyLong_Check(item) && !PyIndex_Check(item)) {
      throw py::type_error(std::string(what) + "[" + std::to_string(i) +
                           "] must be an integer, got " + std::string(py::repr(item)));
    }
    int overflow = 0;
    const long long id = PyLong_AsLongLongAndOverflow(item, &overflow);
    if (id == -1 && PyErr_Occurred()) throw py::error_already_set();
    if (overflow != 0) {
      throw InvalidArgument(std::string(what) + "[" + std::to_string(i) +
                            "] is out of range for a token id: " + std::string(py::str(item)));
    }
    ids[i] = narrow(id, what);
  }
  return ids;
}

}  // namespace fastpage
