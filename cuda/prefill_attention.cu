// Attention of several new tokens a sequence (FlashAttention-2; Dao 2023), straight from the paged
// cache. A block takes a tile of rows: (token, head) pairs, all heads that share a KV head
// together, so that keys and values are read once for them. Its warps each keep 16 or 32 of the
// rows. Keys and values come 64 (or 32) tokens at a time: values while scores are computed, the
// next keys while weights are.
#include "cuda/attention_tile.cuh"

namespace fastpage::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kPrefillThreads = kWarps * 32;

template <typename C, int kDim>
struct PrefillShape {
  using Tile = TileShape<C, kDim>;
  static constexpr int kFragments = kDim <= 128 ? 2 : 1;  // of 16 rows, each warp's
  static constexpr int kRows = kWarps * 16 * kFragments;
  static constexpr int kTokens = kDim <= 128 ? 64 : 32;
  static constexpr int kQueryStride = TileShape<Half, kDim>::kStride;
  static constexpr int kQueryBytes = kRows * kQueryStride;
  static constexpr int kTileBytes = kTokens * Tile::kStride;
  static constexpr int kBytes = kQueryBytes + 2 * kTileBytes;
};

struct Work {
  int64_t first_row;  // of q: the sequence's first new token
  int32_t seq;
  int32_t tokens;      // new ones
  int32_t context;     // tokens before these
  int32_t first_pair;  // of the tile
  int32_t num_pairs;   // of the sequence
  int32_t kv_head;
};

__device__ __forceinline__ bool find_work(const AttentionArgs& args, int rows, Work* work) {
  const int32_t* const plan = args.plan;
  const int32_t index = static_cast<int32_t>(blockIdx.x);
  if (index >= load_global(plan + args.layout.counts + 2)) return false;
  const int32_t* const item = plan + args.layout.prefill + index * 2;
  work->seq = load_global(item);
  work->first_pair = load_global(item + 1) * rows;
  const int32_t* const starts = plan + args.layout.query_start_loc + work->seq;
  work->first_row = load_global(starts);
  work->tokens = load_global(starts + 1) - load_global(starts);
  work->context = load_global(plan + args.layout.seq_lens + work->seq) - work->tokens;
  work->num_pairs = work->tokens * args.group;
  work->kv_head = static_cast<int32_t>(blockIdx.y);
  return true;
}

// Offset of a pair's elements in q or in out.
__device__ __forceinline__ int64_t pair_offset(const AttentionArgs& args, const Work& work,
                                               int64_t stride, int32_t pair) {
  const int32_t token = pair / args.group;
  const int32_t head = work.kv_head * args.group + (pair - token * args.group);
  return (work.first_row + token) * stride + int64_t{head} * args.cache.head_dim;
}

template <typename T, typename C, int kDim>
__device__ __forceinline__ void load_queries(const AttentionArgs& args, const Work& work,
                                             char* to) {
  using Shape = PrefillShape<C, kDim>;
  const T* const q = static_cast<const T*>(args.q);
  for (int i = threadIdx.x; i < Shape::kRows * kDim / 8; i += kPrefillThreads) {
    const int row = i / (kDim / 8), at = i % (kDim / 8) * 8;
    const int32_t pair = work.first_pair + row;
    Vector<T> x;
    x.words = uint4{0, 0, 0, 0};
    if (pair < work.num_pairs && at < args.cache.head_dim) {
      x = load_vector(q + pair_offset(args, work, args.q_stride, pair) + at);
    }
    T* const line = reinterpret_cast<T*>(to + row * Shape::kQueryStride);
    if constexpr (kIsFloat8<C>) {
#pragma unroll
      for (int e = 0; e < 8; ++e) line[query_position<C>(at + e)] = x.elements[e];
    } else {
      *reinterpret_cast<uint4*>(line + at) = x.words;
    }
  }
}

// Keys or values of the tile of tokens from `first` on, 16 at a time: those lie in one block.
template <typename C, int kDim>
__device__ __forceinline__ void fetch_tile(const AttentionArgs& args, const Work& work,
                                           const void* cache, int32_t first, int32_t end,
                                           char* to) {
  constexpr int kPerVector = 16 / static_cast<int>(sizeof(C));
  const int32_t* const table = args.block_tables + work.seq * args.block_table_stride;
#pragma unroll
  for (int part = 0; part < PrefillShape<C, kDim>::kTokens / 16; ++part) {
    const int32_t token = first + 16 * part;
    const int32_t index = token / args.cache.block_size;
    int32_t block = token < end ? load_global(table + index) : 0;
    block = min(max(block, 0), args.cache.num_blocks - 1);
    const C* const from = static_cast<const C*>(cache) + block * args.cache.block_stride +
                          (token - index * args.cache.block_size) * args.cache.token_stride +
                          work.kv_head * args.cache.head_stride;
    fetch_rows<C, kDim, kPrefillThreads, 16>(
        to + part * 16 * TileShape<C, kDim>::kStride, from, args.cache.token_stride, end - token,
        args.cache.head_dim / kPerVector, static_cast<int>(threadIdx.x));
  }
}

