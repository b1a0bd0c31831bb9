// Batch-invariant attention of few rows of a sequence: its new token's heads, or those of a few
// tokens. Decode for that mode: as fast as KV can be read, but in the order of sums in which
// prefill_kernel.cuh computes a piece, to the bit.
//
// A block takes up to 16 rows, the rows of the MMAs, and tiles of 64 (or 32) tokens one after the
// other. What order says nothing of is shared out to its four warps: of the scores, 16 tokens each,
// and of the sums, columns. Between the two, scores go through shared memory, and every warp makes
// weights of all of them. Two or three stages of keys and values, of which all but one are on their
// way: bf16, head_dim 128: 35 KB each, 113 KB a block, two blocks a multiprocessor, 140 KB of it in
// flight.
#include "cuda/attention_pieces.cuh"

namespace fastpage::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kRows = kFewRows;
constexpr int kMinStages = 2;
constexpr int kMaxStages = 3;

template <typename C, int kDim>
struct FewRowsShape {
  using Tile = TileShape<C, kDim>;
  static constexpr int kTokens = kSoftmaxTokens<C, kDim>;
  static_assert(kPieceTokens % kTokens == 0, "a tile is in one piece");
  static constexpr int kQueryStride = TileShape<Half, kDim>::kStride;
  static constexpr int kScoresAt = kRows * kQueryStride;
  static constexpr int kRulesAt = kScoresAt + kRows * kTokens * 4;
  static constexpr int kStagesAt = kRulesAt + kRows * static_cast<int>(sizeof(RowRule));
  static constexpr int kTileBytes = kTokens * Tile::kStride;  // of keys, and of values
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int bytes(int stages) { return kStagesAt + stages * kStageBytes; }
};

// Tiles of keys and values, from `next` on, to their stages: four threads a token.
template <typename C, int kDim>
struct TileFetcher {
  using Shape = FewRowsShape<C, kDim>;
  static constexpr int kThreadsEach = kThreadsOfToken;
  static constexpr int kAtOnce = kThreads / kThreadsEach;
  static constexpr int kParts = Shape::kTokens / kAtOnce;

  const AttentionArgs& args;
  const int32_t* table;
  int64_t head_offset;
  int32_t end;  // tokens
  int32_t next;
  char* memory;
  int32_t stages;
  int32_t stage = 0;            // of the next tile
  int32_t blocks[kParts] = {};  // of the next tile's tokens

  __device__ int32_t token(int part) const {
    return next * Shape::kTokens + part * kAtOnce + copied_token(static_cast<int32_t>(threadIdx.x));
  }
  __device__ void find_blocks() {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int32_t t = token(part);
      blocks[part] = t < end ? load_global(table + block_index(args, t / 16)) : 0;
    }
  }
  __device__ void fetch() {
    constexpr int kPerVector = 16 / static_cast<int>(sizeof(C));
    using Tile = TileShape<C, kDim>;
    const int vector = static_cast<int>(threadIdx.x) % kThreadsEach;
    const int head_vectors = args.cache.head_dim / kPerVector;
    if (next * Shape::kTokens < end) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int32_t t = token(part);
        // A block id out of range is never followed.
        const int32_t block = min(max(blocks[part], 0), args.cache.num_blocks - 1);
        const int32_t in_block = t - block_index(args, t / 16) * args.cache.block_size;
        const int64_t from = block * args.cache.block_stride + head_offset +
                             (t < end ? in_block : 0) * args.cache.token_stride +
                             vector * kPerVector;
        const C* const keys = static_cast<const C*>(args.cache.k) + from;
        const C* const values = static_cast<const C*>(args.cache.v) + from;
        const int row = part * kAtOnce + copied_token(static_cast<int>(threadIdx.x));
        char* const line = memory + stage * Shape::kStageBytes + row * Tile::kStride + vector * 16;
#pragma unroll
        for (int i = 0; i < Tile::kVectors; i += kThreadsEach) {
          if (Tile::kVectors % kThreadsEach != 0 && vector + i >= Tile::kVectors) continue;
          const bool there = t < end && vector + i < head_vectors;
          cp_async_16(line + i * 16, keys + i * kPerVector, there);
          cp_async_16(line + Shape::kTileBytes + i * 16, values + i * kPerVector, there);
        }
      }
      stage = stage + 1 == stages ? 0 : stage + 1;
      ++next;
      find_blocks();  // so that the next fetch need not wait for them
    }
    cp_async_commit();  // empty groups, too: waits count them
  }
  // For the oldest tile that is on its way.
  __device__ void wait() const {
    if (stages == 3) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
  }
};

// What a warp has of the rows: the state of all of them, and sums of its columns.
template <typename T, typename C, int kDim>
struct WarpColumns {
  using Shape = FewRowsShape<C, kDim>;
  static constexpr int kSteps = (kDim / 32 + kWarps - 1) / kWarps;  // of 32 columns, at most

