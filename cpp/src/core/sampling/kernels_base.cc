#include "core/sampling/kernels_impl.h"

namespace fastpage::sampling {

const Kernels kBaseKernels = kKernels;

}  // namespace fastpage::sampling
