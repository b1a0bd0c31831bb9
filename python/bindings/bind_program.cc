// Program, its CPU executor and the runner made of both.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>

#include "dlpack.h"
#include "fastpage/executor.h"
#include "fastpage/passes.h"
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

// All logits of a step in one new array; does its transfers first.
py::array_t<float> forward(CpuExecutor& executor, const InputBatch& batch) {
  const auto vocab_size = static_cast<py::ssize_t>(executor.program().vocab_size());
  py::array_t<float> logits({static_cast<py::ssize_t>(batch.num_logits()), vocab_size});
  float* out = logits.mutable_data();
  py::gil_scoped_release release;
  executor.check_batch(batch);
  executor.apply_transfers(batch.transfers);
  executor.forward(batch, [&](int32_t first_row, Matrix<float> slice) {
    for (int64_t i = 0; i < slice.rows; ++i) {
      std::copy_n(slice.row(i), slice.cols, out + (first_row + i) * vocab_size);
    }
  });
  return logits;
}

py::array_t<float> forward_arrays(CpuExecutor& executor, py::handle token_ids, py::handle positions,
                                  py::handle slot_mapping, py::handle query_start_loc,
                                  py::handle seq_lens, py::handle block_tables,
                                  py::handle logits_indices) {
  InputBatch batch;
  batch.token_ids = import_indices(token_ids, "token_ids");
  batch.positions = import_indices(positions, "positions");
  batch.slot_mapping = import_indices(slot_mapping, "slot_mapping");
  batch.query_start_loc = import_indices(query_start_loc, "query_start_loc");
  batch.seq_lens = import_indices(seq_lens, "seq_lens");
  batch.logits_indices = import_indices(logits_indices, "logits_indices");
  batch.num_seqs = static_cast<int32_t>(batch.seq_lens.size());
  int64_t stride = 0;
  const std::vector<BlockId> tables = import_indices(block_tables, "block_tables", &stride);
  if (static_cast<int64_t>(tables.size()) != batch.num_seqs * stride) {
    throw InvalidArgument("block_tables must have a row per sequence");
  }
  batch.block_tables = tables.data();
  batch.block_table_stride = static_cast<int32_t>(stride);
  for (int32_t i = 0; i < batch.num_seqs; ++i) batch.block_table_rows.push_back(i);
  return forward(executor, batch);
}

void apply_transfers(CpuExecutor& executor, py::handle swap_outs, py::handle block_copies,
                     py::handle swap_ins) {
  BlockTransfers transfers;
  transfers.swap_outs = import_pairs<BlockSwap>(swap_outs, "swap_outs");
  transfers.block_copies = import_pairs<BlockCopy>(block_copies, "block_copies");
  transfers.swap_ins = import_pairs<BlockSwap>(swap_ins, "swap_ins");
  py::gil_scoped_release release;
  executor.apply_transfers(transfers);
}