  SoftmaxState state;  // sums of weights: this lane's part
  float sums[kSteps][4][4] = {};

  static __device__ int step(int s) { return static_cast<int>(threadIdx.x) / 32 + s * kWarps; }

  // Scores of 16 tokens, the warp's, from token `first` on.
  template <typename Rule>
  static __device__ __forceinline__ void score(const char* queries, const char* keys,
                                               const ScoreRule& rule, int32_t first, int32_t end,
                                               bool has_slopes, bool needs_mask, Rule row_rule,
                                               float4* to) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    float scores[2][4] = {};
    score_keys<T, C, kDim>(queries, keys, scores);
    finish_scores(scores, rule, first, end, has_slopes, needs_mask, row_rule);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      to[n * 32 + lane] = float4{scores[n][0], scores[n][1], scores[n][2], scores[n][3]};
    }
  }

  // Weights of a tile's scores, and its weighted values.
  __device__ __forceinline__ void add(const float4* scores, float factor, const char* values) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    float weights[Shape::kTokens / 8][4];
#pragma unroll
    for (int n = 0; n < Shape::kTokens / 8; ++n) {
      const float4 x = scores[n * 32 + lane];
      weights[n][0] = x.x;
      weights[n][1] = x.y;
      weights[n][2] = x.z;
      weights[n][3] = x.w;
    }
    float correction[2];
    update_softmax(weights, factor, &state, correction);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[s][n][i] *= correction[i / 2];
      }
    }
#pragma unroll
    for (int part = 0; part < Shape::kTokens / 16; ++part) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const pair = &weights[2 * part + i / 2][i % 2 * 2];
        a[i] = pack<T>(pair[0], pair[1]);
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        if (step(s) >= kDim / 32) continue;
        uint32_t b[4][2];
        load_values<T, C, kDim>(values + part * 16 * Shape::Tile::kStride, step(s), b);
#pragma unroll
        for (int n = 0; n < 4; ++n) mma_16x8x16<T>(sums[s][n], a, b[n][0], b[n][1]);
      }
    }
  }

  // fn(i, row): sums 2 i and 2 i + 1.
  template <typename Fn>
  static __device__ __forceinline__ void for_rows(const PieceRun& run, Fn fn) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = static_cast<int>(threadIdx.x % 32) / 4 + 8 * i;
      if (row < run.rows) fn(i, row);
    }
  }
  // fn(s, n, place): of the row's sums, two neighbours are at `place`.
  template <typename Fn>
  static __device__ __forceinline__ void for_places(const AttentionArgs& args, Fn fn) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int place = step(s) * 32 + n * 8 + static_cast<int>(threadIdx.x % 4) * 2;
        if (place < args.cache.head_dim) fn(s, n, place);
      }
    }
  }

  __device__ __forceinline__ void add_up_weights() {
#pragma unroll
    for (int i = 0; i < 2; ++i) state.sum[i] = sum_of_quad(state.sum[i]);
  }

  // Another piece's: weights of both are added up.
  __device__ __forceinline__ void fold(const WarpColumns& piece) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Fold fold(Stats{state.base[i], state.sum[i]},
                      Stats{piece.state.base[i], piece.state.sum[i]});
      state.base[i] = fold.stats.x;
      state.sum[i] = fold.stats.y;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int e = 2 * i; e < 2 * i + 2; ++e) {
            sums[s][n][e] = fold(sums[s][n][e], piece.sums[s][n][e]);
          }
        }
      }
    }
  }
  __device__ __forceinline__ void store(const AttentionArgs& args, const PieceRun& run,
                                        int64_t slot_row) const {
    for_rows(run, [&](int i, int row) {
      if (threadIdx.x < 32 && threadIdx.x % 4 == 0) {
        store_global(stats_of(args, slot_row + row), Stats{state.base[i], state.sum[i]});
      }
      float* const to = sums_of(args, slot_row + row);
      for_places(args, [&](int s, int n, int place) {
        store_global(reinterpret_cast<float2*>(to + place),
                     float2{sums[s][n][2 * i], sums[s][n][2 * i + 1]});
      });
    });
  }
  __device__ __forceinline__ void write(const AttentionArgs& args, const RowTile& tile,
                                        const PieceRun& run, float v_scale) const {
    for_rows(run, [&](int i, int row) {
      const float factor = final_factor(state.sum[i], v_scale);
      T* const out = static_cast<T*>(args.out) +
                     pair_offset(args, tile, args.out_stride, tile.first_pair + row);
      for_places(args, [&](int s, int n, int place) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          store_global(out + value_column<C>(place / 8, place % 8 / 2, e),
                       from_float<T>(sums[s][n][2 * i + e] * factor));
        }
      });
    });
  }
};

