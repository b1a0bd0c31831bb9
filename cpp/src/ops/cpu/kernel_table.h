// What one instruction set offers: plain functions over raw pointers. The files that implement it
// are compiled with that set's compiler flags, so they include nothing but this header and C
// headers: an inline function of the standard library compiled there could be the copy that the
// linker keeps for the whole program.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "ops/cpu/quant_format.h"

namespace fastpage::ops::cpu {

// Stored element types, in the order of DType.
enum ElementType : int { kF32 = 0, kBf16 = 1, kF16 = 2, kNumElementTypes = 3 };

// In the order of ActivationKind, without kNone.
enum ActivationType : int { kSilu, kGelu, kGeluTanh, kRelu, kNumActivations };

inline constexpr int kMaxRowTile = 32;
inline constexpr int kGranule = 16;  // positions that lie together in a KV block
inline constexpr int kKvTile = 128;  // positions of an attention tile
inline constexpr int kTileGranules = kKvTile / kGranule;

// Bytes of one row of kGroup bf16 activations.
inline constexpr int64_t kBf16GroupBytes = 2 * kGroup;

// y[0..m)[0..n) = a^T panel: rows of one row tile times one panel, over `k` steps of the summed
// dimension: in_features, or groups of them where the weights are bf16 or quantized.
struct LinearTile {
  const void* a;      // [in_features][m], or what round_rows or quantize_rows gives
  const void* panel;  // [k][panel_width] in the panel's own order
  int64_t k;
  float* y;
  int64_t y_stride;
  int n;                  // columns of the panel that exist, <= panel_width
  bool accumulate;        // go on from what y holds
  const float* scale;     // [panel_width], times the sums at the very end; null but for kInt8
  const float* bias;      // [n], added after that, or null
  const char* prefetch;   // memory needed soon, touched step by step
  int64_t prefetch_step;  // bytes per k
};

// How keys and values are stored, in the order of attention_tile.
enum CacheType : int { kCacheF32, kCacheBf16, kCacheF16, kCacheI8, kNumCacheTypes };

// One KV tile's contribution to the rows of an item: tokens of one or several sequences, times the
// query heads of one KV head.
struct AttentionTile {
  // Scaled; row tiles one after the other, each [head_dim][m], or what pair_queries makes of it in
  // the same place.
  const float* q;
  int rows;
  int head_dim;
  const int32_t* positions;  // [rows]
  const float* slopes;       // [rows], ALiBi, or null
  int64_t tile_position;     // of column 0 of the tile
  int sliding_window;        // 0 = none
  float soft_cap;            // 0 = none
  // The tile's keys, its values, then the keys that will be read next; as KvCacheView says; null if
  // nothing there is visible.
  const void* granules[3 * kTileGranules];
  float* scratch;  // attention_scratch(head_dim) floats, 64-byte aligned
  // The fold of all tiles so far; updated.
  float* out;      // [rows][padded head_dim]
  float* row_max;  // [rows]
  float* row_sum;  // [rows]
};

// Linear layers over bf16 weights with bf16 activations, and attention over a bf16 cache with bf16
// queries and probabilities. Nothing is there if the instruction set does not multiply bf16.
struct Bf16Kernels {
  int row_tile;  // rows per register tile
  // Rows [0, m) of k fp32 activations -> one tile, [k / kGroup][m][kGroup], filled up with zeros.
  void (*round_rows)(const float* const* rows, int m, int64_t k, void* out);
  void (*tile[kMaxRowTile])(const LinearTile&);
  // A row tile's packed queries, [head_dim][m] fp32 -> [head_dim / 2][m][2] bf16, in place; the
  // last of an odd head_dim is paired with zero.
  void (*pair_queries)(float* q, int m, int head_dim);
  void (*attention_tile)(const AttentionTile&);
};

// Linear layers over quantized weights.
struct QuantKernels {
  int row_tile[kNumQuantFormats];  // rows per register tile
  int widened_row_tile;
  int int8_zero;  // what is added to int8 weights where they are stored

  // Rows [0, m) of k fp32 activations -> one tile of int8 ones; `zero`: that of the weights.
  void (*quantize_rows)(const float* const* rows, int m, int64_t k, int zero, void* out);

  // n weights of one out_feature -> their quants; returns the scale, not finite if a weight is not.
  float (*quantize_int8)(const float* x, int64_t n, int8_t* q);
  // The same into blocks of kQ4_1; returns the largest magnitude, not finite if a weight is not.
  float (*quantize_q4_1)(const float* x, int64_t n, void* blocks);

  // With the activations of quantize_rows, and with fp32 ones as pack_rows gives.
  void (*tile[kNumQuantFormats][kMaxRowTile])(const LinearTile&);
  void (*widened_tile[kNumQuantFormats][kMaxRowTile])(const LinearTile&);
};

struct KernelTable {
  const char* name;
  int panel_width;  // out_features per panel
  int row_tile;     // rows per register tile, at most kMaxRowTile

  // out[k][m] = rows[m][k] * scale
  void (*pack_rows)(const float* const* rows, int m, int64_t k, float scale, float* out);

  // Rows [0, n) of weight (`stride` elements apart, `source` elements) -> one panel of `stored`
  // elements; columns past n are zero, and so are bf16 in_features that fill up a group.
  void (*pack_panel)(ElementType source, const void* weight, int64_t stride, int n, int64_t k,
                     ElementType stored, void* panel);
  void (*unpack_row)(ElementType stored, const void* panel, int column, int64_t k, float* out);
  void (*linear_tile[kNumElementTypes][kMaxRowTile])(const LinearTile&);

  void (*widen)(ElementType source, const void* x, int64_t n, float* y);
  void (*narrow)(ElementType target, const float* x, int64_t n, void* y);

  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* y);
  // bias: or null.
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t n,
                     float* y);
  void (*rotary_neox)(const float* x, const float* cos, const float* sin, int64_t half, float* y);
  void (*rotary_interleaved)(const float* x, const float* cos, const float* sin, int64_t half,
                             float* y);
  // f(x), times `up` unless that is null. y may be x.
  void (*activate[kNumActivations])(const float* x, const float* up, int64_t n, float* y);
  void (*add)(const float* a, const float* b, int64_t n, float* y);

  size_t (*attention_scratch)(int head_dim);
  void (*attention_tile[kNumCacheTypes])(const AttentionTile&);
  // Folds `other` (of later positions) into the state of `rows` rows; d is the padded head_dim.
  void (*attention_merge)(int rows, int d, float* out, float* row_max, float* row_sum,
                          const float* other, const float* other_max, const float* other_sum);
  // y = round(x / scale), |y| <= 127; returns the scale.
  float (*quantize_i8)(const float* x, int64_t n, int8_t* y);
  void (*scale)(const float* x, float factor, int64_t n, float* y);
  void (*clamp)(const float* x, float limit, int64_t n, float* y);
  void (*soft_cap)(const float* x, float cap, int64_t n, float* y);

  QuantKernels quant;
  Bf16Kernels bf16;
};

const KernelTable* portable_kernels();
const KernelTable* avx2_kernels();         // null where not compiled in
const KernelTable* avx2_vnni_kernels();    // null where not compiled in
const KernelTable* avx512_kernels();       // null where not compiled in
const KernelTable* avx512_vnni_kernels();  // null where not compiled in
const KernelTable* avx512_bf16_kernels();  // null where not compiled in
const KernelTable* amx_kernels();          // null where not compiled in

}  // namespace fastpage::ops::cpu
