// Program: a model as plain data.
#include <pybind11/stl.h>

#include "fastpage/program.h"
#include "module.h"

namespace fastpage {

namespace py = pybind11;
using py::literals::operator""_a;

namespace {

Rows rows_from_name(const std::string& name) {
  if (name == "tokens") return Rows::kTokens;
  if (name == "logits") return Rows::kLogits;
  throw InvalidArgument("unknown rows '" + name + "': tokens or logits");
}

const char* rows_name(const Buffer& buffer) {
  return buffer.rows == Rows::kTokens   ? "tokens"
         : buffer.rows == Rows::kLogits ? "logits"
                                        : "fixed";
}

void bind_data(py::module_& m) {
  py::class_<Operand>(m, "Operand")
      .def(py::init<BufferId, int64_t, int64_t>(), "buffer"_a, "offset"_a = 0, "cols"_a = 0)
      .def_readonly("buffer", &Operand::buffer)
      .def_readonly("offset", &Operand::offset)
      .def_readonly("cols", &Operand::cols);
  py::class_<Buffer>(m, "Buffer")
      .def_readonly("name", &Buffer::name)
      .def_readonly("shape", &Buffer::shape)
      .def_property_readonly("rows", &rows_name)
      .def_property_readonly("kind", [](const Buffer& buffer) {
        return buffer.kind == Buffer::Kind::kWeight ? "weight" : "activation";
      });
  py::class_<Op>(m, "Op")
      .def_readonly("inputs", &Op::inputs)
      .def_readonly("outputs", &Op::outputs)
      .def_readonly("attrs", &Op::attrs)
      .def_property_readonly("kind", [](const Op& op) { return op_name(op.kind); });
}

void bind_program_class(py::module_& m) {
  py::class_<Program>(m, "Program")
      .def(py::init<>())
      .def(
          "add_activation",
          [](Program& program, const std::string& name, const std::string& rows, int64_t cols) {
            return program.add_activation(name, rows_from_name(rows), cols);
          },
          "name"_a, "rows"_a, "cols"_a)
      .def("add_weight", &Program::add_weight, "name"_a, "shape"_a)
      .def(
          "add_op",
          [](Program& program, const std::string& kind, std::vector<Operand> inputs,
             std::vector<Operand> outputs, std::map<std::string, AttrValue> attrs) {
            program.add_op(
                {op_from_name(kind), std::move(inputs), std::move(outputs), std::move(attrs)});
          },
          "kind"_a, "inputs"_a, "outputs"_a, "attrs"_a = std::map<std::string, AttrValue>())
      .def("set_output", &Program::set_output, "buffer"_a)
      .def_property_readonly("buffers", &Program::buffers)
      .def_property_readonly("ops", &Program::ops)
      .def_property_readonly("output", &Program::output)
      .def_property_readonly("vocab_size", &Program::vocab_size)
      .def_property_readonly("kv_cache_spec",
                             [](const Program& program) {
                               const KvCacheSpec spec = program.kv_cache_spec();
                               return py::make_tuple(spec.num_layers, spec.num_kv_heads,
                                                     spec.head_dim);
                             })
      .def("validate", &Program::validate)
      .def(
          "workspace_bytes",
          [](const Program& program, int64_t max_tokens, int64_t max_logits) {
            return plan_workspace(program).bytes(max_tokens, max_logits);
          },
          "max_tokens"_a, "max_logits"_a)
      .def("__str__", &Program::to_string);
}

}  // namespace

void bind_program(py::module_& m) {
  bind_data(m);
  bind_program_class(m);
}

}  // namespace fastpage
