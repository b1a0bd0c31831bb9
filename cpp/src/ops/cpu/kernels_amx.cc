#include "ops/cpu/kernel_table.h"

#if defined(__AVX512BF16__) && \
    (defined(FASTPAGE_EMULATE_AMX) || (defined(__AMX_BF16__) && defined(__AMX_INT8__)))
#if !defined(__clang__)
// GCC 12 takes the undefined operands in its own header for a mistake.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#define FASTPAGE_ROW_TILE 12

namespace fastpage::ops::cpu {
namespace {
#include "ops/cpu/vec_avx512.h"
//
#include "ops/cpu/dot_avx512_common.h"
//
#include "ops/cpu/tile_impl.h"
//
#include "ops/cpu/amx_config.h"
//
#ifdef FASTPAGE_EMULATE_AMX
#include "ops/cpu/amx_emulation.h"
using KernelTiles = EmulatedTiles;
#else
#include "ops/cpu/amx_tiles.h"
using KernelTiles = AmxTiles;
#endif
#include "ops/cpu/amx_impl.h"
static_assert(kTilePanel == kPanel, "");

// Fewer rows than this are VNNI's: a tile of few rows takes as long as a full one.
constexpr int kLeastInt8Rows = 5;
}  // namespace

// All else is as without tiles: 4-bit weights too, whose halves would have to be spread out first.
const KernelTable* amx_kernels() {
  static const KernelTable table = [] {
    KernelTable t = *avx512_bf16_kernels();
    t.name = "amx";
    t.bf16.row_tile = 2 * kTileRows;
    set_bf16_tiles<2 * kTileRows>(t.bf16.tile);
    t.quant.row_tile[kInt8] = t.quant.row_tile[kQ8_0] = kTileRows;
    set_int8_tiles<kTileRows, kLeastInt8Rows, kInt8>(t.quant.tile[kInt8]);
    set_int8_tiles<kTileRows, kLeastInt8Rows, kQ8_0>(t.quant.tile[kQ8_0]);
    return t;
  }();
  return &table;
}

}  // namespace fastpage::ops::cpu
#else
namespace fastpage::ops::cpu {
const KernelTable* amx_kernels() { return nullptr; }
}  // namespace fastpage::ops::cpu
#endif
