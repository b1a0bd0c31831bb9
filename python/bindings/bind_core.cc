// Scheduler, InputBatch, ModelRunner. (Engine: bind_engine.cc.)
#include <pybind11/stl.h>

#include "arrays.h"
#include "fastpage/model_runner.h"
#include "fastpage/scheduler.h"
#include "kwargs.h"
#include "module.h"

namespace fastpage {

namespace py = pybind11;

namespace {

// ---------------------------------------------------------------- Scheduler

std::string policy_name(const SchedulerConfig& config) {
  return config.policy == SchedulingPolicy::kPriority ? "priority" : "fcfs";
}

void set_policy(SchedulerConfig& config, const std::string& name) {
  if (name != "fcfs" && name != "priority") {
    throw InvalidArgument("policy is '" + name + "': must be 'fcfs' or 'priority'");
  }
  config.policy = name == "fcfs" ? SchedulingPolicy::kFcfs : SchedulingPolicy::kPriority;
}

void bind_scheduler_config(py::module_& m) {
  using C = SchedulerConfig;
  py::class_<C>(m, "SchedulerConfig")
      .def(py::init(
          [](const py::kwargs& kwargs) { return from_kwargs<C>("SchedulerConfig", kwargs); }))
      .def_readwrite("num_blocks", &C::num_blocks)
      .def_readwrite("block_size", &C::block_size)
      .def_readwrite("max_num_seqs", &C::max_num_seqs)
      .def_readwrite("max_num_batched_tokens", &C::max_num_batched_tokens)
      .def_readwrite("max_model_len", &C::max_model_len)
      .def_readwrite("max_num_waiting", &C::max_num_waiting)
      .def_readwrite("long_prefill_token_threshold", &C::long_prefill_token_threshold)
      .def_readwrite("enable_prefix_caching", &C::enable_prefix_caching)
      .def_property("policy", &policy_name, &set_policy)
      .def_readwrite("hash_key_lo", &C::hash_key_lo)
      .def_readwrite("hash_key_hi", &C::hash_key_hi)
      .def_readwrite("eos_token_ids", &C::eos_token_ids)
      .def("validate", &C::validate);
}

void bind_scheduler_stats(py::module_& m) {
  using S = SchedulerStats;
  py::class_<S>(m, "SchedulerStats")
      .def_readonly("num_waiting", &S::num_waiting)
      .def_readonly("num_running", &S::num_running)
      .def_readonly("num_blocks", &S::num_blocks)
      .def_readonly("num_free_blocks", &S::num_free_blocks)
      .def_readonly("num_preemptions", &S::num_preemptions)
      .def_readonly("prefix_cache_queries", &S::prefix_cache_queries)
      .def_readonly("prefix_cache_hits", &S::prefix_cache_hits)
      .def_readonly("kv_slots_allocated", &S::kv_slots_allocated)
      .def_readonly("kv_slots_used", &S::kv_slots_used);
}

void bind_scheduler_output(py::module_& m) {
  using O = SchedulerOutput;
  using S = ScheduledSequence;
  const auto column_of = [](auto field) {
    return [field](const py::object& self) {
      using Field = std::decay_t<decltype(std::declval<S>().*field)>;
      return column<Field>(self.cast<const O&>().sequences, field, self);
    };
  };
  py::class_<O>(m, "SchedulerOutput")
      .def_readonly("step_id", &O::step_id)
      .def_readonly("num_scheduled_tokens", &O::num_scheduled_tokens)
      .def_readonly("num_preempted", &O::num_preempted)
      .def_property_readonly("request_ids", column_of(&S::id))
      .def_property_readonly("rows", column_of(&S::row))
      .def_property_readonly("num_computed_tokens", column_of(&S::num_computed_tokens))
      .def_property_readonly("num_new_tokens", column_of(&S::num_scheduled_tokens))
      .def_property_readonly("samples", column_of(&S::samples));
}

// The scheduler's own vector, as columns.
struct SequenceUpdates {
  const std::vector<SequenceUpdate>* items;
};

void bind_sequence_updates(py::module_& m) {
  using U = SequenceUpdate;
  const auto column_of = [](auto field) {
    return [field](const py::object& self) {
      using Field = std::decay_t<decltype(std::declval<U>().*field)>;
      return column<Field>(*self.cast<const SequenceUpdates&>().items, field, self);
    };
  };
  py::class_<SequenceUpdates>(m, "SequenceUpdates")
      .def_property_readonly("request_ids", column_of(&U::id))
      .def_property_readonly("new_token_ids", column_of(&U::new_token_id))
      .def_property_readonly("finish_reasons", [](const py::object& self) {
        return column<uint8_t>(*self.cast<const SequenceUpdates&>().items, &U::finish_reason, self);
      });
}

void bind_scheduler(py::module_& m) {
  bind_scheduler_config(m);
  bind_scheduler_stats(m);
  bind_scheduler_output(m);
  bind_sequence_updates(m);
  py::class_<Scheduler>(m, "Scheduler")
      .def(py::init<const SchedulerConfig&>(), py::arg("config"))
      .def(
          "add_request",
          [](Scheduler& self, const py::object& prompt_token_ids, const SamplingParams& params,
             uint64_t seed, int32_t priority, std::string cache_salt) {
            SequenceRequest request;
            request.prompt_token_ids = to_token_ids(prompt_token_ids, "prompt_token_ids");
            request.params = params;
            request.seed = seed;
            request.priority = priority;
            request.cache_salt = std::move(cache_salt);
            return self.add_request(std::move(request));
          },
          py::arg("prompt_token_ids"), py::arg("params"), py::arg("seed") = 0,
          py::arg("priority") = 0, py::arg("cache_salt") = "")
      .def("abort", &Scheduler::abort, py::arg("request_id"))
      .def("has_unfinished", &Scheduler::has_unfinished)
      .def("schedule", &Scheduler::schedule, py::return_value_policy::reference_internal)
      .def("prepare", &Scheduler::prepare, py::arg("step"), py::arg("batch"),
           py::keep_alive<3, 1>())  // the batch borrows the block tables
      .def(
          "update",
          [](Scheduler& self, const SchedulerOutput& step, const py::object& sampled_token_ids) {
            return SequenceUpdates{
                &self.update(step, to_token_ids(sampled_token_ids, "sampled_token_ids"))};
          },
          py::arg("step"), py::arg("sampled_token_ids"), py::keep_alive<0, 1>())
      .def("reset_prefix_cache", &Scheduler::reset_prefix_cache)
      .def("stats", &Scheduler::stats)
      .def("check_integrity", &Scheduler::check_integrity);
}

// ---------------------------------------------------------------- InputBatch

py::array_t<BlockId> gathered_block_tables(const InputBatch& batch) {
  py::array_t<BlockId> tables({batch.num_seqs, batch.block_table_stride});
  BlockId* out = tables.mutable_data();
  for (int32_t seq = 0; seq < batch.num_seqs; ++seq) {
    out = std::copy_n(batch.block_table(seq), batch.block_table_stride, out);
  }
  return tables;
}

// [n][2]: two int32 fields of each of n structs.
template <typename Element>
py::array_t<int32_t> pairs(const std::vector<Element>& elements, int32_t Element::* first,
                           int32_t Element::* second) {
  py::array_t<int32_t> result({elements.size(), size_t{2}});
  int32_t* out = result.mutable_data();
  for (const Element& element : elements) {
    *out++ = element.*first;
    *out++ = element.*second;
  }
  return result;
}

void resolve(const InputBatch& batch, const py::object& sampled_token_ids) {
  batch.resolve(to_token_ids(sampled_token_ids, "sampled_token_ids"));
}

void bind_input_batch(py::module_& m) {
  using B = InputBatch;
  const auto view_of = [](std::vector<int32_t> B::* field) {
    return [field](const py::object& self) { return view(self.cast<const B&>().*field, self); };
  };
  py::class_<B>(m, "InputBatch")
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
      .def_property_readonly("logits_indices", view_of(&B::logits_indices))
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
      .def("resolve", &resolve, py::arg("sampled_token_ids"));
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
  bind_scheduler(m);
  bind_input_batch(m);
  bind_model_runner(m);
  bind_engine(m);
}

}  // namespace fastpage
