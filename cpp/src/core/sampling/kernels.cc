#include "core/sampling/kernels.h"

namespace fastpage::sampling {

std::vector<const Kernels*> runnable_kernels() {
  std::vector<const Kernels*> result{&kBaseKernels};
#if defined(__x86_64__)
  if (kAvx2Kernels && __builtin_cpu_supports("avx2")) result.push_back(kAvx2Kernels);
  if (kAvx512Kernels && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) {
    result.push_back(kAvx512Kernels);
  }
#endif
  return result;
}

const Kernels& kernels() {
  static const Kernels& best = *runnable_kernels().back();
  return best;
}

}  // namespace fastpage::sampling
