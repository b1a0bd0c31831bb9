// Prefill attention, of rows that may depend on the plan.
#include "cuda/prefill_kernel.cuh"

namespace fastpage::cuda {

void launch_prefill(DType dtype, const AttentionArgs& args, int32_t num_items, Stream stream) {
  launch_tiles<false>(dtype, args, num_items, stream);
}

}  // namespace fastpage::cuda
