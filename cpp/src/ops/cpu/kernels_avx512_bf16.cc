#include "ops/cpu/kernel_table.h"

#if defined(__AVX512BF16__)
#if !defined(__clang__)
// GCC 12 takes the undefined operands in its own header for a mistake.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#define FASTPAGE_ROW_TILE 12

namespace fastpage::ops::cpu {
namespace {
#include "ops/cpu/convert_scalar.h"
#include "ops/cpu/vec_avx512.h"
//
#include "ops/cpu/tile_impl.h"
#include "ops/cpu/vector_math.h"
//
#include "ops/cpu/attention_impl.h"
#include "ops/cpu/bf16_impl.h"
//
#include "ops/cpu/attention_bf16_impl.h"
}  // namespace

// All else is as without the products of bf16.
const KernelTable* avx512_bf16_kernels() {
  static const KernelTable table = [] {
    KernelTable t = *avx512_vnni_kernels();
    t.name = "avx512_bf16";
    t.bf16 = {kRowTile, round_rows, FASTPAGE_ROW_TILES(bf16_tile, void), pair_queries,
              bf16_attention_tile};
    return t;
  }();
  return &table;
}

}  // namespace fastpage::ops::cpu
#else
namespace fastpage::ops::cpu {
const KernelTable* avx512_bf16_kernels() { return nullptr; }
}  // namespace fastpage::ops::cpu
#endif
