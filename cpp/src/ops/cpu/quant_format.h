// Quantized weights: groups of kGroup consecutive in_features of one out_feature share a scale (or,
// kInt8, all of an out_feature do).
//
// A panel holds kPanel out_features. For each group, one after the other:
//   scales    [kPanel] fp16       (not kInt8)
//   minimums  [kPanel] fp16       (kQ4_1 only)
//   words     [8][kPanel] uint32  word i: in_features 4i .. 4i+3 of the group, low byte first, as
//                                 int8 plus the instruction set's zero (128 where its dot product
//                                 takes unsigned weights), or
//             [4][kPanel] uint32  the same for 4 bits: byte j holds in_feature 4i+j in its low half
//                                 and 16+4i+j in its high half, as in the blocks of GGUF
// and for kInt8, after the last group, scales [kPanel] fp32. In_features are filled up to whole
// groups by weights that stand for 0 or meet activations of 0.
//
// Per in_feature and out_feature that is 1 byte (kInt8), 1.0625 (kQ8_0), 0.5625 (kQ4_0), 0.625
// (kQ4_1).
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace fastpage::ops::cpu {

inline constexpr int kGroup = 32;

// weight = scale * q (kInt8, kQ8_0), scale * (q - 8) (kQ4_0), scale * q + minimum (kQ4_1)
enum QuantFormat : int { kInt8 = 0, kQ8_0 = 1, kQ4_0 = 2, kQ4_1 = 3, kNumQuantFormats = 4 };

constexpr bool has_4_bits(QuantFormat f) { return f == kQ4_0 || f == kQ4_1; }
constexpr bool has_group_scales(QuantFormat f) { return f != kInt8; }
constexpr bool has_minimums(QuantFormat f) { return f == kQ4_1; }
constexpr int words_per_group(QuantFormat f) { return has_4_bits(f) ? 4 : 8; }

// Bytes of one group of a panel before its words, and in all.
constexpr int64_t group_header_bytes(QuantFormat f, int panel_width) {
  return (has_group_scales(f) ? 2 : 0) * panel_width + (has_minimums(f) ? 2 : 0) * panel_width;
}
constexpr int64_t group_bytes(QuantFormat f, int panel_width) {
  return group_header_bytes(f, panel_width) + 4 * words_per_group(f) * panel_width;
}

// One group of one out_feature as it comes from a file (ggml's block_q8_0, block_q4_0, block_q4_1):
// fp16 scale, fp16 minimum if there is one, quants. kInt8: the quants alone.
constexpr int64_t block_header_bytes(QuantFormat f) {
  return (has_group_scales(f) ? 2 : 0) + (has_minimums(f) ? 2 : 0);
}
constexpr int64_t block_bytes(QuantFormat f) {
  return block_header_bytes(f) + 4 * words_per_group(f);
}

// Activations of m rows, quantized to int8 in the same groups, for one row tile; per group:
//   words [m][8] int32, scales [m] fp32, scaled sums of the quants [m] fp32, and [m] int32: where
//   the integer sums begin, minus the sum of the quants times the weights' zero.
constexpr int64_t kActivationGroupBytes = 4 * (8 + 3);  // per row

}  // namespace fastpage::ops::cpu
