#include "fastpage/types.h"
#include "module.h"

namespace fastpage {

namespace py = pybind11;

void bind_errors(py::module_& m) {
  // InvalidArgument is a ValueError too, so that callers need not know this package to catch it.
  static py::handle error = py::exception<Error>(m, "Error", PyExc_RuntimeError).release();
  py::tuple bases = py::make_tuple(error, py::handle(PyExc_ValueError));
  static py::handle invalid_argument =
      py::exception<InvalidArgument>(m, "InvalidArgument", bases).release();
  static py::handle exhausted =
      py::exception<ResourceExhausted>(m, "ResourceExhausted", error).release();
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const InvalidArgument& e) {
      py::set_error(invalid_argument, e.what());
    } catch (const ResourceExhausted& e) {
      py::set_error(exhausted, e.what());
    } catch (const Error& e) {
      py::set_error(error, e.what());
    }
  });
}

}  // namespace fastpage
