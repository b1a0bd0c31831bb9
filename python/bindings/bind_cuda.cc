// fastpage._C.cuda. What it takes are tensors in CUDA memory, by DLPack, and it launches on the
// stream that their library would use now. With FASTPAGE_CUDA_EMULATION it is a module of its own
// for tests, on CPU memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <deque>
#include <optional>

#include "cuda/attention.h"
#include "cuda/ops.h"
#include "dlpack.h"
#include "module.h"
#ifdef FASTPAGE_CUDA_EMULATION
#include "cuda/emulation/ptx.h"
#endif

namespace fastpage {

namespace py = pybind11;

namespace {

#if defined(FASTPAGE_CUDA) || defined(FASTPAGE_CUDA_EMULATION)

using OptionalArg = std::optional<py::object>;

// The tensors of one call, all on one device.
class Arguments {
 public:
#ifdef FASTPAGE_CUDA_EMULATION
  static constexpr auto kDevice = ImportedTensor::Device::kCpu;
  Arguments() { cuda::emulation::buffers.clear(); }
  ~Arguments() { cuda::emulation::buffers.clear(); }
#else
  static constexpr auto kDevice = ImportedTensor::Device::kCuda;
  Arguments() = default;
#endif
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;

  const TensorView& tensor(py::handle source, const char* name, int32_t ndim) {
    tensors_.emplace_back(source, name, std::nullopt, kDevice);
    const ImportedTensor& tensor = tensors_.back();
    const TensorView& view = tensor.view();
    check(view.ndim == ndim, name,
          "has " + std::to_string(view.ndim) + " dimensions, not " + std::to_string(ndim));
    check(tensor.device_index() == tensors_.front().device_index(), name,
          std::string("is on another device than ") + tensors_.front().name());
    for (int32_t i = 0; i < ndim; ++i) {
      check(view.strides[i] >= 0 || view.shape[i] < 2, name, "has a negative stride");
    }
    const bool is_dense = view.numel() == 0 || view.shape[ndim - 1] == 1 || ndim == 0;
    check(is_dense || view.strides[ndim - 1] == 1, name,
          "must be contiguous in its last dimension");
#ifdef FASTPAGE_CUDA_EMULATION
    int64_t last = view.numel() > 0 ? 1 : 0;
    for (int32_t i = 0; i < ndim && last > 0; ++i) last += (view.shape[i] - 1) * view.strides[i];
    const char* begin = view.as<const char>();
    const int64_t bytes = last * static_cast<int64_t>(dtype_size(view.dtype));
    cuda::emulation::buffers.push_back({begin, begin + bytes});
#endif
    return view;
  }

  cuda::Rows rows(py::handle source, const char* name) {
    const TensorView& view = tensor(source, name, 2);
    const int64_t stride = view.shape[0] > 1 ? view.strides[0] : view.shape[1];
    return {view.data, view.dtype, view.shape[0], view.shape[1], stride, name};
  }

  template <typename T>
  T* vector(py::handle source, const char* name, DType dtype, int64_t size) {
    const TensorView& view = tensor(source, name, 1);
    check(view.dtype == dtype, name,
          std::string("is ") + dtype_name(view.dtype) + ": " + dtype_name(dtype) + " is needed");
    check(view.shape[0] == size, name,
          "has " + std::to_string(view.shape[0]) + " elements, not " + std::to_string(size));
    return view.as<T>();
  }
  const int32_t* indices(py::handle source, const char* name, int64_t size) {
    return vector<const int32_t>(source, name, DType::kInt32, size);
  }
  const float* optional_floats(const OptionalArg& source, const char* name, int64_t size) {
    return source ? vector<const float>(*source, name, DType::kFloat32, size) : nullptr;
  }

  cuda::KvCache cache(py::handle k, py::handle v, const OptionalArg& k_scale,
                      const OptionalArg& v_scale) {
    const TensorView& keys = tensor(k, "k_cache", 4);
    const TensorView& values = tensor(v, "v_cache", 4);
    check(
        values.dtype == keys.dtype && values.shape == keys.shape && values.strides == keys.strides,
        "v_cache", "must have the type, the shape and the strides of k_cache");
    cuda::KvCache cache;
    cache.k = keys.data;
    cache.v = values.data;
    cache.dtype = keys.dtype;
    cache.num_blocks = static_cast<int32_t>(keys.shape[0]);
    cache.block_size = static_cast<int32_t>(keys.shape[1]);
    cache.num_kv_heads = static_cast<int32_t>(keys.shape[2]);
    cache.head_dim = static_cast<int32_t>(keys.shape[3]);
    cache.block_stride = keys.strides[0];
    cache.token_stride = keys.strides[1];
    cache.head_stride = keys.strides[2];
    cache.k_scale = optional_floats(k_scale, "k_scale", cache.num_kv_heads);
    cache.v_scale = optional_floats(v_scale, "v_scale", cache.num_kv_heads);
    return cache;
  }

