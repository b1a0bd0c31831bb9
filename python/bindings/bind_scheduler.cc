// Scheduler, what its steps are and what comes of them, as arrays.
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>

#include "arrays.h"
#include "fastpage/scheduler.h"
#include "kwargs.h"
#include "module.h"

namespace fastpage {

namespace py = pybind11;

namespace {

// ---------------------------------------------------------------- settings and figures

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
      .def_readwrite("num_host_blocks", &C::num_host_blocks)
      .def_readwrite("block_size", &C::block_size)
      .def_readwrite("max_num_seqs", &C::max_num_seqs)
      .def_readwrite("max_num_batched_tokens", &C::max_num_batched_tokens)
      .def_readwrite("max_model_len", &C::max_model_len)
      .def_readwrite("max_num_waiting", &C::max_num_waiting)
      .def_readwrite("max_num_waiting_tokens", &C::max_num_waiting_tokens)
      .def_readwrite("long_prefill_token_threshold", &C::long_prefill_token_threshold)
      .def_readwrite("max_num_partial_prefills", &C::max_num_partial_prefills)
      .def_readwrite("enable_prefix_caching", &C::enable_prefix_caching)
      .def_property("policy", &policy_name, &set_policy)
      .def_readwrite("swap_cost_per_block", &C::swap_cost_per_block)
      .def_readwrite("max_steps_in_flight", &C::max_steps_in_flight)
      .def_readwrite("num_speculative_tokens", &C::num_speculative_tokens)
      .def_readwrite("prompt_lookup_min", &C::prompt_lookup_min)
      .def_readwrite("prompt_lookup_max", &C::prompt_lookup_max)
      .def_readwrite("enable_kv_events", &C::enable_kv_events)
      .def_readwrite("hash_key_lo", &C::hash_key_lo)
      .def_readwrite("hash_key_hi", &C::hash_key_hi)
      .def_readwrite("eos_token_ids", &C::eos_token_ids)
      .def("validate", &C::validate);
}

void bind_scheduler_stats(py::module_& m) {
  using S = SchedulerStats;
  py::class_<S>(m, "SchedulerStats")
      .def_readonly("num_waiting", &S::num_waiting)
      .def_readonly("num_waiting_tokens", &S::num_waiting_tokens)
      .def_readonly("num_running", &S::num_running)
      .def_readonly("num_blocks", &S::num_blocks)
      .def_readonly("num_free_blocks", &S::num_free_blocks)
      .def_readonly("num_host_blocks", &S::num_host_blocks)
      .def_readonly("num_cached_host_blocks", &S::num_cached_host_blocks)
      .def_readonly("num_preemptions", &S::num_preemptions)
      .def_readonly("num_preemptions_swap", &S::num_preemptions_swap)
      .def_readonly("prefix_cache_queries", &S::prefix_cache_queries)
      .def_readonly("prefix_cache_hits", &S::prefix_cache_hits)
      .def_readonly("preempted_cache_queries", &S::preempted_cache_queries)
      .def_readonly("preempted_cache_hits", &S::preempted_cache_hits)
      .def_readonly("num_blocks_swapped_out", &S::num_blocks_swapped_out)
      .def_readonly("num_blocks_swapped_in", &S::num_blocks_swapped_in)
      .def_readonly("num_blocks_copied", &S::num_blocks_copied)
      .def_readonly("num_draft_tokens", &S::num_draft_tokens)
      .def_readonly("num_accepted_tokens", &S::num_accepted_tokens)
      .def_readonly("kv_slots_allocated", &S::kv_slots_allocated)
      .def_readonly("kv_slots_used", &S::kv_slots_used);
}

// ---------------------------------------------------------------- KV events

py::bytes hash_bytes(const BlockHash& hash) {
  char bytes[16];
  std::memcpy(bytes, &hash.lo, 8);
  std::memcpy(bytes + 8, &hash.hi, 8);
  return py::bytes(bytes, sizeof(bytes));
}

const char* kind_name(const KvEvent& event) {
  switch (event.kind) {
    case KvEvent::Kind::kStored:
      return "stored";
    case KvEvent::Kind::kRemoved:
      return "removed";
    case KvEvent::Kind::kCleared:
      return "cleared";
  }
  return "";
}

void bind_kv_event(py::module_& m) {
  using E = KvEvent;
  const auto optional_hash = [](BlockHash E::* field) {
    return [field](const E& event) -> py::object {
      if (!(event.*field)) return py::none();
      return hash_bytes(event.*field);
    };
  };
  py::class_<E>(m, "KvEvent")
      .def_property_readonly("kind", &kind_name)
      .def_property_readonly(
          "tier", [](const E& event) { return event.tier == KvTier::kHost ? "host" : "device"; })
      .def_property_readonly("hash", optional_hash(&E::hash))
      .def_property_readonly("parent_hash", optional_hash(&E::parent_hash))
      .def_readonly("token_ids", &E::token_ids);
}

// ---------------------------------------------------------------- a step, and its updates

void bind_scheduler_output(py::module_& m) {
  using O = SchedulerOutput;
  using S = ScheduledSequence;
  const auto column_of = [](auto field) {
    return [field](const py::object& self) {
      using Field = std::decay_t<decltype(std::declval<S>().*field)>;
      return column<Field>(self.cast<const O&>().sequences, field, self);
    };
  };
  const auto swaps = [](std::vector<BlockSwap> BlockTransfers::* field) {
    return [field](const O& output) {
      return pairs(output.transfers.*field, &BlockSwap::device, &BlockSwap::host);
    };
  };
  py::class_<O>(m, "SchedulerOutput")
      .def_readonly("step_id", &O::step_id)
      .def_readonly("num_scheduled_tokens", &O::num_scheduled_tokens)
      .def_readonly("num_preempted", &O::num_preempted)
      .def_property_readonly("request_ids", column_of(&S::id))
      .def_property_readonly("indices", column_of(&S::index))
      .def_property_readonly("rows", column_of(&S::row))
      .def_property_readonly("num_computed_tokens", column_of(&S::num_computed_tokens))
      .def_property_readonly("num_new_tokens", column_of(&S::num_scheduled_tokens))
      .def_property_readonly("num_sampling_rows", column_of(&S::num_sampling_rows))
      .def_property_readonly("swap_outs", swaps(&BlockTransfers::swap_outs))
      .def_property_readonly("block_copies",
                             [](const O& output) {
                               return pairs(output.transfers.block_copies, &BlockCopy::src,
                                            &BlockCopy::dst);
                             })
      .def_property_readonly("swap_ins", swaps(&BlockTransfers::swap_ins));
}

// The scheduler's own vector, as columns.
struct SequenceUpdates {
  const std::vector<SequenceUpdate>* items;
};

py::array_t<int32_t> num_new_tokens(const SequenceUpdates& updates) {
  py::array_t<int32_t> result(static_cast<py::ssize_t>(updates.items->size()));
  int32_t* out = result.mutable_data();
  for (const SequenceUpdate& update : *updates.items) {
    *out++ = static_cast<int32_t>(update.new_token_ids.size());
  }
  return result;
}

py::array_t<TokenId> new_token_ids(const SequenceUpdates& updates) {
  size_t total = 0;
  for (const SequenceUpdate& update : *updates.items) total += update.new_token_ids.size();
  py::array_t<TokenId> result(static_cast<py::ssize_t>(total));
  TokenId* out = result.mutable_data();
  for (const SequenceUpdate& update : *updates.items) {
    out = std::copy(update.new_token_ids.begin(), update.new_token_ids.end(), out);
  }
  return result;
}

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
      .def_property_readonly("indices", column_of(&U::index))
      .def_property_readonly("num_new_tokens", &num_new_tokens)
      .def_property_readonly("new_token_ids", &new_token_ids)
      .def_property_readonly("sampling_rows", column_of(&U::sampling_row))
      .def_property_readonly("finish_reasons",
                             [](const py::object& self) {
                               return column<uint8_t>(*self.cast<const SequenceUpdates&>().items,
                                                      &U::finish_reason, self);
                             })
      .def_property_readonly("stop_token_ids", column_of(&U::stop_token_id))
      .def_property_readonly("num_output_tokens", column_of(&U::num_output_tokens))
      .def_property_readonly("num_cached_tokens", column_of(&U::num_cached_tokens))
      .def_property_readonly("scores", column_of(&U::score));
}

