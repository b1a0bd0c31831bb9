#include "module.h"

namespace fastpage {

void bind_sampler(pybind11::module_&) {}

}  // namespace fastpage
