#include "ops/cpu/kernel_table.h"

#if defined(__AVXVNNI__)
#include <immintrin.h>

#define FASTPAGE_ROW_TILE 6
#define FASTPAGE_QUANT_ROW_TILE 4

namespace fastpage::ops::cpu {
namespace {
#include "ops/cpu/convert_scalar.h"
#include "ops/cpu/vec_avx2.h"
//
#include "ops/cpu/dot_avx2_vnni.h"
//
#include "ops/cpu/kernels_impl.h"
}  // namespace

const KernelTable* avx2_vnni_kernels() {
  static constexpr KernelTable table = make_table("avx2_vnni");
  return &table;
}

}  // namespace fastpage::ops::cpu
#else
namespace fastpage::ops::cpu {
const KernelTable* avx2_vnni_kernels() { return nullptr; }
}  // namespace fastpage::ops::cpu
#endif
