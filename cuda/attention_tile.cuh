// What decode and prefill attention share: tiles of keys and values in shared memory, their
// fragments for mma.m16n8k16, and the online softmax over a tile of scores (Milakov & Gimelshein
// 2018; Dao 2023).
//
// Rows of a tile lie an odd number of 16-byte vectors apart, so that the eight rows an ldmatrix
// reads at once are in different banks. A lane's place in a fragment: group = lane / 4, pair = lane
// % 4; scores of rows group and group + 8, columns 8 n + 2 pair and the one behind.
//
// float8 is widened between ldmatrix and mma. One 32-bit register holds four neighbours along
// head_dim then, which become two registers of two: those of even and those of odd bytes. For keys,
// whose head_dim is summed over, queries are stored in the same order (query_position). For values
// it is the result whose columns are in another order (value_column).
#pragma once

#include <cmath>

#include "cuda/attention.h"
#include "cuda/launch.cuh"

namespace fastpage::cuda {

struct AttentionArgs {
  const void* q;
  void* out;
  int64_t q_stride, out_stride;  // elements
  KvCache cache;
  const int32_t* block_tables;
  int64_t block_table_stride;
  int32_t tiles_per_block;  // of 16 tokens
  uint32_t inverse;         // 2^32 / tiles_per_block, rounded up
  int32_t num_heads;
  int32_t group;  // heads that share a KV head
  AttentionParams params;
  const int32_t* plan;
  AttentionPlan::Layout layout;
  float* partial_sums;   // [partial][num_heads][head_dim]; batch-invariant: [slot row][head_dim]
  float* partial_stats;  // [...][2]: greatest score, sum of weights
  uint32_t* counters;    // [max_num_seqs][KV heads and groups of 16 heads], or [tile][KV head]
};

// Which of a sequence's blocks the tile-th 16 tokens are in: tile / tiles_per_block, exact as long
// as the product of the two is below 2^32.
__device__ __forceinline__ int32_t block_index(const AttentionArgs& args, int32_t tile) {
  return args.tiles_per_block == 1
             ? tile
             : static_cast<int32_t>(__umulhi(static_cast<uint32_t>(tile), args.inverse));
}

constexpr float kLog2E = 1.44269504088896340736f;

// kDim: head_dim, rounded up to what is instantiated; what is missing is zeros.
template <typename C, int kDim>
struct TileShape {
  static constexpr int kVectors = kDim * static_cast<int>(sizeof(C)) / 16;  // of a row
  static constexpr int kStride = (kVectors | 1) * 16;                       // bytes
};

// 16-bit floats that stand for four float8 in a register: those of even bytes, or of odd ones.
// Times kFactor they are the values.
template <typename T>
struct Widen;
template <>
struct Widen<Half> {
  static constexpr float kFactor = 256.0f;  // the exponents' biases are 8 apart
  __device__ static uint32_t even(uint32_t x) {
    return (x & 0x00800080u) << 8 | (x & 0x007f007fu) << 7;
  }
};
template <>
struct Widen<BFloat16> {
  static constexpr float kFactor = 1.0f;
  __device__ static uint32_t even(uint32_t x) {
    // 120 apart: too far for sums of products, so that it is put right at once.
    return multiply_bfloat16x2((x & 0x00800080u) << 8 | (x & 0x007f007fu) << 4, 0x7b807b80u);
  }
};

template <typename C>
constexpr bool kIsFloat8 = sizeof(C) == 1;

// Where element i of a query's row is stored (in a row for the keys of C).
template <typename C>
__device__ __forceinline__ int query_position(int i) {
  if (!kIsFloat8<C>) return i;
  const int lane = i % 16 / 4, byte = i % 4;  // of the register that the keys' four come in
  return i / 16 * 16 + byte % 2 * 8 + lane * 2 + byte / 2;
}

// Which column of the result fragment n, place i (of rows group or group + 8) is.
template <typename C>
__device__ __forceinline__ int value_column(int n, int pair, int i) {
  if (!kIsFloat8<C>) return n * 8 + pair * 2 + i;
  return n / 2 * 16 + (pair * 2 + i) * 2 + n % 2;
}

// Steps of 16 of head_dim that one ldmatrix brings for 16 tokens.
template <typename C>
constexpr int kKeySteps = kIsFloat8<C> ? 2 : 1;

// Fragments of keys for 16 tokens from `tile` on, of head_dim from 16 * kKeySteps * step on:
// b[k step][tokens 0-7, 8-15][register].
template <typename T, typename C, int kDim>
__device__ __forceinline__ void load_keys(const char* tile, int step,
                                          uint32_t (&b)[kKeySteps<C>][2][2]) {
  constexpr int kStride = TileShape<C, kDim>::kStride;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int token = lane % 8 + lane / 16 * 8, half = lane / 8 % 2;
  uint32_t x[4];
  ldmatrix(x, tile + token * kStride + step * 32 + half * 16);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kIsFloat8<C>) {
      b[i % 2][i / 2][0] = Widen<T>::even(x[i]);
      b[i % 2][i / 2][1] = Widen<T>::even(x[i] >> 8);
    } else {
      b[0][i / 2][i % 2] = x[i];
    }
  }
}