  // [num_layers][num_blocks][elements of a block]
  cuda::BlockMemory blocks(py::handle source, const char* name) {
    const TensorView& view = tensor(source, name, 3);
    return block_memory(view);
  }
  static cuda::BlockMemory block_memory(const TensorView& view) {
    const auto size = static_cast<int64_t>(dtype_size(view.dtype));
    return {view.data,
            view.shape[1],
            view.shape[0],
            view.shape[0] > 1 ? view.strides[0] * size : 0,
            view.shape[1] > 1 ? view.strides[1] * size : 0,
            view.shape[2] * size};
  }

  // Of the tensors, which must be on the current device.
  cuda::Stream stream() {
#ifdef FASTPAGE_CUDA_EMULATION
    return nullptr;
#else
    cuda::check_current_device(tensors_.front().device_index(), tensors_.front().name());
    return tensors_.front().current_stream();
#endif
  }

 private:
  static void check(bool ok, const char* name, const std::string& what) {
    if (!ok) throw InvalidArgument(std::string(name) + " " + what);
  }

  std::deque<ImportedTensor> tensors_;
};

ops::RotaryStyle rotary_style(const std::string& name) {
  if (name == "neox") return ops::RotaryStyle::kNeox;
  if (name == "interleaved") return ops::RotaryStyle::kInterleaved;
  throw InvalidArgument("style must be neox or interleaved, not " + name);
}

void reshape_and_cache(py::object k, py::object v, py::object slot_mapping, py::object k_cache,
                       py::object v_cache, const OptionalArg& k_scale, const OptionalArg& v_scale) {
  Arguments args;
  const cuda::Rows keys = args.rows(k, "k");
  const cuda::Rows values = args.rows(v, "v");
  const int32_t* slots = args.indices(slot_mapping, "slot_mapping", keys.rows);
  const cuda::KvCache cache = args.cache(k_cache, v_cache, k_scale, v_scale);
  cuda::reshape_and_cache(keys, values, slots, cache, args.stream());
}

void rotary(py::object x, py::object positions, py::object cos_sin, int64_t head_dim,
            const std::string& style, py::object out) {
  Arguments args;
  const cuda::Rows xs = args.rows(x, "x");
  const int32_t* at = args.indices(positions, "positions", xs.rows);
  const cuda::Rows table = args.rows(cos_sin, "cos_sin");
  const cuda::Rows y = args.rows(out, "out");
  cuda::rotary(xs, at, table, head_dim, rotary_style(style), y, args.stream());
}

void rotary_and_cache(py::object q, py::object k, py::object v, py::object positions,
                      py::object slot_mapping, py::object cos_sin, const std::string& style,
                      py::object k_cache, py::object v_cache, py::object rotated_q,
                      const OptionalArg& k_scale, const OptionalArg& v_scale,
                      const OptionalArg& q_norm, const OptionalArg& k_norm, float norm_eps) {
  Arguments args;
  const cuda::Rows queries = args.rows(q, "q");
  const cuda::Rows keys = args.rows(k, "k");
  const cuda::Rows values = args.rows(v, "v");
  const int32_t* at = args.indices(positions, "positions", queries.rows);
  const int32_t* slots = args.indices(slot_mapping, "slot_mapping", queries.rows);
  const cuda::Rows table = args.rows(cos_sin, "cos_sin");
  const cuda::KvCache cache = args.cache(k_cache, v_cache, k_scale, v_scale);
  const cuda::Rows out = args.rows(rotated_q, "rotated_q");
  const cuda::HeadNorms norms{args.optional_floats(q_norm, "q_norm", cache.head_dim),
                              args.optional_floats(k_norm, "k_norm", cache.head_dim), norm_eps};
  cuda::rotary_and_cache(queries, keys, values, at, slots, table, rotary_style(style), cache, norms,
                         out, args.stream());
}

void copy_blocks(py::object cache, py::object copies) {
  Arguments args;
  const cuda::BlockMemory memory = args.blocks(cache, "cache");
  cuda::copy_blocks(memory, import_pairs<BlockCopy>(copies, "copies"), args.stream());
}

void swap_blocks(py::object device, py::object host, py::object swaps,
                 const std::string& direction) {
  Arguments args;
  if (direction != "out" && direction != "in") {
    throw InvalidArgument("direction must be out or in, not " + direction);
  }
  const cuda::BlockMemory there = args.blocks(device, "device");
  const ImportedTensor here(host, "host");
  if (here.view().ndim != 3) throw InvalidArgument("host must have 3 dimensions");
#ifdef FASTPAGE_CUDA_EMULATION
  args.blocks(host, "host");
#else
  cuda::check_pinned(here.view().data, "host");
#endif
  cuda::swap_blocks(
      there, Arguments::block_memory(here.view()), import_pairs<BlockSwap>(swaps, "swaps"),
      direction == "out" ? ops::SwapDirection::kOut : ops::SwapDirection::kIn, args.stream());
}

// ---- attention

cuda::AttentionPlan new_plan(int32_t num_heads, int32_t num_kv_heads, int32_t head_dim,
                             int32_t max_num_seqs, int32_t max_num_tokens, int32_t max_seq_len,
                             int32_t num_multiprocessors, bool batch_invariant, bool fixed_grid,
                             bool decode_only) {
  cuda::AttentionPlanConfig config;
  config.num_heads = num_heads;
  config.num_kv_heads = num_kv_heads;
  config.head_dim = head_dim;
  config.max_num_seqs = max_num_seqs;
  config.max_num_tokens = max_num_tokens;
  config.max_seq_len = max_seq_len;
  config.num_multiprocessors = num_multiprocessors;
  config.batch_invariant = batch_invariant;
  config.fixed_grid = fixed_grid;
  config.decode_only = decode_only;
  return cuda::AttentionPlan(config);
}

void plan(cuda::AttentionPlan& self, py::object query_start_loc, py::object seq_lens,
          py::object buffer) {
  const ImportedTensor to(buffer, "buffer");
  const TensorView& view = to.view();
  if (view.dtype != DType::kInt32 || view.ndim != 1 || view.strides[0] != 1) {
    throw InvalidArgument("buffer must be a contiguous vector of int32 in CPU memory");
  }
  self.plan(import_indices(query_start_loc, "query_start_loc"),
            import_indices(seq_lens, "seq_lens"),
            {view.as<int32_t>(), static_cast<size_t>(view.shape[0])});
}

void paged_attention(py::object q, py::object k_cache, py::object v_cache, py::object block_tables,
                     const cuda::AttentionPlan& plan, py::object plan_buffer, py::object workspace,
                     py::object counters, py::object out, float scale, int32_t sliding_window,
                     float soft_cap, const OptionalArg& alibi_slopes, const OptionalArg& k_scale,
                     const OptionalArg& v_scale) {
  Arguments args;
  const cuda::Rows queries = args.rows(q, "q");
  const cuda::KvCache cache = args.cache(k_cache, v_cache, k_scale, v_scale);
  const cuda::Rows tables = args.rows(block_tables, "block_tables");
  const int32_t* planned = args.indices(plan_buffer, "plan_buffer", plan.plan_size());
  float* partials =
      args.vector<float>(workspace, "workspace", DType::kFloat32, plan.workspace_size());
  auto* counts = args.vector<uint32_t>(counters, "counters", DType::kInt32, plan.num_counters());
  cuda::AttentionParams params;
  params.scale = scale;
  params.sliding_window = sliding_window;
  params.soft_cap = soft_cap;
  params.alibi_slopes = args.optional_floats(alibi_slopes, "alibi_slopes", plan.config().num_heads);
  const cuda::Rows result = args.rows(out, "out");
  cuda::paged_attention(queries, cache, tables, plan, planned, partials, counts, params, result,
                        args.stream());
}

void bind_attention(py::module_& m) {
  using py::arg;
  using Plan = cuda::AttentionPlan;
  // Local: the emulation has one, too.
  py::class_<Plan>(m, "AttentionPlan", py::module_local())
      .def(py::init(&new_plan), py::kw_only(), arg("num_heads"), arg("num_kv_heads"),
           arg("head_dim"), arg("max_num_seqs"), arg("max_num_tokens"), arg("max_seq_len"),
           arg("num_multiprocessors"), arg("batch_invariant") = false, arg("fixed_grid") = false,
           arg("decode_only") = false)
      .def_property_readonly("plan_size", &Plan::plan_size)
      .def_property_readonly("workspace_size", &Plan::workspace_size)
      .def_property_readonly("num_counters", &Plan::num_counters)
      .def_property_readonly("num_decode_items", &Plan::num_decode_items)
      .def_property_readonly("num_prefill_items", &Plan::num_prefill_items)
      .def_property_readonly("max_decode_items", &Plan::max_decode_items)
      .def_property_readonly("max_prefill_items", &Plan::max_prefill_items)
      .def("plan", &plan, arg("query_start_loc"), arg("seq_lens"), arg("buffer"));
  m.def("paged_attention", &paged_attention, arg("q"), arg("k_cache"), arg("v_cache"),
        arg("block_tables"), arg("plan"), arg("plan_buffer"), arg("workspace"), arg("counters"),
        arg("out"), py::kw_only(), arg("scale"), arg("sliding_window") = 0, arg("soft_cap") = 0.0f,
        arg("alibi_slopes") = py::none(), arg("k_scale") = py::none(), arg("v_scale") = py::none());
}

// ---- around attention

void norm(py::object x, py::object out, const std::string& kind, double eps,
          const OptionalArg& weight, const OptionalArg& bias, const OptionalArg& residual,
          std::optional<int64_t> group) {
  Arguments args;
  const cuda::Rows in = args.rows(x, "x");
  const cuda::Rows y = args.rows(out, "out");
  ops::NormParams params;
  if (kind != "rms" && kind != "layer") {
    throw InvalidArgument("kind must be rms or layer, not " + kind);
  }
  params.kind = kind == "rms" ? ops::NormKind::kRms : ops::NormKind::kLayer;
  params.eps = static_cast<float>(eps);
  params.group = group.value_or(in.cols);
  if (weight) {
    const TensorView& view = args.tensor(*weight, "weight", 1);
    params.is_per_column = view.shape[0] == in.cols;
    const int64_t size = params.is_per_column ? in.cols : params.group;
    params.weight = args.optional_floats(weight, "weight", size);
    params.bias = args.optional_floats(bias, "bias", size);
  } else if (bias) {
    throw InvalidArgument("bias needs a weight");
  }
  cuda::Rows sum;
  if (residual) sum = args.rows(*residual, "residual");
  cuda::norm(in, residual ? &sum : nullptr, params, y, args.stream());
}

void activate(py::object x, const std::string& kind, py::object out) {
  Arguments args;
  const cuda::Rows in = args.rows(x, "x");
  const cuda::Rows y = args.rows(out, "out");
  cuda::activate(in, ops::activation_from_name(kind), y, args.stream());
}

void embed(py::object ids, py::object table, py::object out) {
  Arguments args;
  const cuda::Rows y = args.rows(out, "out");
  const cuda::Rows rows = args.rows(table, "table");
  const int32_t* indices = args.indices(ids, "ids", y.rows);
  cuda::embed(indices, rows, y, args.stream());
}

// ---- sampling

void sample(py::object logits, py::object temperature, py::object top_k, py::object top_p,
            py::object min_p, py::object seeds, py::object positions, py::object workspace,
            py::object out) {
  Arguments args;
  const cuda::Rows in = args.rows(logits, "logits");
  const int64_t n = in.rows;
  cuda::SamplingRows rows;
  rows.temperature = args.vector<const float>(temperature, "temperature", DType::kFloat32, n);
  rows.top_k = args.indices(top_k, "top_k", n);
  rows.top_p = args.vector<const float>(top_p, "top_p", DType::kFloat32, n);
  rows.min_p = args.vector<const float>(min_p, "min_p", DType::kFloat32, n);
  rows.seeds = args.vector<const int64_t>(seeds, "seeds", DType::kInt64, n);
  rows.positions = args.vector<const int64_t>(positions, "positions", DType::kInt64, n);
  auto* const space = args.vector<float>(workspace, "workspace", DType::kFloat32,
                                         cuda::sampling_workspace_size(n, in.cols));
  auto* const tokens = args.vector<int32_t>(out, "out", DType::kInt32, n);
  cuda::sample(in, rows, space, tokens, args.stream());
}

void process_logits(py::object logits, const OptionalArg& allowed, const OptionalArg& bias_start,
                    const OptionalArg& bias_ids, const OptionalArg& bias,
                    const OptionalArg& token_start, const OptionalArg& tokens,
                    const OptionalArg& num_prompt_tokens, const OptionalArg& repetition_penalty,
                    const OptionalArg& frequency_penalty, const OptionalArg& presence_penalty,
                    const OptionalArg& counts) {
  Arguments args;
  const cuda::Rows in = args.rows(logits, "logits");
  cuda::LogitsRows rows;
  const auto need = [](const OptionalArg& x, const char* name, const char* for_what) -> py::object {
    if (!x) throw InvalidArgument(std::string(name) + " is needed for " + for_what);
    return *x;
  };
  const auto matrix = [&](py::handle x, const char* name, int64_t cols) {
    const cuda::Rows m = args.rows(x, name);
    if (m.dtype != DType::kInt32 || m.rows != in.rows || m.cols != cols || m.stride != cols) {
      throw InvalidArgument(std::string(name) + " must be int32 of " + std::to_string(in.rows) +
                            " x " + std::to_string(cols) + ", contiguous");
    }
    return m.as<int32_t>();
  };
  const auto ragged = [&](py::handle x, const char* name) {
    const TensorView& view = args.tensor(x, name, 1);
    if (view.dtype != DType::kInt32) throw InvalidArgument(std::string(name) + " must be int32");
    return std::make_pair(view.as<const int32_t>(), view.shape[0]);
  };
  if (allowed) {
    rows.allowed =
        reinterpret_cast<const uint32_t*>(matrix(*allowed, "allowed", (in.cols + 31) / 32));
  }
  if (bias_start) {
    rows.bias_start = args.indices(*bias_start, "bias_start", in.rows + 1);
    const auto [ids, size] = ragged(need(bias_ids, "bias_ids", "bias_start"), "bias_ids");
    rows.bias_ids = ids;
    rows.bias =
        args.vector<const float>(need(bias, "bias", "bias_start"), "bias", DType::kFloat32, size);
  }
  if (token_start) {
    const auto floats = [&](const OptionalArg& x, const char* name) {
      return args.optional_floats(need(x, name, "token_start"), name, in.rows);
    };
    rows.token_start = args.indices(*token_start, "token_start", in.rows + 1);
    rows.tokens = ragged(need(tokens, "tokens", "token_start"), "tokens").first;
    rows.num_prompt_tokens = args.indices(
        need(num_prompt_tokens, "num_prompt_tokens", "token_start"), "num_prompt_tokens", in.rows);
    rows.repetition_penalty = floats(repetition_penalty, "repetition_penalty");
    rows.frequency_penalty = floats(frequency_penalty, "frequency_penalty");
    rows.presence_penalty = floats(presence_penalty, "presence_penalty");
    rows.counts = matrix(need(counts, "counts", "token_start"), "counts", in.cols);
  }
  cuda::process_logits(in, rows, args.stream());
}

void logprobs(py::object logits, py::object tokens, py::object workspace, py::object out_ids,
              py::object out_logprobs, py::object out_ranks) {
  Arguments args;
  const cuda::Rows in = args.rows(logits, "logits");
  const int32_t* chosen = args.indices(tokens, "tokens", in.rows);
  auto* const space = args.vector<float>(workspace, "workspace", DType::kFloat32,
                                         cuda::sampling_workspace_size(in.rows, in.cols));
  const cuda::Rows ids = args.rows(out_ids, "out_ids");
  const cuda::Rows values = args.rows(out_logprobs, "out_logprobs");
  if (ids.dtype != DType::kInt32 || ids.rows != in.rows || ids.cols < 1 || ids.stride != ids.cols) {
    throw InvalidArgument("out_ids must be int32, [rows][1 + k], contiguous");
  }
  if (values.dtype != DType::kFloat32 || values.rows != in.rows || values.cols != ids.cols ||
      values.stride != values.cols) {
    throw InvalidArgument("out_logprobs must be float32, [rows][1 + k], contiguous");
  }
  auto* const ranks = args.vector<int32_t>(out_ranks, "out_ranks", DType::kInt32, in.rows);
  cuda::logprobs(in, chosen, static_cast<int32_t>(ids.cols - 1), space, ids.as<int32_t>(),
                 values.as<float>(), ranks, args.stream());
}

void bind_sampling(py::module_& m) {
  using py::arg;
  m.def("sample", &sample, arg("logits"), arg("temperature"), arg("top_k"), arg("top_p"),
        arg("min_p"), arg("seeds"), arg("positions"), arg("workspace"), arg("out"));
  m.def("process_logits", &process_logits, arg("logits"), py::kw_only(),
        arg("allowed") = py::none(), arg("bias_start") = py::none(), arg("bias_ids") = py::none(),
        arg("bias") = py::none(), arg("token_start") = py::none(), arg("tokens") = py::none(),
        arg("num_prompt_tokens") = py::none(), arg("repetition_penalty") = py::none(),
        arg("frequency_penalty") = py::none(), arg("presence_penalty") = py::none(),
        arg("counts") = py::none());
  m.def("logprobs", &logprobs, arg("logits"), arg("tokens"), arg("workspace"), arg("out_ids"),
        arg("out_logprobs"), arg("out_ranks"));
}

void bind_cuda_ops(py::module_& m) {
  using py::arg;
  bind_attention(m);
  bind_sampling(m);
  m.def("norm", &norm, arg("x"), arg("out"), arg("kind"), arg("eps"), arg("weight") = py::none(),
        arg("bias") = py::none(), arg("residual") = py::none(), arg("group") = py::none());
  m.def("activate", &activate, arg("x"), arg("kind"), arg("out"));
  m.def("embed", &embed, arg("ids"), arg("table"), arg("out"));
  m.def("reshape_and_cache", &reshape_and_cache, arg("k"), arg("v"), arg("slot_mapping"),
        arg("k_cache"), arg("v_cache"), arg("k_scale") = py::none(), arg("v_scale") = py::none());
  m.def("rotary", &rotary, arg("x"), arg("positions"), arg("cos_sin"), arg("head_dim"),
        arg("style"), arg("out"));
  m.def("rotary_and_cache", &rotary_and_cache, arg("q"), arg("k"), arg("v"), arg("positions"),
        arg("slot_mapping"), arg("cos_sin"), arg("style"), arg("k_cache"), arg("v_cache"),
        arg("rotated_q"), arg("k_scale") = py::none(), arg("v_scale") = py::none(),
        arg("q_norm") = py::none(), arg("k_norm") = py::none(), arg("norm_eps") = 0.0f);
  m.def("copy_blocks", &copy_blocks, arg("cache"), arg("copies"));
  m.def("swap_blocks", &swap_blocks, arg("device"), arg("host"), arg("swaps"), arg("direction"));
}

#endif  // FASTPAGE_CUDA || FASTPAGE_CUDA_EMULATION

}  // namespace

#ifdef FASTPAGE_CUDA_EMULATION

void set_schedule(const std::string& order, bool late_copies, uint64_t seed) {
  using cuda::emulation::Order;
  cuda::emulation::settings = {order == "ascending"    ? Order::kAscending
                               : order == "descending" ? Order::kDescending
                                                       : Order::kRandom,
                               late_copies, seed};
}

PYBIND11_MODULE(fastpage_cuda_emulation, m) {
  // Errors are translated by fastpage._C, which must be imported before.
  m.doc() = "The functions of fastpage._C.cuda, over CPU tensors (cuda/emulation)";
  bind_cuda_ops(m);
  m.def("set_schedule", &set_schedule, py::arg("order"), py::arg("late_copies"), py::arg("seed"));
  m.def("bytes_loaded", [] { return cuda::emulation::bytes_loaded; });
  m.def("load_ptx", &cuda::emulation::load_ptx, py::arg("paths"));
  m.def("ptx_counts", [] {
    py::dict result;
    for (const auto& [name, c] : cuda::emulation::ptx_counts()) {
      result[py::str(name)] = py::dict(
          py::arg("launches") = c.launches, py::arg("instructions") = c.instructions,
          py::arg("shared_wavefronts") = c.shared_wavefronts,
          py::arg("shared_least") = c.shared_least, py::arg("global_sectors") = c.global_sectors,
          py::arg("global_least") = c.global_least);
    }
    return result;
  });
  m.def("set_max_shared", [](int bytes) { cuda::emulation::max_shared = bytes; }, py::arg("bytes"));
}

#else

void bind_cuda(py::module_& parent) {
  py::module_ m = parent.def_submodule("cuda");
#ifdef FASTPAGE_CUDA
  m.def("is_available", &cuda::is_available);
  m.def("unavailable_reason", &cuda::unavailable_reason);
  bind_cuda_ops(m);
#else
  m.def("is_available", [] { return false; });
  m.def("unavailable_reason", [] {
    return "fastpage was built without CUDA: build it with FASTPAGE_CUDA=ON, and nvcc on the PATH";
  });
#endif
}

#endif

}  // namespace fastpage
