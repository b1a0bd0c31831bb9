// The kernels, over the vector type V that was defined before; included once per instruction set,
// inside a namespace of its own. See kernel_table.h on what may be included here.
// FASTPAGE_ROW_TILE is kRowTile for the preprocessor, FASTPAGE_QUANT_ROW_TILE kQuantRowTile.
#include "ops/cpu/vector_math.h"
//
#include "ops/cpu/elementwise_impl.h"
#include "ops/cpu/tile_impl.h"
//
#include "ops/cpu/linear_impl.h"
//
#include "ops/cpu/attention_impl.h"
//
#include "ops/cpu/quant_impl.h"

static_assert(kRowTile == FASTPAGE_ROW_TILE && kRowTile <= kMaxRowTile, "");
static_assert(kKvTile % kPanel == 0 && kGranule % kLanes == 0, "");

constexpr KernelTable make_table(const char* name) {
  KernelTable t = {
      name,
      kPanel,
      kRowTile,
      pack_rows,
      pack_panel,
      unpack_row,
      {FASTPAGE_ROW_TILES(linear_tile, PanelF32), FASTPAGE_ROW_TILES(linear_tile, PanelBf16),
       FASTPAGE_ROW_TILES(linear_tile, PanelF16)},
      widen,
      narrow,
      rms_norm,
      layer_norm,
      rotary_neox,
      rotary_interleaved,
      {activate<Silu>, activate<Gelu>, activate<GeluTanh>, activate<Relu>},
      add,
      attention_scratch,
      {attention_tile<CacheF32>, attention_tile<CacheBf16>, attention_tile<CacheF16>,
       attention_tile<CacheI8>},
      attention_merge,
      quantize_i8,
      scale,
      clamp,
      soft_cap,
      make_quant_kernels(),
      {},
  };
  return t;
}
