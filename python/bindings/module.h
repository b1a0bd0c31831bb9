#pragma once

#include <pybind11/pybind11.h>

namespace fastpage {

void bind_errors(pybind11::module_& m);
void bind_core(pybind11::module_& m);
void bind_scheduler(pybind11::module_& m);
void bind_engine(pybind11::module_& m);
void bind_channel(pybind11::module_& m);
void bind_sampling_params(pybind11::module_& m);
void bind_sampler(pybind11::module_& m);
void bind_ops(pybind11::module_& m);
// Adds the submodule `cuda`, whether or not there are CUDA ops.
void bind_cuda(pybind11::module_& m);
void bind_program(pybind11::module_& m);
void bind_replay(pybind11::module_& m);  // after bind_scheduler: adds Scheduler.record

}  // namespace fastpage
