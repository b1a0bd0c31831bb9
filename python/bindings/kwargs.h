// Structs of settings that Python makes with keyword arguments: Config(num_blocks=8, ...).
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace fastpage {

// Sets each keyword's attribute through the class's own setters; an unknown one is a TypeError that
// names it.
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
    py::setattr(self, key, field);
  }
  return value;
}

}  // namespace fastpage
