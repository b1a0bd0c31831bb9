#if defined(__AVX512F__)
#include "core/sampling/kernels_impl.h"

namespace fastpage::sampling {

const Kernels* const kAvx512Kernels = &kKernels;

}  // namespace fastpage::sampling
#else
#include "core/sampling/kernels.h"

namespace fastpage::sampling {

const Kernels* const kAvx512Kernels = nullptr;

}  // namespace fastpage::sampling
#endif
