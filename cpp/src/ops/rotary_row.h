// Rotary embedding of one row: what `rotary` and `rotary_and_cache` have in common.
#pragma once

#include <string>

#include "fastpage/ops.h"

namespace fastpage::ops {

class RotaryRow {
 public:
  // Throws InvalidArgument unless the table fits the heads, or if it is empty.
  RotaryRow(Matrix<const float> cos_sin, int64_t head_dim, RotaryStyle style);

  // x, y: `cols` columns, whole heads; y may be x. Positions out of range are clamped.
  void run(const float* x, int32_t position, int64_t cols, float* y) const;

 private:
  Matrix<const float> cos_sin_;
  int64_t head_dim_;
  void (*rotate_)(const float* x, const float* cos, const float* sin, int64_t half, float* y);
};

}  // namespace fastpage::ops
