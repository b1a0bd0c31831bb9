// Parts of a linear layer, for ops that share its work between threads themselves.
#pragma once

#include "fastpage/ops.h"

namespace fastpage::ops {

// The parts that the columns of a linear layer's output come in, each a panel of the weight (of a
// gated activation: a panel of the left half and its fellow).
struct LinearSplit {
  int64_t count = 0;
  int64_t width = 0;  // in columns; the last part may be narrower
};

// True if a gated activation can be fused into a part: the halves do not meet within a panel.
bool can_fuse_activation(const PackedWeight& weight);
LinearSplit linear_split(const PackedWeight& weight, const LinearFusion& fusion);

// Parts [begin, end) of linear(), in the calling thread: to the bit what linear() gives. Writes no
// other columns of y.
void linear_part(Matrix<const float> x, const PackedWeight& weight, Activations activations,
                 const LinearFusion& fusion, int64_t begin, int64_t end, Matrix<float> y);

}  // namespace fastpage::ops
