#if defined(__AVX2__)
#include "core/sampling/kernels_impl.h"

namespace fastpage::sampling {

const Kernels* const kAvx2Kernels = &kKernels;

}  // namespace fastpage::sampling
#else
#include "core/sampling/kernels.h"

namespace fastpage::sampling {

const Kernels* const kAvx2Kernels = nullptr;

}  // namespace fastpage::sampling
#endif
