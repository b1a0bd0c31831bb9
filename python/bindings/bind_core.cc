// InputBatch and ModelRunner. (Scheduler: bind_scheduler.cc; Engine: bind_engine.cc.)
#include <pybind11/stl.h>

#include "arrays.h"
#include "fastpage/model_runner.h"
#include "fastpage/sampling_arrays.h"
#include "module.h"

namespace fastpage {

namespace py = pybind11;

namespace {

// ---------------------------------------------------------------- InputBatch

py::array_t<BlockId> first_blocks(const InputBatch& batch, int32_t count) {
  if (count < 0 || count > batch.block_table_stride) {
    throw InvalidArgument("count is " + std::to_string(count) + ": block tables have " +
                          std::to_string(batch.block_table_stride) + " blocks a row");
  }
  py::array_t<BlockId> tables({batch.num_seqs, count});
  BlockId* out = tables.mutable_data();
  for (int32_t seq = 0; seq < batch.num_seqs; ++seq) {
    out = std::copy_n(batch.block_table(seq), count, out);
  }
  return tables;
}

py::array_t<BlockId> gathered_block_tables(const InputBatch& batch) {
  return first_blocks(batch, batch.block_table_stride);
}

void resolve(const InputBatch& batch, const py::object& sampled_token_ids) {
  batch.resolve(to_token_ids(sampled_token_ids, "sampled_token_ids"));
}

void bind_input_batch(py::module_& m) {
  using B = InputBatch;
  const auto view_of = [](std::vector<int32_t> B::* field) {
    return [field](const py::object& self) { return view(self.cast<const B&>().*field, self); };
  };
  py::class_<B>(m, "InputBatch", py::dynamic_attr())  // see prepare() of Scheduler
      .def(py::init<>())
      .def_readonly("step_id", &B::step_id)
      .def_readonly("num_seqs", &B::num_seqs)
      .def_property_readonly("num_tokens", &B::num_tokens)
      .def_property_readonly("num_logits", &B::num_logits)
      .def_property_readonly("num_samples", [](const B& b) { return b.sampling_rows.size(); })
      .def_property_readonly("token_ids", view_of(&B::token_ids))
      .def_property_readonly("positions", view_of(&B::positions))
      .def_property_readonly("slot_mapping", view_of(&B::slot_mapping))
      .def_property_readonly("query_start_loc", view_of(&B::query_start_loc))
      .def_property_readonly("seq_lens", view_of(&B::seq_lens))
      .def_property_readonly("block_tables", &gathered_block_tables)
      .def("first_blocks", &first_blocks, py::arg("count"))
      .def_property_readonly("logits_indices", view_of(&B::logits_indices))
      .def_property_readonly("sampling_logits_rows",
                             [](const py::object& self) {
                               return column<int32_t>(self.cast<const B&>().sampling_rows,
                                                      &SamplingRow::logits_row, self);
                             })
      .def_property_readonly("swap_outs",
                             [](const B& b) {
                               return pairs(b.transfers.swap_outs, &BlockSwap::device,
                                            &BlockSwap::host);
                             })
      .def_property_readonly("block_copies",
                             [](const B& b) {
                               return pairs(b.transfers.block_copies, &BlockCopy::src,
                                            &BlockCopy::dst);
                             })
      .def_property_readonly("swap_ins",
                             [](const B& b) {
                               return pairs(b.transfers.swap_ins, &BlockSwap::device,
                                            &BlockSwap::host);
                             })
      .def_property_readonly("future_tokens",
                             [](const B& b) {
                               return pairs(b.future_tokens, &FutureToken::index,
                                            &FutureToken::sampling_row);
                             })
      .def("resolve", &resolve, py::arg("sampled_token_ids"))
      .def_property_readonly("reads_tokens", &reads_tokens)
      .def("sampling_arrays", &sampling_arrays, py::arg("vocab_size"));
}

// By name, those that somebody asks for.
py::dict named_arrays(const py::object& self) {
  const auto& a = self.cast<const SamplingArrays&>();
  py::dict named;
  const auto add = [&](const char* name, const auto& values) { named[name] = view(values, self); };
  add("logits_rows", a.logits_rows);
  add("temperature", a.temperature);
  add("top_k", a.top_k);
  add("top_p", a.top_p);
  add("min_p", a.min_p);
  add("seeds", a.seeds);
  add("positions", a.positions);
  add("num_logprobs", a.num_logprobs);
  add("prompt_logits_rows", a.prompt_logits_rows);
  add("prompt_tokens", a.prompt_tokens);
  add("prompt_num_logprobs", a.prompt_num_logprobs);
  if (!a.allowed.empty()) add("allowed", a.allowed);
  if (!a.bias_start.empty()) {
    add("bias_start", a.bias_start);
    add("bias_ids", a.bias_ids);
    add("bias", a.bias);
  }
  if (!a.token_start.empty()) {
    add("token_start", a.token_start);
    add("tokens", a.tokens);
    add("num_prompt_tokens", a.num_prompt_tokens);
    add("repetition_penalty", a.repetition_penalty);
    add("frequency_penalty", a.frequency_penalty);
    add("presence_penalty", a.presence_penalty);
  }
  return named;
}

void bind_sampling_arrays(py::module_& m) {
  py::class_<SamplingArrays>(m, "SamplingArrays")
      .def_property_readonly("arrays", &named_arrays)
      .def_property_readonly("unsupported", [](const SamplingArrays& a) {
        py::dict reasons;
        for (const auto& [row, reason] : a.unsupported) reasons[py::int_(row)] = reason;
        return reasons;
      });
}

// ---------------------------------------------------------------- ModelRunner

// A ModelRunner written in Python. step() runs without the GIL; its methods take it.
class PyModelRunner : public ModelRunner {
 public:
  using ModelRunner::ModelRunner;

