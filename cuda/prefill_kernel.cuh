// Attention of several new tokens a sequence (FlashAttention-2; Dao 2023), straight from the paged
// cache. A block takes a tile of rows: (token, head) pairs, all heads that share a KV head
// together, so that keys and values are read once for them. Its warps each keep 16 or 32 of the
// rows. Keys and values come 64 (or 32) tokens at a time: values while scores are computed, the
// next keys while weights are.
//
// Batch-invariant, a block does this for a run of pieces (attention_pieces.cuh): at the end of
// each, what the warps have goes to the workspace.
#pragma once

#include "cuda/attention_pieces.cuh"

namespace fastpage::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kPrefillThreads = kWarps * 32;

template <typename C, int kDim>
struct PrefillShape {
  using Tile = TileShape<C, kDim>;
  static constexpr int kFragments = kDim <= 128 ? 2 : 1;  // of 16 rows, each warp's
  static constexpr int kRows = kWarps * 16 * kFragments;
  static constexpr int kTokens = kSoftmaxTokens<C, kDim>;
  static_assert(kPieceTokens % kTokens == 0, "a tile is in one piece");
  static constexpr int kQueryStride = TileShape<Half, kDim>::kStride;
  static constexpr int kQueryBytes = kRows * kQueryStride;
  static constexpr int kTileBytes = kTokens * Tile::kStride;
  static constexpr int kRulesAt = kQueryBytes + 2 * kTileBytes;
  static constexpr int kStatesAt = kRulesAt + kRows * static_cast<int>(sizeof(RowRule));
  static constexpr int kStateBytes =
      kFragments * kPrefillThreads * static_cast<int>(sizeof(SoftmaxState));
  static constexpr int kRunAt = kStatesAt + kStateBytes;
  static constexpr int kBytes = kRunAt + static_cast<int>(sizeof(PieceRun));
};

__device__ __forceinline__ bool find_tile(const AttentionArgs& args, int rows, RowTile* tile) {
  const int32_t index = static_cast<int32_t>(blockIdx.x);
  if (index >= load_global(args.plan + args.layout.counts + 2)) return false;
  const int32_t* const item = args.plan + args.layout.prefill + index * 2;
  *tile = row_tile(args, load_global(item), load_global(item + 1), rows);
  return true;
}

// Keys or values of the tile of tokens from `first` on, four threads a token.
template <typename C, int kDim>
__device__ __forceinline__ void fetch_tile(const AttentionArgs& args, const RowTile& work,
                                           const void* cache, int32_t first, int32_t end,
                                           char* to) {
  using Tile = TileShape<C, kDim>;
  constexpr int kPerVector = 16 / static_cast<int>(sizeof(C));
  constexpr int kThreads = kThreadsOfToken;
  constexpr int kAtOnce = kPrefillThreads / kThreads;
  const int32_t* const table = args.block_tables + work.seq * args.block_table_stride;
  const int thread = fresh_thread();
  const int vector = thread & (kThreads - 1);
  const int head_vectors = args.cache.head_dim / kPerVector;
#pragma unroll
  for (int part = 0; part < PrefillShape<C, kDim>::kTokens; part += kAtOnce) {
    const int row = part + copied_token(thread);
    const int32_t token = first + row;
    const int32_t index = block_index(args, token / 16);
    int32_t block = token < end ? load_global(table + index) : 0;
    block = min(max(block, 0), args.cache.num_blocks - 1);  // never followed out of the cache
    const C* const from = static_cast<const C*>(cache) + block * args.cache.block_stride +
                          (token - index * args.cache.block_size) * args.cache.token_stride +
                          work.kv_head * args.cache.head_stride + vector * kPerVector;
    char* const line = to + row * Tile::kStride + vector * 16;
#pragma unroll
    for (int i = 0; i < Tile::kVectors; i += kThreads) {
      if (Tile::kVectors % kThreads != 0 && vector + i >= Tile::kVectors) continue;
      const bool there = token < end && vector + i < head_vectors;
      cp_async_16(line + i * 16, from + i * kPerVector, there);
    }
  }
}

// What one warp has of the tile's rows.
template <typename T, typename C, int kDim>
struct WarpRows {
  using Shape = PrefillShape<C, kDim>;
  static constexpr int kFragments = Shape::kFragments;
  static constexpr int kColumns = Shape::kTokens / 8;  // fragments of scores
  using Scores = float[kFragments][kColumns][4];

