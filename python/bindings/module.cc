// Registers the parts of fastpage._C; each lives in its own bind_*.cc.
#include "module.h"

#include "fastpage/types.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "libfastpage as Python sees it; see _C.pyi";
  m.attr("__version__") = FASTPAGE_VERSION;
  fastpage::bind_errors(m);
  fastpage::bind_sampling_params(m);  // before what takes one
  fastpage::bind_core(m);
  fastpage::bind_scheduler(m);
  fastpage::bind_replay(m);
  fastpage::bind_engine(m);
  fastpage::bind_channel(m);
  fastpage::bind_sampler(m);
  fastpage::bind_ops(m);
  fastpage::bind_cuda(m);
  fastpage::bind_program(m);
}
