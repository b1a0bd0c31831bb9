#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "dlpack.h"
#include "fastpage/ops.h"
#include "module.h"

namespace fastpage {

namespace py = pybind11;

namespace {

using Array = py::array_t<float>;
using OptionalArg = std::optional<py::object>;

Array new_array(int64_t rows, int64_t cols) { return Array({rows, cols}); }

Matrix<float> matrix(Array& array) {
  return {array.mutable_data(), array.shape(0), array.shape(1)};
}

// `out`, checked, or a new array.
Array result_array(const std::optional<Array>& out, int64_t rows, int64_t cols) {
  if (!out) return new_array(rows, cols);
  const bool fits = out->ndim() == 2 && out->shape(0) == rows && out->shape(1) == cols;
  if (!fits || !out->writeable() || !(out->flags() & py::array::c_style)) {
    throw InvalidArgument("out must be a writable, contiguous float32 array of " +
                          std::to_string(rows) + " x " + std::to_string(cols));
  }
  return *out;
}

struct KvCache {
  ops::KvCacheView view;
  py::array k;
  py::array v;

  KvCache(int32_t num_blocks, int32_t num_kv_heads, int32_t head_dim, int32_t block_size,
          const std::string& dtype) {
    if (num_blocks <= 0 || num_kv_heads <= 0 || head_dim <= 0 || block_size <= 0 ||
        block_size % 16 != 0) {
      throw InvalidArgument(
          "KvCache: sizes must be positive and block_size a multiple of 16, not " +
          std::to_string(block_size));
    }
    view.dtype = dtype_from_name(dtype);
    view.num_blocks = num_blocks;
    view.num_kv_heads = num_kv_heads;
    view.block_size = block_size;
    view.head_dim = head_dim;
    if (view.dtype != DType::kFloat32 && view.dtype != DType::kBFloat16 &&
        view.dtype != DType::kFloat16 && view.dtype != DType::kInt8) {
      throw InvalidArgument("KvCache: dtype " + dtype +
                            " cannot hold keys and values: float32, bfloat16, float16 or int8");
    }
    const int32_t granules = block_size / 16;
    if (view.dtype == DType::kInt8) {
      const py::tuple shape = py::make_tuple(num_blocks, num_kv_heads, granules, -1);
      k = pages("uint8", shape);
      v = pages("uint8", shape);
    } else {
      const char* type = view.dtype == DType::kFloat32 ? "float32" : "uint16";
      k = pages(type, py::make_tuple(num_blocks, num_kv_heads, granules, head_dim, 16));
      v = pages(type, py::make_tuple(num_blocks, num_kv_heads, granules, 16, head_dim));
    }
    view.k = k.mutable_data();
    view.v = v.mutable_data();
  }

  // Zeroed, from the start of a page on as an executor's caches: numpy's own begin 16 bytes into
  // one, where every vector straddles two cache lines.
  py::array pages(const char* type, const py::tuple& shape) const {
    constexpr int64_t kPage = 4096;
    const int64_t bytes = view.bytes_per_block() * view.num_blocks;
    const py::array memory = py::module_::import("numpy").attr("zeros")(bytes + kPage, "uint8");
    const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory.data()) % kPage);
    const py::slice part(kPage - past, kPage - past + bytes, 1);
    return memory[part].attr("view")(type).attr("reshape")(shape);
  }
};

Array linear(ThreadPool& pool, py::object x_arg, const ops::PackedWeight& weight,
             const OptionalArg& bias_arg, const std::optional<Array>& out,
             const std::string& activations) {
  const ImportedTensor x(x_arg, "x");
  std::unique_ptr<ImportedTensor> bias;
  if (bias_arg) bias = std::make_unique<ImportedTensor>(*bias_arg, "bias");
  const Matrix<const float> xm = x.matrix();
  const float* b = bias ? bias->vector(weight.out_features()) : nullptr;
  Array y = result_array(out, xm.rows, weight.out_features());
  const Matrix<float> ym = matrix(y);
  const ops::Activations kind = ops::activations_from_name(activations);
  py::gil_scoped_release release;
  ops::linear(pool, xm, weight, b, ym, kind);
  return y;
}