// ---------------------------------------------------------------- Scheduler

RequestId add_request(Scheduler& self, const py::object& prompt_token_ids,
                      const SamplingParams& params, uint64_t seed, int32_t priority,
                      std::string cache_salt) {
  SequenceRequest request;
  request.prompt_token_ids = to_token_ids(prompt_token_ids, "prompt_token_ids");
  request.params = params;
  request.seed = seed;
  request.priority = priority;
  request.cache_salt = std::move(cache_salt);
  return self.add_request(std::move(request));
}

// The batch borrows the block tables, and more. (py::keep_alive would remember every call.)
void prepare(const py::object& self, const SchedulerOutput& step, const py::object& batch) {
  static PyObject* const name = PyUnicode_InternFromString("_scheduler");
  if (PyObject_SetAttr(batch.ptr(), name, self.ptr()) != 0) throw py::error_already_set();
  self.cast<Scheduler&>().prepare(step, &batch.cast<InputBatch&>());
}

// An int32 array is taken as it is, anything else is copied into one.
py::array_t<TokenId> to_token_array(const py::object& values) {
  using Array = py::array_t<TokenId, py::array::c_style>;
  if (py::isinstance<Array>(values)) {
    const auto array = py::reinterpret_borrow<Array>(values);
    if (array.ndim() == 1) return array;
  }
  const std::vector<TokenId> token_ids = to_token_ids(values, "sampled_token_ids");
  return Array(static_cast<py::ssize_t>(token_ids.size()), token_ids.data());
}