template <typename T, typename C, int kDim>
__global__ void __launch_bounds__(kThreads, 2) few_rows_kernel(AttentionArgs args, int stages) {
  using Shape = FewRowsShape<C, kDim>;
  RowTile tile;
  PieceRun run;
  if (!find_run<kRows>(args, args.layout.decode, args.layout.counts + 1, &tile, &run)) return;
  char* const queries = dynamic_shared();
  float4* const scores = reinterpret_cast<float4*>(queries + Shape::kScoresAt);
  RowRule* const rules = reinterpret_cast<RowRule*>(queries + Shape::kRulesAt);
  char* const memory = queries + Shape::kStagesAt;

  const KvRange range = within(visible_range(args, tile, kRows), run);
  const int32_t first_tile = range.begin / Shape::kTokens;
  const int32_t end_tile = (range.end + Shape::kTokens - 1) / Shape::kTokens;
  constexpr int32_t kPieceTiles = kPieceTokens / Shape::kTokens;
  leave_hidden_pieces<kThreads>(args, run, first_tile / kPieceTiles);

  TileFetcher<C, kDim> fetcher{args,
                               args.block_tables + tile.seq * args.block_table_stride,
                               tile.kv_head * args.cache.head_stride,
                               range.end,
                               first_tile,
                               memory,
                               stages};
  fetcher.find_blocks();
  for (int i = 0; i < stages - 1; ++i) fetcher.fetch();
  load_queries<T, C, kDim, kRows, kThreads>(args, tile, queries);
  fill_rules<kRows, kThreads>(args, tile, rules);
  __syncthreads();
  const int32_t lowest = rules[0].position, highest = rules[kRows - 1].position;

  const int32_t window = args.params.sliding_window;
  const float k_scale =
      kIsFloat8<C> ? kv_scale(args.cache.k_scale, tile.kv_head) * Widen<T>::kFactor : 1.0f;
  const float v_scale =
      kIsFloat8<C> ? kv_scale(args.cache.v_scale, tile.kv_head) * Widen<T>::kFactor : 1.0f;
  const ScoreRule rule{args.params.scale * k_scale, args.params.soft_cap, window};
  const bool has_slopes = args.params.alibi_slopes != nullptr;
  const float factor = has_slopes ? 1.0f : score_factor(rule);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int group = static_cast<int>(threadIdx.x % 32) / 4;

  WarpColumns<T, C, kDim> piece, folded;
  int stage = 0;
  for (int32_t t = first_tile; t < end_tile; ++t) {
    fetcher.wait();
    __syncthreads();  // the tile is there; nobody reads the one before, nor its scores, any more
    fetcher.fetch();
    const char* const keys = memory + stage * Shape::kStageBytes;
    stage = stage + 1 == stages ? 0 : stage + 1;
    const int32_t first = t * Shape::kTokens;
    if (warp * 16 < Shape::kTokens) {
      const bool needs_mask =
          first + Shape::kTokens - 1 > lowest || (window > 0 && highest - window >= first);
      WarpColumns<T, C, kDim>::score(
          queries, keys + warp * 16 * Shape::Tile::kStride, rule, first + warp * 16, range.end,
          has_slopes, needs_mask, [&](int i) { return rules[group + 8 * i]; },
          scores + warp * 2 * 32);
    }
    __syncthreads();  // all scores are there
    piece.add(scores, factor, keys + Shape::kTileBytes);
    if (t + 1 < end_tile && (t + 1) % kPieceTiles != 0) continue;

    piece.add_up_weights();
    if (run.is_first()) {
      folded.fold(piece);
    } else {
      piece.store(args, run, run.slot_row(t / kPieceTiles));
    }
    piece = WarpColumns<T, C, kDim>{};
  }
  cp_async_wait<0>();
  if (run.is_whole()) return folded.write(args, tile, run, v_scale);
  if (run.is_first()) folded.store(args, run, run.slot_row(0));
  fold_runs<T, C, kThreads>(args, tile, run, v_scale);
}

}  // namespace

void launch_few_rows(DType dtype, const AttentionArgs& args, int32_t num_items, Stream stream) {
  with_attention_types(dtype, args.cache, [&](auto t, auto c, auto dim) {
    using C = typename decltype(c)::type;
    constexpr int kDim = decltype(dim)::value;
    using Shape = FewRowsShape<C, kDim>;
    int stages = kMaxStages;
    while (stages > kMinStages && Shape::bytes(stages) > max_shared_bytes()) --stages;
    launch("paged_attention (few rows)", few_rows_kernel<typename decltype(t)::type, C, kDim>,
           dim3(static_cast<unsigned>(num_items), static_cast<unsigned>(args.cache.num_kv_heads)),
           kThreads, Shape::bytes(stages), stream, args, stages);
  });
}

}  // namespace fastpage::cuda
