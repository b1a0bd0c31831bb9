// The loops over a vocabulary, compiled once per instruction set and chosen at run time.
//
// All instruction sets give the same bits: sums run over kLanes interleaved partial sums whatever
// the width of a register is, and no multiplication is fused with an addition. A NaN among the
// values takes part in nothing: it is no maximum, weighs 0 and is on neither side of a pivot.
#pragma once

#include "fastpage/types.h"

namespace fastpage::sampling {

inline constexpr int64_t kLanes = 32;
inline constexpr int64_t kChunk = 1024;  // values that share one partial sum, a multiple of kLanes

constexpr int64_t num_chunks(int64_t n) { return (n + kChunk - 1) / kChunk; }
constexpr int64_t num_maxima(int64_t n) { return num_chunks(n) * kLanes; }

// The values >= a pivot.
struct Split {
  double mass;    // their sum
  int64_t count;  // their number
};

struct Kernels {
  // maxima[c * kLanes + l] = the greatest of the values l, l + kLanes, ... of chunk c, or -inf;
  // returns the greatest of all.
  float (*maxima)(const float* values, int64_t n, float* maxima);
  // The index of the first value >= bound, or -1.
  int64_t (*find)(const float* values, int64_t n, float bound);
  // Indices and values, in order, of those with low <= value <= high; returns their number. Either
  // output may be null; `out_values` may be `values`.
  int64_t (*gather)(const float* values, int64_t n, float low, float high, float* out_values,
                    int32_t* out_indices);
  // weights[i] = w = exp((values[i] - max) * scale), where values <= max; sums[c] = their sum in
  // chunk c. `weights` may be null, or `values`. Exactly 1 at max, relative error below
  // 3e-7 * (1 - log(w)) down to 2^-126, and 0 below 2^-127.
  void (*weigh)(const float* values, int64_t n, float max, float scale, float* weights,
                float* sums);
  // sums[c] = sum of the values >= bound in chunk c.
  void (*sum)(const float* values, int64_t n, float bound, float* sums);
  Split (*split)(const float* values, int64_t n, float pivot);
};

extern const Kernels kBaseKernels;
extern const Kernels* const kAvx2Kernels;    // null where they are not compiled
extern const Kernels* const kAvx512Kernels;  // null where they are not compiled

// The best that this CPU runs.
const Kernels& kernels();
// All that this CPU runs.
std::vector<const Kernels*> runnable_kernels();

}  // namespace fastpage::sampling
