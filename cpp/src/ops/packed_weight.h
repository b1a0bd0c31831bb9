// How a PackedWeight is stored: panels of kernels().panel_width out_features one after the other,
// each [in_features][panel_width] of `type` (see cpu/linear_impl.h), the last one filled up with
// zeros.
#pragma once

#include "fastpage/ops.h"
#include "ops/kernels.h"
#include "ops/scratch.h"

namespace fastpage::ops {

struct PackedWeight::Impl {
  int64_t in_features = 0;
  int64_t out_features = 0;
  DType dtype = DType::kFloat32;
  cpu::ElementType type = cpu::kF32;
  int64_t num_panels = 0;
  int64_t panel_bytes = 0;
  AlignedArray<char> data;

  char* panel(int64_t i) const { return data.get() + i * panel_bytes; }
};

}  // namespace fastpage::ops
