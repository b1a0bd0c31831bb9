// Recording a scheduler's calls, and running them again.
#include <pybind11/stl.h>

#include <fstream>
#include <memory>
#include <optional>

#include "fastpage/replay.h"
#include "fastpage/scheduler.h"
#include "module.h"

namespace fastpage {

namespace py = pybind11;

namespace {

// Python owns the file that a Scheduler writes to, and keeps it as long as the scheduler.
struct LogFile {
  std::ofstream stream;
};

std::unique_ptr<LogFile> open_log(const std::string& path) {
  auto file = std::make_unique<LogFile>();
  file->stream.open(path, std::ios::binary);
  if (!file->stream) throw InvalidArgument("cannot write the log " + path);
  // A log is most wanted when the process died, so nothing waits in a buffer.
  file->stream << std::unitbuf;
  return file;
}

ReplayResult replay_file(const std::string& path, bool check_integrity) {
  std::ifstream log(path, std::ios::binary);
  if (!log) throw InvalidArgument("cannot read the log " + path);
  ReplayOptions options;
  options.check_integrity = check_integrity;
  try {
    return replay(log, options);
  } catch (const std::ios_base::failure& error) {  // a directory, say
    throw InvalidArgument("cannot read the log " + path + ": " + error.what());
  }
}

}  // namespace

void bind_replay(py::module_& m) {
  py::class_<LogFile>(m, "_LogFile");
  auto scheduler = py::class_<Scheduler>(m.attr("Scheduler"));
  scheduler.def(
      "record",
      [](const py::object& self, const std::optional<std::string>& path) {
        auto& scheduler = self.cast<Scheduler&>();
        if (!path) {
          scheduler.record(nullptr);
          return;
        }
        const py::object file = py::cast(open_log(*path));
        py::detail::keep_alive_impl(self, file);
        scheduler.record(&file.cast<LogFile&>().stream);
      },
      py::arg("path"));

  using R = ReplayResult;
  py::class_<R>(m, "ReplayResult")
      .def_readonly("num_calls", &R::num_calls)
      .def_readonly("num_steps", &R::num_steps)
      .def_readonly("complete", &R::complete)
      .def_readonly("divergence", &R::divergence);
  m.def("replay", &replay_file, py::arg("path"), py::arg("check_integrity") = true,
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace fastpage
