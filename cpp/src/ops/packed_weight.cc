#include "ops/packed_weight.h"

#include <algorithm>
#include <string>

namespace fastpage::ops {

PackedWeight::PackedWeight() : impl_(std::make_unique<Impl>()) {}
PackedWeight::~PackedWeight() = default;
PackedWeight::PackedWeight(PackedWeight&&) noexcept = default;
PackedWeight& PackedWeight::operator=(PackedWeight&&) noexcept = default;

int64_t PackedWeight::in_features() const { return impl_->in_features; }
int64_t PackedWeight::out_features() const { return impl_->out_features; }
DType PackedWeight::dtype() const { return impl_->dtype; }
size_t PackedWeight::bytes() const {
  return static_cast<size_t>(impl_->num_panels * impl_->panel_bytes);
}

PackedWeight PackedWeight::pack(const TensorView& weight, DType dtype, ThreadPool& pool) {
  const cpu::ElementType source = element_type(weight.dtype, "weight");
  const cpu::ElementType stored = element_type(dtype, "the dtype to store a weight in");
  if (weight.ndim != 2) {
    throw InvalidArgument("weight has " + std::to_string(weight.ndim) +
                          " dimensions: [out_features][in_features] is needed");
  }
  if (weight.numel() > 0 && weight.shape[1] > 1 && weight.strides[1] != 1) {
    throw InvalidArgument("weight is not row-major: make it contiguous");
  }
  const cpu::KernelTable& table = kernels();
  PackedWeight packed;
  Impl& impl = *packed.impl_;
  impl.out_features = weight.shape[0];
  impl.in_features = weight.shape[1];
  impl.dtype = dtype;
  impl.type = stored;
  impl.num_panels = (impl.out_features + table.panel_width - 1) / table.panel_width;
  impl.panel_bytes = impl.in_features * table.panel_width * static_cast<int64_t>(dtype_size(dtype));
  impl.data.reset(static_cast<char*>(allocate_aligned(packed.bytes())));

  const int64_t row_bytes = weight.strides[0] * static_cast<int64_t>(dtype_size(weight.dtype));
  pool.parallel_for(impl.num_panels, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * table.panel_width;
      const int n =
          static_cast<int>(std::min<int64_t>(table.panel_width, impl.out_features - first));
      table.pack_panel(source, weight.as<const char>() + first * row_bytes, weight.strides[0], n,
                       impl.in_features, stored, impl.panel(i));
    }
  });
  return packed;
}

}  // namespace fastpage::ops
