#include <algorithm>
#include <string>

#include "ops/packed_weight.h"
#include "ops/rotary_row.h"

namespace fastpage::ops {

namespace {

// fn(first row, past the last), in the calling thread if there is little to do.
template <typename F>
void for_rows(ThreadPool& pool, int64_t rows, int64_t cols, const F& fn) {
  const int64_t grain = rows * cols < kSerialElements ? std::max<int64_t>(1, rows) : 1;
  pool.parallel_for(rows, grain, [&](int64_t begin, int64_t end, int) { fn(begin, end); });
}

std::string shape(int64_t rows, int64_t cols) {
  return std::to_string(rows) + " x " + std::to_string(cols);
}

void check_shape(const char* op, const char* name, int64_t rows, int64_t cols, int64_t want_rows,
                 int64_t want_cols) {
  if (rows == want_rows && cols == want_cols) return;
  throw InvalidArgument(std::string(op) + ": " + name + " is " + shape(rows, cols) + ", not " +
                        shape(want_rows, want_cols));
}

int64_t clamp_index(int64_t i, int64_t n) { return i < 0 ? 0 : i >= n ? n - 1 : i; }

void norm_group(const NormParams& params, const float* x, const float* weight, const float* bias,
                float* y) {
  if (params.kind == NormKind::kLayer) {
    return kernels().layer_norm(x, weight, bias, params.eps, params.group, y);
  }
  kernels().rms_norm(x, weight, params.eps, params.group, y);
  if (bias != nullptr) kernels().add(y, bias, params.group, y);
}

// kernel(x, argument, columns, y) of every row.
template <typename Kernel>
void map_rows(ThreadPool& pool, const char* op, Matrix<const float> x, Matrix<float> y,
              Kernel kernel, float argument) {
  check_shape(op, "y", y.rows, y.cols, x.rows, x.cols);
  for_rows(pool, x.rows, x.cols, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernel(x.row(i), argument, x.cols, y.row(i));
  });
}

}  // namespace

void embed(ThreadPool& pool, Span<const TokenId> ids, const TensorView& table, Matrix<float> y) {
  const cpu::ElementType type = element_type(table.dtype, "embedding table");
  const int64_t rows = static_cast<int64_t>(ids.size());
  if (table.ndim != 2 || table.shape[0] == 0) {
    throw InvalidArgument("embed: the table must be [vocab][hidden] and not empty");
  }
  if (table.shape[1] > 1 && table.strides[1] != 1) {
    throw InvalidArgument("embed: the table is not row-major: make it contiguous");
  }
  check_shape("embed", "y", y.rows, y.cols, rows, table.shape[1]);
  const int64_t row_bytes = table.strides[0] * static_cast<int64_t>(dtype_size(table.dtype));
  for_rows(pool, rows, y.cols, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const char* row = table.as<const char>() + clamp_index(ids[i], table.shape[0]) * row_bytes;
      kernels().widen(type, row, y.cols, y.row(i));
    }
  });
}

void embed(ThreadPool& pool, Span<const TokenId> ids, const PackedWeight& table, Matrix<float> y) {
  const PackedWeight::Impl& w = table.impl();
  const int64_t rows = static_cast<int64_t>(ids.size());
  if (w.out_features == 0) throw InvalidArgument("embed: the table is empty");
  check_shape("embed", "y", y.rows, y.cols, rows, w.in_features);
  for_rows(pool, rows, y.cols, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      w.unpack_row(clamp_index(ids[i], w.out_features), y.row(i));
    }
  });
}

void norm(ThreadPool& pool, Matrix<const float> x, const NormParams& params, Matrix<float> y) {
  check_shape("norm", "y", y.rows, y.cols, x.rows, x.cols);
  const int64_t group = params.group;
  if (group <= 0 || x.cols % group != 0) {
    throw InvalidArgument("norm: groups of " + std::to_string(group) + " do not divide " +
                          std::to_string(x.cols) + " columns");
  }
  for_rows(pool, x.rows, x.cols, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t c = 0; c < x.cols; c += group) {
        const int64_t at = params.is_per_column ? c : 0;
        const float* bias = params.bias == nullptr ? nullptr : params.bias + at;
        norm_group(params, x.row(i) + c, params.weight + at, bias, y.row(i) + c);
      }
    }
  });
}

RotaryRow::RotaryRow(Matrix<const float> cos_sin, int64_t head_dim, RotaryStyle style)
    : cos_sin_(cos_sin),
      head_dim_(head_dim),
      rotate_(style == RotaryStyle::kNeox ? kernels().rotary_neox : kernels().rotary_interleaved) {
  if (head_dim <= 0 || cos_sin.cols > head_dim || cos_sin.cols % 2 != 0) {
    throw InvalidArgument("rotary: rotary_dim " + std::to_string(cos_sin.cols) + " and head_dim " +
                          std::to_string(head_dim) + " do not fit together");
  }
  if (cos_sin.rows == 0) throw InvalidArgument("rotary: cos_sin has no rows");
}

