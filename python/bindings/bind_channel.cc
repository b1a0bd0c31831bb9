// The two ends of the channel between an engine's process and its front ends.
#include <pybind11/stl.h>

#include "fastpage/engine_channel.h"
#include "module.h"
#include "request.h"

namespace fastpage {

namespace py = pybind11;

namespace {

RequestId add_request(EngineClient& self, const py::object& prompt_token_ids,
                      const SamplingParams& params, int32_t priority, std::string cache_salt,
                      std::string name) {
  return self.add_request(to_request(prompt_token_ids, params, priority, std::move(cache_salt)),
                          std::move(name));
}

void bind_news(py::module_& m) {
  using N = EngineNews;
  py::class_<N> news(m, "EngineNews");
  py::enum_<N::Kind>(news, "Kind")
      .value("ACCEPTED", N::Kind::kAccepted)
      .value("REFUSED", N::Kind::kRefused)
      .value("STEP", N::Kind::kStep)
      .value("STEP_FAILED", N::Kind::kStepFailed)
      .value("RESET", N::Kind::kReset)
      .value("ALIVE", N::Kind::kAlive);
  py::enum_<N::Refusal>(news, "Refusal")
      .value("INVALID_ARGUMENT", N::Refusal::kInvalidArgument)
      .value("RESOURCE_EXHAUSTED", N::Refusal::kResourceExhausted)
      .value("NAME_IN_USE", N::Refusal::kNameInUse);
  news.def_readonly("kind", &N::kind)
      .def_readonly("request_id", &N::request_id)
      .def_readonly("error", &N::error)
      .def_readonly("refusal", &N::refusal)
      .def_readonly("done", &N::done)
      .def_readonly("progress", &N::progress)
      .def_readonly("step", &N::step)
      .def_readonly("stats", &N::stats);
}

}  // namespace

void bind_channel(py::module_& m) {
  m.attr("__channel_version__") = kChannelVersion;
  bind_news(m);

  using no_gil = py::call_guard<py::gil_scoped_release>;
  py::class_<EngineServer>(m, "EngineServer")
      .def(py::init([](Engine* engine, const std::vector<int>& sockets, bool takes_more) {
             EngineServerConfig config;
             config.takes_more = takes_more;
             return std::make_unique<EngineServer>(engine, sockets, config);
           }),
           py::arg("engine"), py::arg("sockets"), py::kw_only(), py::arg("takes_more") = false,
           py::keep_alive<1, 2>())
      .def("run", &EngineServer::run, no_gil())
      .def("stop", &EngineServer::stop)
      .def("add_front_end", &EngineServer::add_front_end, py::arg("socket"), no_gil());

  // Nothing here waits, so that the GIL is kept: it keeps a client to one thread at a time.
  using C = EngineClient;
  py::class_<C>(m, "EngineClient")
      .def(py::init<int>(), py::arg("socket"))
      .def("fileno", &C::fileno)
      .def("add_request", &add_request, py::arg("prompt_token_ids"), py::arg("params"),
           py::arg("priority") = 0, py::arg("cache_salt") = "", py::arg("name") = "")
      .def("abort", py::overload_cast<RequestId>(&C::abort), py::arg("request_id"))
      .def("abort", py::overload_cast<RequestId, int32_t>(&C::abort), py::arg("request_id"),
           py::arg("index"))
      .def("reset_prefix_cache", &C::reset_prefix_cache)
      .def("ping", &C::ping)
      .def_property_readonly("has_unsent", &C::has_unsent)
      .def_property_readonly("num_unsent_bytes", &C::num_unsent_bytes)
      .def("flush", &C::flush)
      .def("receive", &C::receive)
      .def_property_readonly("closed", &C::closed);
}

}  // namespace fastpage
