#include "ops/cpu/kernel_table.h"

#define FASTPAGE_ROW_TILE 4
#define FASTPAGE_QUANT_ROW_TILE 4

namespace fastpage::ops::cpu {
namespace {
#include "ops/cpu/convert_scalar.h"
#include "ops/cpu/vec_portable.h"
//
#include "ops/cpu/dot_portable.h"
//
#include "ops/cpu/kernels_impl.h"
}  // namespace

const KernelTable* portable_kernels() {
  static constexpr KernelTable table = make_table("portable");
  return &table;
}

}  // namespace fastpage::ops::cpu
