// Prefill attention, batch-invariant. A file of its own: else it would take as long to compile as
// all others together.
#include "cuda/prefill_kernel.cuh"

namespace fastpage::cuda {

void launch_many_rows(DType dtype, const AttentionArgs& args, int32_t num_items, Stream stream) {
  launch_tiles<true>(dtype, args, num_items, stream);
}

}  // namespace fastpage::cuda