// scores += queries times keys: 16 rows, 16 tokens.
template <typename T, typename C, int kDim>
__device__ __forceinline__ void score_keys(const char* queries, const char* keys,
                                           float (&scores)[2][4]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const char* const line = queries + lane % 16 * TileShape<Half, kDim>::kStride + lane / 16 * 16;
#pragma unroll
  for (int step = 0; step < kDim / 16 / kKeySteps<C>; ++step) {
    uint32_t b[kKeySteps<C>][2][2];
    load_keys<T, C, kDim>(keys, step, b);
#pragma unroll
    for (int k = 0; k < kKeySteps<C>; ++k) {
      uint32_t a[4];
      ldmatrix(a, line + (step * kKeySteps<C> + k) * 32);
#pragma unroll
      for (int n = 0; n < 2; ++n) mma_16x8x16<T>(scores[n], a, b[k][n][0], b[k][n][1]);
    }
  }
}

// Fragments of values for 16 tokens and 32 of head_dim from 32 * step on: b[fragment][register].
template <typename T, typename C, int kDim>
__device__ __forceinline__ void load_values(const char* tile, int step, uint32_t (&b)[4][2]) {
  constexpr int kStride = TileShape<C, kDim>::kStride;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int token = lane % 16, half = lane / 16;
  uint32_t x[4];
  // 32 of head_dim: two ldmatrix of 16-bit values, or one of float8.
  if constexpr (kIsFloat8<C>) {
    ldmatrix_transposed(x, tile + token * kStride + step * 32 + half * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      b[i / 2 * 2][i % 2] = Widen<T>::even(x[i]);
      b[i / 2 * 2 + 1][i % 2] = Widen<T>::even(x[i] >> 8);
    }
  } else {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      ldmatrix_transposed(x, tile + token * kStride + step * 64 + k * 32 + half * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) b[k * 2 + i / 2][i % 2] = x[i];
    }
  }
}

// Tokens whose scores go through the softmax at once, where the order of sums is prefill's. float8
// is widened in registers: at 128 there are none left for the scores of 64 tokens.
template <typename C, int kDim>
constexpr int kSoftmaxTokens = kDim <= (kIsFloat8<C> ? 96 : 128) ? 64 : 32;

// What scores go through before the softmax.
struct ScoreRule {
  float scale;  // with that of the keys
  float soft_cap;
  int32_t window;
};
struct RowRule {
  int32_t position;
  float slope;
};

// What brings scores into units of log 2, if nothing is added to them.
__device__ __forceinline__ float score_factor(const ScoreRule& rule) {
  return (rule.soft_cap > 0.0f ? rule.soft_cap : rule.scale) * kLog2E;
}

// scores[n][0..1] of row 0, [2..3] of row 1, tokens from `first` on: capped, biased, and hidden
// ones -inf. Returns the positive factor that brings them into units of log 2. `end`: behind the
// last token there is. row(i): position and slope of row i; asked for only if they are needed.
template <int kFragments, typename Row>
__device__ __forceinline__ float finish_scores(float (&scores)[kFragments][4],
                                               const ScoreRule& rule, int32_t first, int32_t end,
                                               bool has_slopes, bool needs_mask, Row row) {
  const int pair = fresh_thread() % 4;
  const float factor = score_factor(rule);
  if (rule.soft_cap > 0.0f) {
    const float inverse = rule.scale / rule.soft_cap;
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = tanhf(scores[n][i] * inverse);
    }
  }
  if (!has_slopes && !needs_mask) return factor;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const RowRule r = row(i);
    const int32_t begin = rule.window > 0 ? r.position - rule.window : -1;  // last one too early
    const int32_t visible = min(r.position, end - 1);
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int e = 2 * i; e < 2 * i + 2; ++e) {
        const int32_t token = first + n * 8 + pair * 2 + e % 2;
        if (has_slopes) {
          const float bias = r.slope * kLog2E * static_cast<float>(token - r.position);
          scores[n][e] = fmaf(scores[n][e], factor, bias);
        }
        if (token > visible || token <= begin) scores[n][e] = -INFINITY;
      }
    }
  }
  return has_slopes ? 1.0f : factor;
}

