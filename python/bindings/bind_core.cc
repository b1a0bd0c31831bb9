#include "module.h"

namespace fastpage {

void bind_core(pybind11::module_&) {}

}  // namespace fastpage