template <typename T, typename C, int kDim>
__global__ void __launch_bounds__(kPrefillThreads) prefill_kernel(AttentionArgs args) {
  using Shape = PrefillShape<C, kDim>;
  constexpr int kFragments = Shape::kFragments;
  constexpr int kColumns = Shape::kTokens / 8;  // fragments of scores
  Work work;
  if (!find_work(args, Shape::kRows, &work)) return;
  char* const queries = dynamic_shared();
  char* const keys = queries + Shape::kQueryBytes;
  char* const values = keys + Shape::kTileBytes;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int group = lane / 4;

  // The tile's first and last token see [begin, end) together.
  const int32_t last_pair = min(work.first_pair + Shape::kRows, work.num_pairs) - 1;
  const int32_t first_position = work.context + work.first_pair / args.group;
  const int32_t end = work.context + last_pair / args.group + 1;
  const int32_t window = args.params.sliding_window;
  const int32_t begin = window > 0 ? max(0, first_position + 1 - window) : 0;
  const int32_t first_tile = begin / Shape::kTokens;
  const int32_t end_tile = (end + Shape::kTokens - 1) / Shape::kTokens;

  fetch_tile<C, kDim>(args, work, args.cache.k, first_tile * Shape::kTokens, end, keys);
  cp_async_commit();
  load_queries<T, C, kDim>(args, work, queries);

  const float k_scale =
      kIsFloat8<C> ? kv_scale(args.cache.k_scale, work.kv_head) * Widen<T>::kFactor : 1.0f;
  const ScoreRule rule{args.params.scale * k_scale, args.params.soft_cap, window};
  const bool has_slopes = args.params.alibi_slopes != nullptr;
  int32_t positions[kFragments][2];
  float slopes[kFragments][2];
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t pair = work.first_pair + (warp * kFragments + f) * 16 + group + 8 * i;
      const int32_t token = pair / args.group;
      positions[f][i] = work.context + token;
      const int32_t head = work.kv_head * args.group + (pair - token * args.group);
      slopes[f][i] = has_slopes ? load_global(args.params.alibi_slopes + head) : 0.0f;
    }
  }

  SoftmaxState states[kFragments];
  float sums[kFragments][kDim / 8][4] = {};
  for (int32_t tile = first_tile; tile < end_tile; ++tile) {
    const int32_t first = tile * Shape::kTokens;
    cp_async_wait<0>();
    __syncthreads();  // keys (and, at first, queries) are there; nobody reads the values any more
    fetch_tile<C, kDim>(args, work, args.cache.v, first, end, values);
    cp_async_commit();

    float scores[kFragments][kColumns][4] = {};
#pragma unroll
    for (int step = 0; step < kDim / 32; ++step) {
      uint32_t a[kFragments][2][4];
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int row = (warp * kFragments + f) * 16 + lane % 16;
          ldmatrix(a[f][k],
                   queries + row * Shape::kQueryStride + step * 64 + k * 32 + lane / 16 * 16);
        }
      }
#pragma unroll
      for (int n = 0; n < kColumns / 2; ++n) {
        uint32_t b[2][2][2];
        load_keys<T, C, kDim>(keys + n * 16 * Shape::Tile::kStride, step, b);
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            mma_16x8x16<T>(scores[f][2 * n], a[f][k], b[k][0][0], b[k][0][1]);
            mma_16x8x16<T>(scores[f][2 * n + 1], a[f][k], b[k][1][0], b[k][1][1]);
          }
        }
      }
    }
    cp_async_wait<0>();
    __syncthreads();  // values are there; nobody reads the keys any more
    if (tile + 1 < end_tile) {
      fetch_tile<C, kDim>(args, work, args.cache.k, first + Shape::kTokens, end, keys);
    }
    cp_async_commit();

    // Whether any row of the tile may not see all of its tokens.
    const bool needs_mask =
        first + Shape::kTokens - 1 > first_position || (window > 0 && end - 1 - first >= window);
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      finish_scores(scores[f], rule, slopes[f], positions[f], first, end, has_slopes, needs_mask);
      float correction[2];
      update_softmax(scores[f], &states[f], correction);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[f][n][i] *= correction[i / 2];
      }
    }
#pragma unroll
    for (int part = 0; part < kColumns / 2; ++part) {
      uint32_t a[kFragments][4];
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* const pair = &scores[f][2 * part + i / 2][i % 2 * 2];
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
  cp_async_wait<0>();

  // Rows go out through where the queries were, each warp's own, in whole vectors.
  const float v_scale =
      kIsFloat8<C> ? kv_scale(args.cache.v_scale, work.kv_head) * Widen<T>::kFactor : 1.0f;
  __syncthreads();
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float weights = sum_of_quad(states[f].sum[i]);
      const float factor = weights > 0.0f ? v_scale / weights : 0.0f;
      T* const row = reinterpret_cast<T*>(queries + ((warp * kFragments + f) * 16 + group + 8 * i) *
                                                        Shape::kQueryStride);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          row[value_column<C>(n, lane % 4, e)] = from_float<T>(sums[f][n][2 * i + e] * factor);
        }
      }
    }
  }
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

}  // namespace

void launch_prefill(DType dtype, const AttentionArgs& args, int32_t num_items, Stream stream) {
  with_attention_types(dtype, args.cache, [&](auto t, auto c, auto dim) {
    using C = typename decltype(c)::type;
    constexpr int kDim = decltype(dim)::value;
    launch("paged_attention (prefill)", prefill_kernel<typename decltype(t)::type, C, kDim>,
           dim3(static_cast<unsigned>(num_items), static_cast<unsigned>(args.cache.num_kv_heads)),
           kPrefillThreads, PrefillShape<C, kDim>::kBytes, stream, args);
  });
}

}  // namespace fastpage::cuda
