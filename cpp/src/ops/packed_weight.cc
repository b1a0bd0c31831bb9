#include "ops/packed_weight.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "ops/quantized_weight.h"

namespace fastpage::ops {

PackedWeight::PackedWeight() : impl_(std::make_unique<Impl>()) {}
PackedWeight::~PackedWeight() = default;
PackedWeight::PackedWeight(PackedWeight&&) noexcept = default;
PackedWeight& PackedWeight::operator=(PackedWeight&&) noexcept = default;

int64_t PackedWeight::in_features() const { return impl_->in_features; }
int64_t PackedWeight::out_features() const { return impl_->out_features; }
WeightFormat PackedWeight::format() const { return impl_->format; }
size_t PackedWeight::bytes() const {
  return static_cast<size_t>(impl_->num_panels * impl_->panel_bytes);
}

namespace {

bool is_quantized(WeightFormat format) { return format >= WeightFormat::kInt8; }

cpu::QuantFormat quant_format(WeightFormat format) {
  return static_cast<cpu::QuantFormat>(static_cast<int>(format) -
                                       static_cast<int>(WeightFormat::kInt8));
}

void check_matrix(const TensorView& weight) {
  if (weight.ndim != 2) {
    throw InvalidArgument("weight has " + std::to_string(weight.ndim) +
                          " dimensions: [out_features][in_features] is needed");
  }
  if (weight.numel() > 0 && weight.shape[1] > 1 && weight.strides[1] != 1) {
    throw InvalidArgument("weight is not row-major: make it contiguous");
  }
}

// Sizes and memory.
void prepare(PackedWeight::Impl* impl, WeightFormat format, int64_t out_features,
             int64_t in_features) {
  const int64_t width = kernels().panel_width;
  impl->out_features = out_features;
  impl->in_features = in_features;
  impl->format = format;
  impl->is_quantized = is_quantized(format);
  impl->num_panels = (out_features + width - 1) / width;
  if (impl->is_quantized) {
    impl->quant = quant_format(format);
    impl->num_steps = (in_features + cpu::kGroup - 1) / cpu::kGroup;
    impl->step_bytes = cpu::group_bytes(impl->quant, static_cast<int>(width));
  } else {
    impl->type = static_cast<cpu::ElementType>(format);
    const int64_t step = impl->type == cpu::kBf16 ? cpu::kGroup : 1;
    impl->num_steps = (in_features + step - 1) / step;
    impl->step_bytes = step * width * (impl->type == cpu::kF32 ? 4 : 2);
  }
  impl->panel_bytes = impl->num_steps * impl->step_bytes;
  if (impl->is_quantized && !cpu::has_group_scales(impl->quant)) {
    impl->panel_bytes += width * static_cast<int64_t>(sizeof(float));
  }
  const int64_t bytes = impl->num_panels * impl->panel_bytes;
  impl->data = allocate_shared(static_cast<size_t>(bytes));
}

// fn(panel, the first of its out_features, how many there are), on all threads.
template <typename F>
void for_panels(const PackedWeight::Impl& impl, ThreadPool& pool, const F& fn) {
  const int64_t width = kernels().panel_width;
  pool.parallel_for(impl.num_panels, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * width;
      fn(i, first, static_cast<int>(std::min(width, impl.out_features - first)));
    }
  });
}