void bind_executor(py::module_& m) {
  py::class_<CpuExecutor, std::shared_ptr<CpuExecutor>>(m, "CpuExecutor")
      .def(py::init([](const Program& program, int32_t num_kv_blocks, int32_t num_host_kv_blocks,
                       const std::string& weight_dtype, const std::string& quantization,
                       const std::string& activations, const std::string& kv_cache_dtype,
                       int32_t block_size, int32_t max_num_tokens, int32_t max_num_logits,
                       const std::vector<std::string>& disabled_passes,
                       std::shared_ptr<ThreadPool> pool) {
             ExecutorConfig config;
             config.weight_dtype = dtype_from_name(weight_dtype);
             config.quantization = quantization_from_name(quantization);
             config.activations = ops::activations_from_name(activations);
             config.kv_cache_dtype = dtype_from_name(kv_cache_dtype);
             config.num_kv_blocks = num_kv_blocks;
             config.num_host_kv_blocks = num_host_kv_blocks;
             config.block_size = block_size;
             config.max_num_tokens = max_num_tokens;
             config.max_num_logits = max_num_logits;
             config.disabled_passes = disabled_passes;
             return std::make_shared<CpuExecutor>(program, config, std::move(pool));
           }),
           "program"_a, py::kw_only(), "num_kv_blocks"_a, "num_host_kv_blocks"_a = 0,
           "weight_dtype"_a = "bfloat16", "quantization"_a = "none", "activations"_a = "quantized",
           "kv_cache_dtype"_a = "bfloat16", "block_size"_a = 16, "max_num_tokens"_a = 2048,
           "max_num_logits"_a = 256, "disabled_passes"_a = std::vector<std::string>(),
           "pool"_a = nullptr)
      .def(
          "load_weight",
          [](CpuExecutor& executor, const std::string& name, py::object weight,
             const std::optional<std::string>& source_dtype) {
            const ImportedTensor tensor(weight, "weight", source_dtype);
            py::gil_scoped_release release;
            executor.load_weight(name, tensor.view());
          },
          "name"_a, "weight"_a, "source_dtype"_a = std::nullopt)
      .def(
          "load_weight_blocks",
          [](CpuExecutor& executor, const std::string& name, py::object blocks,
             const std::string& format) {
            const ImportedTensor tensor(blocks, "blocks");
            py::gil_scoped_release release;
            executor.load_weight_blocks(name, tensor.view(), weight_format_from_name(format));
          },
          "name"_a, "blocks"_a, "format"_a)
      .def_property_readonly("program", &CpuExecutor::program)
      .def("finish_loading", &CpuExecutor::finish_loading, py::call_guard<py::gil_scoped_release>())
      .def("apply_transfers", &apply_transfers, "swap_outs"_a, "block_copies"_a, "swap_ins"_a)
      .def("forward", &forward, "batch"_a)
      .def("forward_arrays", &forward_arrays, "token_ids"_a, "positions"_a, "slot_mapping"_a,
           "query_start_loc"_a, "seq_lens"_a, "block_tables"_a, "logits_indices"_a)
      .def_property_readonly("weight_bytes", &CpuExecutor::weight_bytes)
      .def_property_readonly("kv_cache_bytes", &CpuExecutor::kv_cache_bytes)
      .def_property_readonly("kv_host_cache_bytes", &CpuExecutor::kv_host_cache_bytes)
      .def_static(
          "kv_block_bytes",
          [](int32_t num_layers, int32_t num_kv_heads, int32_t head_dim, const std::string& dtype,
             int32_t block_size) {
            return CpuExecutor::kv_block_bytes({num_layers, num_kv_heads, head_dim},
                                               dtype_from_name(dtype), block_size);
          },
          "num_layers"_a, "num_kv_heads"_a, "head_dim"_a, "dtype"_a, "block_size"_a)
      .def("set_profiling", &CpuExecutor::set_profiling, "on"_a)
      .def("profile", &CpuExecutor::profile);
  py::class_<ProgramRunner, ModelRunner, std::shared_ptr<ProgramRunner>>(m, "ProgramRunner")
      .def(py::init<std::shared_ptr<CpuExecutor>, int32_t>(), "executor"_a,
           "max_steps_in_flight"_a = 1);
}

void bind_passes(py::module_& m) {
  m.def(
      "passes",
      [](const std::string& target) {
        std::vector<std::pair<std::string, std::string>> named;
        for (const Pass& pass : passes()) {
          if (pass.is_for(target_from_name(target))) named.emplace_back(pass.name, pass.summary);
        }
        return named;
      },
      "target"_a = "cpu");
  const auto for_target = [](auto apply) {
    return [apply](const Program& program, const std::vector<std::string>& disabled,
                   const std::string& target) {
      return apply(program, target_from_name(target), disabled);
    };
  };
  const auto none = std::vector<std::string>();
  m.def("apply_passes", for_target(&apply_passes), "program"_a, "disabled"_a = none, py::kw_only(),
        "target"_a = "cpu");
  m.def("optimized", for_target(&optimized), "program"_a, "disabled"_a = none, py::kw_only(),
        "target"_a = "cpu");
}

}  // namespace

void bind_program(py::module_& m) {
  bind_data(m);
  bind_program_class(m);
  bind_executor(m);
  bind_passes(m);
}

}  // namespace fastpage