void RotaryRow::run(const float* x, int32_t position, int64_t cols, float* y) const {
  const int64_t rotary_dim = cos_sin_.cols;
  const float* cos = cos_sin_.row(clamp_index(position, cos_sin_.rows));
  for (int64_t c = 0; c < cols; c += head_dim_) {
    rotate_(x + c, cos, cos + rotary_dim / 2, rotary_dim / 2, y + c);
    if (x != y) std::copy(x + c + rotary_dim, x + c + head_dim_, y + c + rotary_dim);
  }
}

void rotary(ThreadPool& pool, Matrix<const float> x, Span<const int32_t> positions,
            Matrix<const float> cos_sin, int64_t head_dim, RotaryStyle style, Matrix<float> y) {
  check_shape("rotary", "y", y.rows, y.cols, x.rows, x.cols);
  if (static_cast<int64_t>(positions.size()) != x.rows) {
    throw InvalidArgument("rotary: " + std::to_string(positions.size()) + " positions for " +
                          std::to_string(x.rows) + " rows");
  }
  if (x.rows == 0) return;
  const RotaryRow row(cos_sin, head_dim, style);
  if (x.cols % head_dim != 0) {
    throw InvalidArgument("rotary: heads of " + std::to_string(head_dim) + " do not divide " +
                          std::to_string(x.cols) + " columns");
  }
  for_rows(pool, x.rows, x.cols, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) row.run(x.row(i), positions[i], x.cols, y.row(i));
  });
}

ActivationKernel activation_kernel(ActivationKind kind) {
  return kernels().activate[static_cast<int>(kind) - 1];
}

Activation activation_from_name(const std::string& name) {
  constexpr const char* kNames[] = {"silu", "gelu", "gelu_tanh", "relu"};
  const std::string gate = "_and_mul";
  std::string known;
  for (size_t i = 0; i < std::size(kNames); ++i) {
    const auto kind = static_cast<ActivationKind>(i + 1);
    if (name == kNames[i]) return {kind, false};
    if (name == kNames[i] + gate) return {kind, true};
    known +=
        std::string(kNames[i]) + ", " + kNames[i] + gate + (i + 1 < std::size(kNames) ? ", " : "");
  }
  throw InvalidArgument("activation '" + name + "': one of " + known);
}

void activate(ThreadPool& pool, Matrix<const float> x, Activation activation, Matrix<float> y) {
  check_shape("activate", "x", x.rows, x.cols, y.rows, activation.is_gated ? 2 * y.cols : y.cols);
  if (activation.kind == ActivationKind::kNone) {
    throw InvalidArgument("activate: no activation is given");
  }
  const auto kernel = activation_kernel(activation.kind);
  for_rows(pool, y.rows, y.cols, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernel(x.row(i), activation.is_gated ? x.row(i) + y.cols : nullptr, y.cols, y.row(i));
    }
  });
}

void scale(ThreadPool& pool, Matrix<const float> x, float factor, Matrix<float> y) {
  map_rows(pool, "scale", x, y, kernels().scale, factor);
}

void clamp(ThreadPool& pool, Matrix<const float> x, float limit, Matrix<float> y) {
  map_rows(pool, "clamp", x, y, kernels().clamp, limit);
}

void soft_cap(ThreadPool& pool, Matrix<const float> x, float cap, Matrix<float> y) {
  map_rows(pool, "soft_cap", x, y, kernels().soft_cap, cap);
}

void add(ThreadPool& pool, Matrix<const float> a, Matrix<const float> b, Matrix<float> y) {
  check_shape("add", "b", b.rows, b.cols, a.rows, a.cols);
  check_shape("add", "y", y.rows, y.cols, a.rows, a.cols);
  for_rows(pool, y.rows, y.cols, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels().add(a.row(i), b.row(i), y.cols, y.row(i));
    }
  });
}

void gather_rows(ThreadPool& pool, Matrix<const float> x, Span<const int32_t> indices,
                 Matrix<float> y) {
  check_shape("gather_rows", "y", y.rows, y.cols, static_cast<int64_t>(indices.size()), x.cols);
  if (x.rows == 0 && y.rows > 0) throw InvalidArgument("gather_rows: x has no rows");
  for_rows(pool, y.rows, y.cols, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* from = x.row(clamp_index(indices[i], x.rows));
      std::copy(from, from + x.cols, y.row(i));
    }
  });
}

}  // namespace fastpage::ops
