// numpy views of C++ arrays, and token ids from whatever Python has them in.
#pragma once

#include <pybind11/numpy.h>

#include <string>
#include <vector>

#include "fastpage/types.h"

namespace fastpage {

// A read-only view of one field of consecutive structs (or of plain elements); `owner` is kept
// alive by it.
template <typename T>
pybind11::array_t<T> view(const T* first, size_t count, size_t stride_bytes,
                          pybind11::handle owner) {
  namespace py = pybind11;
  py::array_t<T> array({static_cast<py::ssize_t>(count)}, {static_cast<py::ssize_t>(stride_bytes)},
                       first, owner);
  py::detail::array_proxy(array.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
  return array;
}

template <typename T>
pybind11::array_t<T> view(const std::vector<T>& values, pybind11::handle owner) {
  return view(values.data(), values.size(), sizeof(T), owner);
}

// One field of all the structs, seen as T (of the same size).
template <typename T, typename Element, typename Field>
pybind11::array_t<T> column(const std::vector<Element>& elements, Field Element::* field,
                            pybind11::handle owner) {
  static_assert(sizeof(T) == sizeof(Field), "a view converts nothing");
  const Field* first = elements.empty() ? nullptr : &(elements.front().*field);
  return view(reinterpret_cast<const T*>(first), elements.size(), sizeof(Element), owner);
}

// A copy, [n][2]: two int32 fields of each of n structs.
template <typename Element>
pybind11::array_t<int32_t> pairs(const std::vector<Element>& elements, int32_t Element::* first,
                                 int32_t Element::* second) {
  pybind11::array_t<int32_t> result({elements.size(), size_t{2}});
  int32_t* out = result.mutable_data();
  for (const Element& element : elements) {
    *out++ = element.*first;
    *out++ = element.*second;
  }
  return result;
}

// A one-dimensional integer array, or any sequence of integers. TypeError for anything else,
// InvalidArgument for what is no int32; `what` names it in errors.
std::vector<TokenId> to_token_ids(pybind11::handle values, const char* what);

}  // namespace fastpage