  float sums[kFragments][kDim / 8][4] = {};
  SoftmaxState* states;  // [kFragments][kPrefillThreads]; in shared memory: registers are short

  // scores = queries times keys.
  static __device__ __forceinline__ void score(const char* queries, const char* keys,
                                               Scores& scores) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const char* const line = queries + lane % 16 * Shape::kQueryStride + lane / 16 * 16;
    constexpr int kSteps = kKeySteps<C>;
#pragma unroll
    for (int step = 0; step < kDim / 16 / kSteps; ++step) {
      uint32_t a[kFragments][kSteps][4];
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          ldmatrix(a[f][k], line + f * 16 * Shape::kQueryStride + (step * kSteps + k) * 32);
        }
      }
#pragma unroll
      for (int n = 0; n < kColumns / 2; ++n) {
        uint32_t b[kSteps][2][2];
        load_keys<T, C, kDim>(keys + n * 16 * Shape::Tile::kStride, step, b);
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
#pragma unroll
          for (int f = 0; f < kFragments; ++f) {
            mma_16x8x16<T>(scores[f][2 * n], a[f][k], b[k][0][0], b[k][0][1]);
            mma_16x8x16<T>(scores[f][2 * n + 1], a[f][k], b[k][1][0], b[k][1][1]);
          }
        }
      }
    }
  }

  // Turns scores into weights, and corrects the sums so far.
  template <typename Rule>
  __device__ __forceinline__ void weigh(Scores& scores, const ScoreRule& rule, int32_t first,
                                        int32_t end, bool has_slopes, bool needs_mask,
                                        Rule rule_of) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const float factor = finish_scores(scores[f], rule, first, end, has_slopes, needs_mask,
                                         [&](int i) { return rule_of(f * 16 + i * 8); });
      float correction[2];
      SoftmaxState* const kept = states + f * kPrefillThreads + fresh_thread();
      SoftmaxState state = *kept;
      update_softmax(scores[f], factor, &state, correction);
      *kept = state;
      if (!__any_sync(kFullWarp, correction[0] != 1.0f || correction[1] != 1.0f)) continue;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[f][n][i] *= correction[i / 2];
      }
    }
  }

  // sums += weights times values.
  __device__ __forceinline__ void add(const Scores& weights, const char* values) {
#pragma unroll
    for (int part = 0; part < kColumns / 2; ++part) {
      uint32_t a[kFragments][4];
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* const pair = &weights[f][2 * part + i / 2][i % 2 * 2];
          a[f][i] = pack<T>(pair[0], pair[1]);
        }
      }
#pragma unroll
      for (int step = 0; step < kDim / 32; ++step) {
        uint32_t b[4][2];
        load_values<T, C, kDim>(values + part * 16 * Shape::Tile::kStride, step, b);
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            mma_16x8x16<T>(sums[f][step * 4 + n], a[f], b[n][0], b[n][1]);
          }
        }
      }
    }
  }

  // fn(f, i, row): fragments f, sums 2 i and 2 i + 1, of this lane's rows that are in the tile.
  template <typename Fn>
  static __device__ __forceinline__ void for_rows(const PieceRun& run, int first_row, Fn fn) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row + f * 16 + fresh_thread() % 32 / 4 + 8 * i;
        if (row < run.rows) fn(f, i, row);
      }
    }
  }
  __device__ __forceinline__ SoftmaxState* state(int f) {
    return states + f * kPrefillThreads + fresh_thread();
  }
  // Of each row, in all of its lanes at once.
  __device__ __forceinline__ void add_up_weights() {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int i = 0; i < 2; ++i) state(f)->sum[i] = sum_of_quad(state(f)->sum[i]);
    }
  }
  // Back to a lane's part.
  __device__ __forceinline__ void split_weights() {
    if (fresh_thread() % 4 == 0) return;
#pragma unroll
    for (int f = 0; f < kFragments; ++f) state(f)->sum[0] = state(f)->sum[1] = 0.0f;
  }

  // Folds what is here into what is in a slot. Weights are added up.
  __device__ __forceinline__ void fold_into(const AttentionArgs& args, const PieceRun& run,
                                            int64_t slot_row, int first_row) {
    for_rows(run, first_row, [&](int f, int i, int row) {
      SoftmaxState* const mine = state(f);
      const Fold fold(load_global(stats_of(args, slot_row + row)),
                      Stats{mine->base[i], mine->sum[i]});
      mine->base[i] = fold.stats.x;
      mine->sum[i] = fold.stats.y;
      const float* const from = sums_of(args, slot_row + row) + fresh_thread() % 4 * 2;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        if (n * 8 >= args.cache.head_dim) continue;
        const float2 before = load_global(reinterpret_cast<const float2*>(from + n * 8));
        sums[f][n][2 * i] = fold(before.x, sums[f][n][2 * i]);
        sums[f][n][2 * i + 1] = fold(before.y, sums[f][n][2 * i + 1]);
      }
    });
  }
  __device__ __forceinline__ void store(const AttentionArgs& args, const PieceRun& run,
                                        int64_t slot_row, int first_row) {
    __syncwarp();  // all lanes of a row have read what was there
    for_rows(run, first_row, [&](int f, int i, int row) {
      const int pair = fresh_thread() % 4;
      if (pair == 0) {
        store_global(stats_of(args, slot_row + row), Stats{state(f)->base[i], state(f)->sum[i]});
      }
      float* const to = sums_of(args, slot_row + row) + pair * 2;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        if (n * 8 >= args.cache.head_dim) continue;
        store_global(reinterpret_cast<float2*>(to + n * 8),
                     float2{sums[f][n][2 * i], sums[f][n][2 * i + 1]});
      }
    });
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      *state(f) = SoftmaxState{};
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[f][n][i] = 0.0f;
      }
    }
  }

  // The results, as rows of T.
  __device__ __forceinline__ void write(char* to, float v_scale) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float weights = sum_of_quad(states[f * kPrefillThreads + threadIdx.x].sum[i]);
        const float factor = final_factor(weights, v_scale);
        T* const row = reinterpret_cast<T*>(to + (f * 16 + lane / 4 + 8 * i) * Shape::kQueryStride);
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            row[value_column<C>(n, lane % 4, e)] = from_float<T>(sums[f][n][2 * i + e] * factor);
          }
        }
      }
    }
  }
};