std::vector<TokenLogprobs> to_logprobs(const py::object& values) {
  std::vector<TokenLogprobs> result;
  if (values.is_none()) return result;
  bool ok = py::isinstance<py::sequence>(values);
  if (ok) {
    for (const py::handle item : values) {
      ok = ok && py::isinstance<TokenLogprobs>(item);
      if (ok) result.push_back(item.cast<const TokenLogprobs&>());
    }
  }
  if (!ok) throw py::type_error("logprobs must be a sequence of TokenLogprobs");
  return result;
}

SequenceUpdates update(const py::object& self, const SchedulerOutput& step,
                       const py::object& sampled, const py::object& logprobs) {
  const py::array_t<TokenId> array = to_token_array(sampled);
  const Span<const TokenId> token_ids(array.data(), static_cast<size_t>(array.size()));
  const SequenceUpdates updates{
      &self.cast<Scheduler&>().update(step, token_ids, to_logprobs(logprobs))};
  // The updates point into the array, and their vector lives as long as the scheduler.
  static PyObject* const name = PyUnicode_InternFromString("_sampled_token_ids");
  if (PyObject_SetAttr(self.ptr(), name, array.ptr()) != 0) throw py::error_already_set();
  return updates;
}

std::vector<KvEvent> take_kv_events(Scheduler& self) {
  std::vector<KvEvent> events;
  self.take_kv_events(&events);
  return events;
}

void bind_scheduler_class(py::module_& m) {
  using S = Scheduler;
  py::class_<S>(m, "Scheduler", py::dynamic_attr())  // see update()
      .def(py::init<const SchedulerConfig&>(), py::arg("config"))
      .def("add_request", &add_request, py::arg("prompt_token_ids"), py::arg("params"),
           py::arg("seed") = 0, py::arg("priority") = 0, py::arg("cache_salt") = "")
      .def("abort", py::overload_cast<RequestId>(&S::abort), py::arg("request_id"))
      .def("abort", py::overload_cast<RequestId, int32_t>(&S::abort), py::arg("request_id"),
           py::arg("index"))
      .def("has_unfinished", &S::has_unfinished)
      .def("fork", &S::fork, py::arg("request_id"), py::arg("index"), py::arg("seed"))
      .def(
          "propose",
          [](S& self, RequestId id, int32_t index, const py::object& token_ids) {
            return self.propose(id, index, to_token_ids(token_ids, "token_ids"));
          },
          py::arg("request_id"), py::arg("index"), py::arg("token_ids"))
      .def("schedule", &S::schedule, py::return_value_policy::reference_internal)
      .def("prepare", &prepare, py::arg("step"), py::arg("batch"))
      .def("update", &update, py::arg("step"), py::arg("sampled_token_ids"),
           py::arg("logprobs") = py::none(), py::keep_alive<0, 1>())
      .def("discard", &S::discard, py::arg("step"))
      .def("reset_prefix_cache", &S::reset_prefix_cache)
      .def("take_kv_events", &take_kv_events)
      .def("stats", &S::stats)
      .def("check_integrity", &S::check_integrity);
  m.def("sample_seed", &sample_seed, py::arg("seed"), py::arg("index"));
}

}  // namespace

void bind_scheduler(py::module_& m) {
  bind_scheduler_config(m);
  bind_scheduler_stats(m);
  bind_kv_event(m);
  bind_scheduler_output(m);
  bind_sequence_updates(m);
  bind_scheduler_class(m);
}

}  // namespace fastpage