// Quantizes the rows of a float matrix into panels; false if one holds what is not finite.
bool quantize(const PackedWeight::Impl& impl, const TensorView& weight, ThreadPool& pool) {
  const cpu::KernelTable& table = kernels();
  const cpu::ElementType source = element_type(weight.dtype, "weight");
  const int64_t row_bytes = weight.strides[0] * static_cast<int64_t>(dtype_size(weight.dtype));
  const bool is_int8 = impl.quant == cpu::kInt8;
  const auto padded = static_cast<size_t>(impl.num_steps * cpu::kGroup);
  std::atomic<bool> is_finite{true};
  for_panels(impl, pool, [&](int64_t panel, int64_t first, int n) {
    std::vector<float> row(padded);
    std::vector<uint8_t> blocks(static_cast<size_t>(impl.num_steps * cpu::block_bytes(impl.quant)));
    PanelWriter writer(impl, panel);
    for (int column = 0; column < n; ++column) {
      table.widen(source, weight.as<const char>() + (first + column) * row_bytes, impl.in_features,
                  row.data());
      float scale;
      if (is_int8) {
        auto* q = reinterpret_cast<int8_t*>(blocks.data());
        scale = table.quant.quantize_int8(row.data(), impl.in_features, q);
        writer.write_scale(column, scale);
      } else {
        scale = table.quant.quantize_q4_1(row.data(), impl.in_features, blocks.data());
      }
      if (!std::isfinite(scale)) is_finite = false;
      writer.write_column(column, blocks.data());
    }
  });
  return is_finite;
}

}  // namespace

PackedWeight PackedWeight::pack(const TensorView& weight, WeightFormat format, ThreadPool& pool) {
  const cpu::ElementType source = element_type(weight.dtype, "weight");
  check_matrix(weight);
  if (format == WeightFormat::kQ8_0 || format == WeightFormat::kQ4_0) {
    throw InvalidArgument(std::string("a weight cannot be quantized to ") +
                          weight_format_name(format) + ": int8 or q4_1");
  }
  PackedWeight packed;
  Impl& impl = *packed.impl_;
  prepare(&impl, format, weight.shape[0], weight.shape[1]);
  if (impl.is_quantized) {
    if (!quantize(impl, weight, pool)) {
      throw InvalidArgument("weight holds NaN or infinity: it cannot be quantized");
    }
    return packed;
  }
  const int64_t row_bytes = weight.strides[0] * static_cast<int64_t>(dtype_size(weight.dtype));
  for_panels(impl, pool, [&](int64_t panel, int64_t first, int n) {
    kernels().pack_panel(source, weight.as<const char>() + first * row_bytes, weight.strides[0], n,
                         impl.in_features, impl.type, impl.panel(panel));
  });
  return packed;
}

PackedWeight PackedWeight::pack_blocks(const TensorView& blocks, WeightFormat format,
                                       ThreadPool& pool) {
  if (!is_quantized(format) || format == WeightFormat::kInt8) {
    throw InvalidArgument(std::string("there are no blocks of ") + weight_format_name(format) +
                          ": one of q8_0, q4_0, q4_1");
  }
  if (blocks.dtype != DType::kUInt8) {
    throw InvalidArgument(std::string("blocks are ") + dtype_name(blocks.dtype) +
                          ": uint8 is needed");
  }
  check_matrix(blocks);
  const int64_t block_bytes = cpu::block_bytes(quant_format(format));
  if (blocks.shape[1] % block_bytes != 0) {
    throw InvalidArgument("rows of " + std::to_string(blocks.shape[1]) +
                          " bytes are no blocks of " + weight_format_name(format) +
                          ", which take " + std::to_string(block_bytes));
  }
  PackedWeight packed;
  Impl& impl = *packed.impl_;
  prepare(&impl, format, blocks.shape[0], blocks.shape[1] / block_bytes * cpu::kGroup);
  for_panels(impl, pool, [&](int64_t panel, int64_t first, int n) {
    PanelWriter writer(impl, panel);
    for (int column = 0; column < n; ++column) {
      writer.write_column(column,
                          blocks.as<const uint8_t>() + (first + column) * blocks.strides[0]);
    }
  });
  return packed;
}

void PackedWeight::Impl::unpack_row(int64_t out_feature, float* out) const {
  const int64_t width = kernels().panel_width;
  const int64_t p = out_feature / width;
  const int column = static_cast<int>(out_feature % width);
  if (is_quantized) {
    unpack_quantized_row(*this, p, column, out);
  } else {
    kernels().unpack_row(type, panel(p), column, in_features, out);
  }
}

}  // namespace fastpage::ops