Array moe(ThreadPool& pool, py::object x_arg, py::object logits_arg,
          const std::vector<std::pair<const ops::PackedWeight*, const ops::PackedWeight*>>& weights,
          int32_t top_k, bool renormalize, const std::string& kind,
          const std::string& activations) {
  const ImportedTensor x(x_arg, "x");
  const ImportedTensor logits(logits_arg, "router_logits");
  const Matrix<const float> xm = x.matrix();
  const Matrix<const float> lm = logits.matrix();
  std::vector<ops::Expert> experts;
  for (const auto& [gate_up, down] : weights) experts.push_back({gate_up, down});
  const ops::MoeParams params{top_k, renormalize, ops::activation_from_name(kind),
                              ops::activations_from_name(activations)};
  Array y = new_array(xm.rows, xm.cols);
  const Matrix<float> ym = matrix(y);
  py::gil_scoped_release release;
  ops::moe(pool, xm, lm, experts, params, ym);
  return y;
}

void check_ids(const std::vector<int32_t>& ids, int64_t size, const char* name) {
  for (const int32_t id : ids) {
    if (id < 0 || id >= size) {
      throw InvalidArgument(std::string(name) + " holds " + std::to_string(id) + ", not in [0, " +
                            std::to_string(size) + ")");
    }
  }
}

Array embed(ThreadPool& pool, py::object ids_arg, py::object table_arg) {
  const std::vector<int32_t> ids = import_indices(ids_arg, "ids");
  const int64_t rows = static_cast<int64_t>(ids.size());
  if (py::isinstance<ops::PackedWeight>(table_arg)) {
    const auto& table = table_arg.cast<const ops::PackedWeight&>();
    check_ids(ids, table.out_features(), "ids");
    Array y = new_array(rows, table.in_features());
    const Matrix<float> ym = matrix(y);
    py::gil_scoped_release release;
    ops::embed(pool, ids, table, ym);
    return y;
  }
  const ImportedTensor table(table_arg, "table");
  const TensorView& view = table.view();
  if (view.ndim != 2 || (view.numel() > 0 && view.shape[1] > 1 && view.strides[1] != 1)) {
    throw InvalidArgument("table must be a row-major matrix [vocab][hidden]");
  }
  check_ids(ids, view.shape[0], "ids");
  Array y = new_array(rows, view.shape[1]);
  const Matrix<float> ym = matrix(y);
  py::gil_scoped_release release;
  ops::embed(pool, ids, view, ym);
  return y;
}

Array norm(ThreadPool& pool, py::object x_arg, py::object weight_arg, float eps,
           py::object bias_arg, int64_t group, const std::string& kind) {
  if (kind != "rms" && kind != "layer") {
    throw InvalidArgument("norm kind '" + kind + "': one of rms, layer");
  }
  const ImportedTensor x(x_arg, "x");
  const ImportedTensor weight(weight_arg, "weight");
  const Matrix<const float> xm = x.matrix();
  ops::NormParams params;
  params.kind = kind == "rms" ? ops::NormKind::kRms : ops::NormKind::kLayer;
  params.eps = eps;
  params.group = group == 0 ? xm.cols : group;
  params.is_per_column = weight.view().numel() == xm.cols;
  const int64_t width = params.is_per_column ? xm.cols : params.group;
  params.weight = weight.vector(width);
  std::optional<ImportedTensor> bias;
  if (!bias_arg.is_none()) params.bias = bias.emplace(bias_arg, "bias").vector(width);
  Array y = new_array(xm.rows, xm.cols);
  const Matrix<float> ym = matrix(y);
  py::gil_scoped_release release;
  ops::norm(pool, xm, params, ym);
  return y;
}

Array rotary(ThreadPool& pool, py::object x_arg, py::object positions_arg, py::object cos_sin_arg,
             int64_t head_dim, const std::string& style) {
  const ImportedTensor x(x_arg, "x");
  const ImportedTensor cos_sin(cos_sin_arg, "cos_sin");
  const std::vector<int32_t> positions = import_indices(positions_arg, "positions");
  if (style != "neox" && style != "interleaved") {
    throw InvalidArgument("rotary style '" + style + "': one of neox, interleaved");
  }
  const Matrix<const float> xm = x.matrix();
  const Matrix<const float> table = cos_sin.matrix();
  check_ids(positions, table.rows, "positions");
  Array y = new_array(xm.rows, xm.cols);
  const Matrix<float> ym = matrix(y);
  py::gil_scoped_release release;
  ops::rotary(pool, xm, positions, table, head_dim,
              style == "neox" ? ops::RotaryStyle::kNeox : ops::RotaryStyle::kInterleaved, ym);
  return y;
}

