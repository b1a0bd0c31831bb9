// How a PackedWeight is stored: panels of kernels().panel_width out_features one after the other,
// each in_features of `type` (see cpu/linear_impl.h) or groups of `quant` (see cpu/quant_format.h),
// the last one filled up with zeros.
#pragma once

#include "fastpage/ops.h"
#include "ops/kernels.h"
#include "ops/scratch.h"

namespace fastpage::ops {

struct PackedWeight::Impl {
  int64_t in_features = 0;
  int64_t out_features = 0;
  WeightFormat format = WeightFormat::kFloat32;
  bool is_quantized = false;
  cpu::ElementType type = cpu::kF32;    // unless quantized
  cpu::QuantFormat quant = cpu::kInt8;  // if quantized
  int64_t num_steps = 0;                // in_features, or groups of them if bf16 or quantized
  int64_t step_bytes = 0;               // of a panel
  int64_t num_panels = 0;
  int64_t panel_bytes = 0;
  std::shared_ptr<char> data;

  char* panel(int64_t i) const { return data.get() + i * panel_bytes; }
  // kInt8: the scales of a panel's out_features.
  float* scales(int64_t i) const {
    return reinterpret_cast<float*>(panel(i) + num_steps * step_bytes);
  }
  void unpack_row(int64_t out_feature, float* out) const;
};

}  // namespace fastpage::ops
