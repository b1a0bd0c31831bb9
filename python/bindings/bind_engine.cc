// Engine and what its steps return.
#include <pybind11/stl.h>

#include "fastpage/engine.h"
#include "kwargs.h"
#include "module.h"
#include "request.h"

namespace fastpage {

namespace py = pybind11;

namespace {

void bind_outputs(py::module_& m) {
  py::enum_<FinishReason>(m, "FinishReason")
      .value("NONE", FinishReason::kNone)
      .value("STOP", FinishReason::kStop)
      .value("LENGTH", FinishReason::kLength)
      .value("ABORT", FinishReason::kAbort);

  using R = RequestOutput;
  py::class_<R>(m, "RequestOutput")
      .def_readonly("request_id", &R::request_id)
      .def_readonly("index", &R::index)
      .def_readonly("new_token_ids", &R::new_token_ids)
      .def_readonly("logprobs", &R::logprobs)
      .def_readonly("prompt_logprobs", &R::prompt_logprobs)
      .def_readonly("finish_reason", &R::finish_reason)
      .def_readonly("stop_token_id", &R::stop_token_id)
      .def_readonly("num_prompt_tokens", &R::num_prompt_tokens)
      .def_readonly("num_output_tokens", &R::num_output_tokens)
      .def_readonly("num_cached_tokens", &R::num_cached_tokens)
      .def_readonly("cumulative_logprob", &R::cumulative_logprob)
      .def_readonly("score", &R::score)
      .def_readonly("queue_seconds", &R::queue_seconds);

  using S = StepOutput;
  py::class_<S>(m, "StepOutput")
      .def_readonly("step_id", &S::step_id)
      .def_readonly("num_tokens", &S::num_tokens)
      .def_readonly("outputs", &S::outputs)
      .def_readonly("kv_events", &S::kv_events);
}

void bind_stats(py::module_& m) {
  using S = EngineStats;
  py::class_<S>(m, "EngineStats")
      .def(py::init<>())
      .def_readonly("scheduler", &S::scheduler)
      .def_readonly("num_steps", &S::num_steps)
      .def_readonly("num_computed_tokens", &S::num_computed_tokens)
      .def_readonly("num_generated_tokens", &S::num_generated_tokens)
      .def_readonly("schedule_seconds", &S::schedule_seconds)
      .def_readonly("prepare_seconds", &S::prepare_seconds)
      .def_readonly("model_seconds", &S::model_seconds)
      .def_readonly("sample_seconds", &S::sample_seconds)
      .def_readonly("output_seconds", &S::output_seconds);
}

RequestId add_request(Engine& self, const py::object& prompt_token_ids,
                      const SamplingParams& params, int32_t priority, std::string cache_salt) {
  Request request = to_request(prompt_token_ids, params, priority, std::move(cache_salt));
  py::gil_scoped_release no_gil;
  return self.add_request(std::move(request));
}

}  // namespace

void bind_engine(py::module_& m) {
  bind_outputs(m);
  bind_stats(m);

  using C = EngineConfig;
  py::class_<C>(m, "EngineConfig")
      .def(
          py::init([](const py::kwargs& kwargs) { return from_kwargs<C>("EngineConfig", kwargs); }))
      .def_readwrite("scheduler", &C::scheduler)
      .def_readwrite("vocab_size", &C::vocab_size)
      .def_readwrite("seed", &C::seed)
      .def_readwrite("random_hash_key", &C::random_hash_key)
      .def_readwrite("async_scheduling", &C::async_scheduling);

  using no_gil = py::call_guard<py::gil_scoped_release>;
  py::class_<Engine>(m, "Engine")
      // A runner written in Python must outlive the engine's last call to it.
      .def(py::init<const EngineConfig&, std::shared_ptr<ModelRunner>>(), py::arg("config"),
           py::arg("runner"), py::keep_alive<1, 3>())
      .def("add_request", &add_request, py::arg("prompt_token_ids"), py::arg("params"),
           py::arg("priority") = 0, py::arg("cache_salt") = "")
      .def("abort", py::overload_cast<RequestId>(&Engine::abort), py::arg("request_id"), no_gil())
      .def("abort", py::overload_cast<RequestId, int32_t>(&Engine::abort), py::arg("request_id"),
           py::arg("index"), no_gil())
      .def("step", &Engine::step, no_gil())
      .def("has_unfinished", &Engine::has_unfinished, no_gil())
      .def("wait_for_work", &Engine::wait_for_work, py::arg("timeout_seconds"), no_gil())
      .def("wake", &Engine::wake, no_gil())
      .def("record", py::overload_cast<const std::string&>(&Engine::record), py::arg("path"),
           no_gil())
      .def("reset_prefix_cache", &Engine::reset_prefix_cache, no_gil())
      .def("stats", &Engine::stats, no_gil())
      .def("check_integrity", &Engine::check_integrity, no_gil());
}

}  // namespace fastpage