Array activate(ThreadPool& pool, py::object x_arg, const std::string& kind) {
  const ops::Activation activation = ops::activation_from_name(kind);
  const ImportedTensor x(x_arg, "x");
  const Matrix<const float> xm = x.matrix();
  if (activation.is_gated && xm.cols % 2 != 0) {
    throw InvalidArgument("x must have an even number of columns");
  }
  Array y = new_array(xm.rows, activation.is_gated ? xm.cols / 2 : xm.cols);
  const Matrix<float> ym = matrix(y);
  py::gil_scoped_release release;
  ops::activate(pool, xm, activation, ym);
  return y;
}

using Map = void (*)(ThreadPool&, Matrix<const float>, float, Matrix<float>);

template <Map f>
Array map(ThreadPool& pool, py::object x_arg, float argument) {
  const ImportedTensor x(x_arg, "x");
  const Matrix<const float> xm = x.matrix();
  Array y = new_array(xm.rows, xm.cols);
  const Matrix<float> ym = matrix(y);
  py::gil_scoped_release release;
  f(pool, xm, argument, ym);
  return y;
}

Array add(ThreadPool& pool, py::object a_arg, py::object b_arg) {
  const ImportedTensor a(a_arg, "a");
  const ImportedTensor b(b_arg, "b");
  const Matrix<const float> am = a.matrix();
  const Matrix<const float> bm = b.matrix();
  Array y = new_array(am.rows, am.cols);
  const Matrix<float> ym = matrix(y);
  py::gil_scoped_release release;
  ops::add(pool, am, bm, ym);
  return y;
}

Array gather_rows(ThreadPool& pool, py::object x_arg, py::object indices_arg) {
  const ImportedTensor x(x_arg, "x");
  const std::vector<int32_t> indices = import_indices(indices_arg, "indices");
  const Matrix<const float> xm = x.matrix();
  check_ids(indices, xm.rows, "indices");
  Array y = new_array(static_cast<int64_t>(indices.size()), xm.cols);
  const Matrix<float> ym = matrix(y);
  py::gil_scoped_release release;
  ops::gather_rows(pool, xm, indices, ym);
  return y;
}

void reshape_and_cache(ThreadPool& pool, py::object k_arg, py::object v_arg,
                       py::object slot_mapping_arg, KvCache& cache) {
  const ImportedTensor k(k_arg, "k");
  const ImportedTensor v(v_arg, "v");
  const std::vector<int32_t> slots = import_indices(slot_mapping_arg, "slot_mapping");
  const Matrix<const float> km = k.matrix();
  const Matrix<const float> vm = v.matrix();
  py::gil_scoped_release release;
  ops::reshape_and_cache(pool, km, vm, slots, cache.view);
}

// What the kernels take on trust from the scheduler is checked where anybody may call.
void check_batch(const std::vector<int32_t>& query_start_loc, const std::vector<int32_t>& seq_lens,
                 const std::vector<int32_t>& block_tables, int64_t stride, int64_t rows,
                 int32_t sliding_window, const ops::KvCacheView& cache) {
  const int64_t num_seqs = static_cast<int64_t>(seq_lens.size());
  if (static_cast<int64_t>(query_start_loc.size()) != num_seqs + 1 || query_start_loc[0] != 0 ||
      query_start_loc[num_seqs] != rows) {
    throw InvalidArgument("query_start_loc must run from 0 to the rows of q in " +
                          std::to_string(num_seqs + 1) + " entries");
  }
  if (static_cast<int64_t>(block_tables.size()) < num_seqs * stride) {
    throw InvalidArgument("block_tables must have a row per sequence");
  }
  for (int64_t i = 0; i < num_seqs; ++i) {
    const int64_t tokens = int64_t{query_start_loc[i + 1]} - query_start_loc[i];
    if (tokens < 0 || seq_lens[i] < tokens) {
      throw InvalidArgument("sequence " + std::to_string(i) + " has " + std::to_string(tokens) +
                            " new tokens and seq_len " + std::to_string(seq_lens[i]));
    }
    const int64_t blocks = (int64_t{seq_lens[i]} + cache.block_size - 1) / cache.block_size;
    const int64_t oldest = sliding_window > 0 ? seq_lens[i] - tokens - sliding_window + 1 : 0;
    if (blocks > stride) {
      throw InvalidArgument("block_tables has " + std::to_string(stride) + " columns, sequence " +
                            std::to_string(i) + " needs " + std::to_string(blocks));
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const int32_t id = block_tables[static_cast<size_t>(i * stride + b)];
      // What no token sees may be missing.
      const int32_t least = (b + 1) * cache.block_size <= oldest ? kNoBlock : 0;
      if (id < least || id >= cache.num_blocks) {
        throw InvalidArgument("block_tables holds " + std::to_string(id) + ", not a block of " +
                              std::to_string(cache.num_blocks));
      }
    }
  }
}