template <typename T, typename C, int kDim, bool kBatchInvariant>
__global__ void __launch_bounds__(kPrefillThreads, 2) prefill_kernel(AttentionArgs args) {
  using Shape = PrefillShape<C, kDim>;
  char* const queries = dynamic_shared();
  // Not in registers, which are short.
  PieceRun& run = *reinterpret_cast<PieceRun*>(queries + Shape::kRunAt);
  RowTile work;
  KvRange range;
  if constexpr (kBatchInvariant) {
    PieceRun found;
    if (!find_run<Shape::kRows>(args, args.layout.prefill, args.layout.counts + 2, &work, &found)) {
      return;
    }
    if (threadIdx.x == 0) run = found;
    range = within(visible_range(args, work, Shape::kRows), found);
  } else {
    if (!find_tile(args, Shape::kRows, &work)) return;
    range = visible_range(args, work, Shape::kRows);
  }
  char* const keys = queries + Shape::kQueryBytes;
  char* const values = keys + Shape::kTileBytes;
  RowRule* const rules = reinterpret_cast<RowRule*>(queries + Shape::kRulesAt);
  const int first_row = static_cast<int>(threadIdx.x) / 32 * Shape::kRows / kWarps;  // the warp's

  const int32_t window = args.params.sliding_window;
  const int32_t end = range.end;
  const int32_t first_tile = range.begin / Shape::kTokens;
  const int32_t end_tile = (end + Shape::kTokens - 1) / Shape::kTokens;

  fetch_tile<C, kDim>(args, work, args.cache.k, first_tile * Shape::kTokens, end, keys);
  cp_async_commit();
  load_queries<T, C, kDim, Shape::kRows, kPrefillThreads>(args, work, queries);
  fill_rules<Shape::kRows, kPrefillThreads>(args, work, rules);
  __syncthreads();
  // Of the warp's rows; where there are none, nothing is computed.
  const bool has_rows = work.first_pair + first_row < work.num_pairs;
  const int32_t lowest = rules[first_row].position;
  const int32_t highest = has_rows ? rules[first_row + Shape::kRows / kWarps - 1].position : -1;

  const float k_scale =
      kIsFloat8<C> ? kv_scale(args.cache.k_scale, work.kv_head) * Widen<T>::kFactor : 1.0f;
  const ScoreRule rule{args.params.scale * k_scale, args.params.soft_cap, window};
  const bool has_slopes = args.params.alibi_slopes != nullptr;

  WarpRows<T, C, kDim> rows;
  rows.states = reinterpret_cast<SoftmaxState*>(queries + Shape::kStatesAt);
#pragma unroll
  for (int f = 0; f < Shape::kFragments; ++f) {
    rows.states[f * kPrefillThreads + threadIdx.x] = SoftmaxState{};
  }
  constexpr int32_t kPieceTiles = kPieceTokens / Shape::kTokens;
  if constexpr (kBatchInvariant) {
    leave_hidden_pieces<kPrefillThreads>(args, run, first_tile / kPieceTiles);
  }
  for (int32_t tile = first_tile; tile < end_tile; ++tile) {
    const int32_t first = tile * Shape::kTokens;
    if constexpr (kBatchInvariant) {
      if (tile > first_tile && tile % kPieceTiles == 0) {
        const int32_t piece = tile / kPieceTiles - 1;
        rows.add_up_weights();
        if (run.is_first() && piece > first_tile / kPieceTiles) {
          rows.fold_into(args, run, run.slot_row(0), first_row);
        }
        rows.store(args, run, run.slot_row(piece), first_row);
        rows.clear();
      }
    }
    cp_async_wait<0>();
    __syncthreads();  // keys are there; nobody reads the values any more
    fetch_tile<C, kDim>(args, work, args.cache.v, first, end, values);
    cp_async_commit();

    // A tile that none of a warp's rows may see would change nothing.
    const bool is_seen =
        first <= highest && (window == 0 || lowest - window < first + Shape::kTokens - 1);
    float scores[Shape::kFragments][Shape::kTokens / 8][4] = {};
    if (is_seen) rows.score(queries + first_row * Shape::kQueryStride, keys, scores);
    cp_async_wait<0>();
    __syncthreads();  // values are there; nobody reads the keys any more
    if (tile + 1 < end_tile) {
      fetch_tile<C, kDim>(args, work, args.cache.k, first + Shape::kTokens, end, keys);
    }
    cp_async_commit();
    if (!is_seen) continue;

    const bool needs_mask =
        first + Shape::kTokens - 1 > lowest || (window > 0 && highest - window >= first);
    rows.weigh(scores, rule, first, end, has_slopes, needs_mask,
               [&](int row) { return rules[first_row + fresh_thread() % 32 / 4 + row]; });
    rows.add(scores, values);
  }
  cp_async_wait<0>();
  __syncthreads();

  const float v_scale =
      kIsFloat8<C> ? kv_scale(args.cache.v_scale, work.kv_head) * Widen<T>::kFactor : 1.0f;
  if constexpr (kBatchInvariant) {
    rows.add_up_weights();
    if (run.is_first() && run.end - 1 > first_tile / kPieceTiles) {
      rows.fold_into(args, run, run.slot_row(0), first_row);
    }
    if (!run.is_whole()) {
      if (run.is_first() || first_tile < end_tile) {
        rows.store(args, run, run.slot_row(run.end - 1), first_row);
      }
      return fold_runs<T, C, kPrefillThreads>(args, work, run, v_scale);
    }
    rows.split_weights();
  }

  // Rows go out through where the queries were, each warp's own, in whole vectors.
  rows.write(queries + first_row * Shape::kQueryStride, v_scale);
  __syncthreads();
  T* const out = static_cast<T*>(args.out);
  for (int i = threadIdx.x; i < Shape::kRows * kDim / 8; i += kPrefillThreads) {
    const int row = i / (kDim / 8), at = i % (kDim / 8) * 8;
    const int32_t pair = work.first_pair + row;
    if (pair >= work.num_pairs || at >= args.cache.head_dim) continue;
    Vector<T> x;
    x.words = *reinterpret_cast<const uint4*>(queries + row * Shape::kQueryStride + at * 2);
    store_vector(out + pair_offset(args, work, args.out_stride, pair) + at, x);
  }
}

template <bool kBatchInvariant>
void launch_tiles(DType dtype, const AttentionArgs& args, int32_t num_items, Stream stream) {
  with_attention_types(dtype, args.cache, [&](auto t, auto c, auto dim) {
    using C = typename decltype(c)::type;
    constexpr int kDim = decltype(dim)::value;
    launch("paged_attention (prefill)",
           prefill_kernel<typename decltype(t)::type, C, kDim, kBatchInvariant>,
           dim3(static_cast<unsigned>(num_items), static_cast<unsigned>(args.cache.num_kv_heads)),
           kPrefillThreads, PrefillShape<C, kDim>::kBytes, stream, args);
  });
}

}  // namespace

}  // namespace fastpage::cuda