  void execute(const InputBatch& batch) override {
    py::gil_scoped_acquire gil;
    method("execute")(py::cast(&batch, py::return_value_policy::reference));
  }

  int32_t max_steps_in_flight() const override {
    py::gil_scoped_acquire gil;
    const auto function =
        py::get_override(static_cast<const ModelRunner*>(this), "max_steps_in_flight");
    return function ? function().cast<int32_t>() : ModelRunner::max_steps_in_flight();
  }

  const ModelRunnerOutput& wait(int64_t step_id) override {
    py::gil_scoped_acquire gil;
    const py::object result = method("wait")(step_id);
    if (!py::isinstance<ModelRunnerOutput>(result)) {
      throw py::type_error("ModelRunner.wait() must return a ModelRunnerOutput, got " +
                           std::string(py::str(py::type::of(result))));
    }
    output_ = result.cast<const ModelRunnerOutput&>();
    return output_;
  }

 private:
  py::function method(const char* name) const {
    py::function function = py::get_override(static_cast<const ModelRunner*>(this), name);
    if (!function) throw Error(std::string("ModelRunner.") + name + "() is not implemented");
    return function;
  }

  ModelRunnerOutput output_;  // a copy: what Python holds may change under our feet
};

void bind_model_runner(py::module_& m) {
  using L = TokenLogprobs;
  py::class_<L>(m, "TokenLogprobs")
      .def(py::init<std::vector<TokenId>, std::vector<float>, int32_t>(), py::arg("token_ids"),
           py::arg("logprobs"), py::arg("rank"))
      .def_readonly("token_ids", &L::token_ids)
      .def_readonly("logprobs", &L::logprobs)
      .def_readonly("rank", &L::rank);

  using O = ModelRunnerOutput;
  py::class_<O>(m, "ModelRunnerOutput")
      .def(py::init<>())
      .def_readwrite("step_id", &O::step_id)
      .def_property(
          "sampled_token_ids",
          [](const O& self) {
            return py::array_t<TokenId>(self.sampled_token_ids.size(),
                                        self.sampled_token_ids.data());
          },
          [](O& self, const py::object& ids) {
            self.sampled_token_ids = to_token_ids(ids, "sampled_token_ids");
          })
      .def_readwrite("logprobs", &O::logprobs)
      .def_readwrite("prompt_logprobs", &O::prompt_logprobs);

  py::class_<ModelRunner, PyModelRunner, std::shared_ptr<ModelRunner>>(m, "ModelRunner")
      .def(py::init<>())
      .def("execute", &ModelRunner::execute, py::arg("batch"),
           py::call_guard<py::gil_scoped_release>())
      .def("max_steps_in_flight", &ModelRunner::max_steps_in_flight)
      .def("wait", &ModelRunner::wait, py::arg("step_id"),
           py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void bind_core(py::module_& m) {
  bind_sampling_arrays(m);
  bind_input_batch(m);
  bind_model_runner(m);
}

}  // namespace fastpage
