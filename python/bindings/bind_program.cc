#include "module.h"

namespace fastpage {

void bind_program(pybind11::module_&) {}

}  // namespace fastpage