Array paged_attention(ThreadPool& pool, py::object q_arg, const KvCache& cache,
                      py::object query_start_loc_arg, py::object seq_lens_arg,
                      py::object block_tables_arg, int32_t num_heads, float scale,
                      int32_t sliding_window, float soft_cap, const OptionalArg& slopes_arg,
                      const std::optional<Array>& out_arg, const std::string& activations) {
  const ImportedTensor q(q_arg, "q");
  const Matrix<const float> qm = q.matrix();
  const std::vector<int32_t> query_start_loc =
      import_indices(query_start_loc_arg, "query_start_loc");
  const std::vector<int32_t> seq_lens = import_indices(seq_lens_arg, "seq_lens");
  int64_t stride = 0;
  const std::vector<int32_t> block_tables =
      import_indices(block_tables_arg, "block_tables", &stride);
  if (num_heads <= 0 || sliding_window < 0 || soft_cap < 0.0f) {
    throw InvalidArgument("num_heads must be positive, sliding_window and soft_cap not negative");
  }
  check_batch(query_start_loc, seq_lens, block_tables, stride, qm.rows, sliding_window, cache.view);
  ops::AttentionBatch batch;
  batch.num_seqs = static_cast<int32_t>(seq_lens.size());
  batch.query_start_loc = query_start_loc.data();
  batch.seq_lens = seq_lens.data();
  batch.block_tables = block_tables.data();
  batch.block_table_stride = static_cast<int32_t>(stride);
  ops::AttentionParams params;
  params.num_heads = num_heads;
  params.scale = scale;
  params.sliding_window = sliding_window;
  params.soft_cap = soft_cap;
  params.activations = ops::activations_from_name(activations);
  std::unique_ptr<ImportedTensor> slopes;
  if (slopes_arg) {
    slopes = std::make_unique<ImportedTensor>(*slopes_arg, "alibi_slopes");
    params.alibi_slopes = slopes->vector(num_heads);
  }
  Array out = result_array(out_arg, qm.rows, qm.cols);
  const Matrix<float> om = matrix(out);
  py::gil_scoped_release release;
  ops::paged_attention(pool, qm, cache.view, batch, params, om);
  return out;
}

void copy_blocks(ThreadPool& pool, KvCache& cache, py::object copies_arg) {
  const auto copies = import_pairs<BlockCopy>(copies_arg, "copies");
  py::gil_scoped_release release;
  ops::copy_blocks(pool, cache.view, copies);
}

void swap_blocks(ThreadPool& pool, KvCache& device, KvCache& host, py::object swaps_arg,
                 const std::string& direction) {
  if (direction != "out" && direction != "in") {
    throw InvalidArgument("direction is '" + direction + "': one of out, in");
  }
  const auto swaps = import_pairs<BlockSwap>(swaps_arg, "swaps");
  py::gil_scoped_release release;
  ops::swap_blocks(pool, device.view, host.view, swaps,
                   direction == "out" ? ops::SwapDirection::kOut : ops::SwapDirection::kIn);
}

}  // namespace

