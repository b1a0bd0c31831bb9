#include "ops/cpu/kernel_table.h"

#if defined(__AVX512VNNI__)
#if !defined(__clang__)
// GCC 12 takes the undefined operands in its own header for a mistake.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#define FASTPAGE_ROW_TILE 12
#define FASTPAGE_QUANT_ROW_TILE 6

namespace fastpage::ops::cpu {
namespace {
#include "ops/cpu/convert_scalar.h"
#include "ops/cpu/vec_avx512.h"
//
#include "ops/cpu/dot_avx512_vnni.h"
//
#include "ops/cpu/kernels_impl.h"
}  // namespace

const KernelTable* avx512_vnni_kernels() {
  static constexpr KernelTable table = make_table("avx512_vnni");
  return &table;
}

}  // namespace fastpage::ops::cpu
#else
namespace fastpage::ops::cpu {
const KernelTable* avx512_vnni_kernels() { return nullptr; }
}  // namespace fastpage::ops::cpu
#endif
