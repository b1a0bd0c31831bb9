// Structs of settings that Python makes with keyword arguments: Config(num_blocks=8, ...).
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace fastpage {

// Sets each keyword's attribute through the class's own setters; an unknown one, and a value of the
// wrong type, is a TypeError of one line that names it.
template <typename T>
T from_kwargs(const char* class_name, const pybind11::kwargs& kwargs) {
  namespace py = pybind11;
  T value;
  const py::object self = py::cast(&value, py::return_value_policy::reference);
  for (const auto& [key, field] : kwargs) {
    if (!py::hasattr(self, key)) {
      throw py::type_error(std::string(class_name) + " has no field '" +
                           py::cast<std::string>(key) + "'");
    }
    try {
      py::setattr(self, key, field);
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_TypeError) && !error.matches(PyExc_AttributeError)) throw;
      throw py::type_error(std::string(class_name) + ": " + py::cast<std::string>(key) +
                           " cannot be " + std::string(py::repr(field)));
    }
  }
  return value;
}

}  // namespace fastpage