void bind_ops(py::module_& m) {
  py::class_<ThreadPool, std::shared_ptr<ThreadPool>>(m, "ThreadPool")
      .def(py::init<int, std::vector<int>>(), py::arg("num_threads") = 0,
           py::arg("cpus") = std::vector<int>(), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("num_threads", &ThreadPool::num_threads)
      .def_property_readonly("num_loops", &ThreadPool::num_loops)
      .def(
          "run_empty_loops",
          [](ThreadPool& pool, int count) {
            for (int i = 0; i < count; ++i) pool.run([](int) {});
          },
          py::arg("count"), py::call_guard<py::gil_scoped_release>());

  py::module_ o = m.def_submodule("ops", "The CPU ops; see ops.pyi");
  o.def("cpu_isa", &ops::cpu_isa);

  py::class_<ops::PackedWeight>(o, "PackedWeight")
      .def(py::init([](py::object weight, const std::string& format, ThreadPool& pool,
                       const std::optional<std::string>& source_dtype) {
             const ImportedTensor tensor(weight, "weight", source_dtype);
             const WeightFormat stored = weight_format_from_name(format);
             py::gil_scoped_release release;
             return ops::PackedWeight::pack(tensor.view(), stored, pool);
           }),
           py::arg("weight"), py::arg("format"), py::arg("pool"),
           py::arg("source_dtype") = py::none())
      .def_static(
          "from_blocks",
          [](py::object blocks, const std::string& format, ThreadPool& pool) {
            const ImportedTensor tensor(blocks, "blocks");
            py::gil_scoped_release release;
            return ops::PackedWeight::pack_blocks(tensor.view(), weight_format_from_name(format),
                                                  pool);
          },
          py::arg("blocks"), py::arg("format"), py::arg("pool"))
      .def_property_readonly("in_features", &ops::PackedWeight::in_features)
      .def_property_readonly("out_features", &ops::PackedWeight::out_features)
      .def_property_readonly(
          "format", [](const ops::PackedWeight& w) { return weight_format_name(w.format()); })
      .def_property_readonly("nbytes", &ops::PackedWeight::bytes);

  py::class_<KvCache>(o, "KvCache")
      .def(py::init<int32_t, int32_t, int32_t, int32_t, const std::string&>(),
           py::arg("num_blocks"), py::arg("num_kv_heads"), py::arg("head_dim"),
           py::arg("block_size"), py::arg("dtype"))
      .def_readonly("k", &KvCache::k)
      .def_readonly("v", &KvCache::v);

  o.def("linear", &linear, py::arg("pool"), py::arg("x"), py::arg("weight"),
        py::arg("bias") = py::none(), py::arg("out").noconvert() = py::none(),
        py::arg("activations") = "quantized");
  o.def("moe", &moe, py::arg("pool"), py::arg("x"), py::arg("router_logits"), py::arg("experts"),
        py::arg("top_k"), py::arg("renormalize") = false, py::arg("kind") = "silu_and_mul",
        py::arg("activations") = "quantized");
  o.def("embed", &embed, py::arg("pool"), py::arg("ids"), py::arg("table"));
  o.def("norm", &norm, py::arg("pool"), py::arg("x"), py::arg("weight"), py::arg("eps"),
        py::arg("bias") = py::none(), py::arg("group") = 0, py::arg("kind") = "rms");
  o.def("rotary", &rotary, py::arg("pool"), py::arg("x"), py::arg("positions"), py::arg("cos_sin"),
        py::arg("head_dim"), py::arg("style") = "neox");
  o.def("activate", &activate, py::arg("pool"), py::arg("x"), py::arg("kind"));
  o.def("scale", &map<ops::scale>, py::arg("pool"), py::arg("x"), py::arg("factor"));
  o.def("clamp", &map<ops::clamp>, py::arg("pool"), py::arg("x"), py::arg("limit"));
  o.def("soft_cap", &map<ops::soft_cap>, py::arg("pool"), py::arg("x"), py::arg("cap"));
  o.def("add", &add, py::arg("pool"), py::arg("a"), py::arg("b"));
  o.def("gather_rows", &gather_rows, py::arg("pool"), py::arg("x"), py::arg("indices"));
  o.def("reshape_and_cache", &reshape_and_cache, py::arg("pool"), py::arg("k"), py::arg("v"),
        py::arg("slot_mapping"), py::arg("cache"));
  o.def("paged_attention", &paged_attention, py::arg("pool"), py::arg("q"), py::arg("cache"),
        py::arg("query_start_loc"), py::arg("seq_lens"), py::arg("block_tables"),
        py::arg("num_heads"), py::arg("scale"), py::arg("sliding_window") = 0,
        py::arg("soft_cap") = 0.0f, py::arg("alibi_slopes") = py::none(),
        py::arg("out").noconvert() = py::none(), py::arg("activations") = "quantized");
  o.def("copy_blocks", &copy_blocks, py::arg("pool"), py::arg("cache"), py::arg("copies"));
  o.def("swap_blocks", &swap_blocks, py::arg("pool"), py::arg("device"), py::arg("host"),
        py::arg("swaps"), py::arg("direction"));
}

}  // namespace fastpage