// Of two rows: what weights are relative to (a power of two; -inf: nothing was seen yet), and this
// lane's part of the sum of weights.
struct alignas(16) SoftmaxState {
  float base[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};
};

// A base stays as long as no score is further above it: weights are at most 2^8, and most tiles
// need no correction.
constexpr float kMostAboveBase = 8.0f;

// Turns scores (times `factor`: in units of log 2) into weights relative to the base; what came
// before is to be multiplied by `correction`.
template <int kFragments>
__device__ __forceinline__ void update_softmax(float (&scores)[kFragments][4], float factor,
                                               SoftmaxState* state, float (&correction)[2]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float greatest = -INFINITY;
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
      greatest = fmaxf(greatest, fmaxf(scores[n][2 * row], scores[n][2 * row + 1]));
    }
    greatest = fmaxf(greatest, __shfl_xor_sync(kFullWarp, greatest, 1));
    greatest = fmaxf(greatest, __shfl_xor_sync(kFullWarp, greatest, 2)) * factor;
    correction[row] = 1.0f;
    if (greatest > state->base[row] + kMostAboveBase) {
      correction[row] = exp2_fast(state->base[row] - greatest);
      state->base[row] = greatest;
    }
    // Nothing seen yet: the difference of two infinities is no number.
    const float base = state->base[row] == -INFINITY ? 0.0f : state->base[row];
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int i = 2 * row; i < 2 * row + 2; ++i) {
        scores[n][i] = exp2_fast(fmaf(scores[n][i], factor, -base));
        sum += scores[n][i];
      }
    }
    state->sum[row] = fmaf(state->sum[row], correction[row], sum);
  }
}

__device__ __forceinline__ float sum_of_quad(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}

// Four threads copy a token's keys or values, where a block shares a tile. Eight lanes write to
// shared memory at once, those of two tokens: tokens 4 apart, whose rows are 4 vectors apart modulo
// the 8 that all banks hold. Those of neighbours would be in the same banks, but for one vector.
constexpr int kThreadsOfToken = 4;
__device__ __forceinline__ int copied_token(int thread) {
  return (thread & ~31) >> 2 | (thread & 4) | (thread >> 3 & 3);
}

// Copies of 16 tokens' worth of one row of the cache: lane's vectors of K or V to shared memory.
// from: the first token's head; tokens from `valid` on become zeros, as does what is behind
// head_dim.
template <typename C, int kDim, int kThreads, int kTokens>
__device__ __forceinline__ void fetch_rows(char* to, const C* from, int64_t token_stride, int valid,
                                           int head_vectors, int thread) {
  using Shape = TileShape<C, kDim>;
  constexpr int kPerVector = 16 / static_cast<int>(sizeof(C));
#pragma unroll
  for (int i = thread; i < kTokens * Shape::kVectors; i += kThreads) {
    const int token = i / Shape::kVectors, vector = i % Shape::kVectors;
    const bool there = token < valid && vector < head_vectors;
    cp_async_16(to + token * Shape::kStride + vector * 16,
                there ? from + token * token_stride + vector * kPerVector : from, there);
  }
}

__device__ __forceinline__ float kv_scale(const float* scales, int head) {
  return scales != nullptr ? load_global(scales + head) : 1.0f;
}

// fn(Type<T>, Type<C>, Constant<kDim>) of the kernel for these types.
template <typename Fn>
void with_attention_types(DType dtype, const KvCache& cache, Fn fn) {
  with_half_type(dtype, "q", [&](auto type) {
    const auto with_cache = [&](auto cached) {
      if (cache.head_dim <= 64) return fn(type, cached, Constant<64>{});
      if (cache.head_dim <= 96) return fn(type, cached, Constant<96>{});
      if (cache.head_dim <= 128) return fn(type, cached, Constant<128>{});
      fn(type, cached, Constant<256>{});
    };
    if (cache.dtype == DType::kUInt8) {
      with_cache(Type<Float8>{});
    } else {
      with_cache(type);
    }
  });
}

// In decode_attention.cu, prefill_attention.cu, few_rows_attention.cu, many_rows_attention.cu and
// float32_attention.cu.
void launch_decode(DType dtype, const AttentionArgs& args, int32_t num_items, Stream stream);
void launch_prefill(DType dtype, const AttentionArgs& args, int32_t num_items, Stream stream);
// Batch-invariant: few rows of a sequence, and many.
void launch_few_rows(DType dtype, const AttentionArgs& args, int32_t num_items, Stream stream);
void launch_many_rows(DType dtype, const AttentionArgs& args, int32_t num_items, Stream stream);
void launch_float32(const AttentionArgs& args, int64_t num_rows, Stream stream);

}  // namespace fastpage::cuda
