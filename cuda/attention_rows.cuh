// A tile of a sequence's new tokens, as rows: (token, head) pairs, all heads that share a KV head
// together, so that keys and values are read once for them.
#pragma once

#include "cuda/attention_tile.cuh"

namespace fastpage::cuda {

struct RowTile {
  int64_t first_row;  // of q: the sequence's first new token
  int32_t seq;
  int32_t tokens;      // new ones
  int32_t context;     // tokens before these
  int32_t first_pair;  // of the tile
  int32_t num_pairs;   // of the sequence
  int32_t kv_head;
};

// The index-th tile of so many rows of a sequence, for the KV head of this block.
__device__ __forceinline__ RowTile row_tile(const AttentionArgs& args, int32_t seq, int32_t index,
                                            int rows) {
  RowTile tile;
  const int32_t* const starts = args.plan + args.layout.query_start_loc + seq;
  tile.seq = seq;
  tile.first_pair = index * rows;
  tile.first_row = load_global(starts);
  tile.tokens = load_global(starts + 1) - load_global(starts);
  tile.context = load_global(args.plan + args.layout.seq_lens + seq) - tile.tokens;
  tile.num_pairs = tile.tokens * args.group;
  tile.kv_head = static_cast<int32_t>(blockIdx.y);
  return tile;
}

// The tokens that the tile's first and last row see together.
struct KvRange {
  int32_t begin, end;
};
__device__ __forceinline__ KvRange visible_range(const AttentionArgs& args, const RowTile& tile,
                                                 int rows) {
  const int32_t last_pair = min(tile.first_pair + rows, tile.num_pairs) - 1;
  const int32_t window = args.params.sliding_window;
  const int32_t first_position = tile.context + tile.first_pair / args.group;
  return KvRange{window > 0 ? max(0, first_position + 1 - window) : 0,
                 tile.context + last_pair / args.group + 1};
}

// Offset of a pair's elements in q or in out.
__device__ __forceinline__ int64_t pair_offset(const AttentionArgs& args, const RowTile& tile,
                                               int64_t stride, int32_t pair) {
  const int32_t token = pair / args.group;
  const int32_t head = tile.kv_head * args.group + (pair - token * args.group);
  return (tile.first_row + token) * stride + int64_t{head} * args.cache.head_dim;
}

// The tile's queries, as rows in shared memory; zeros where there are none.
template <typename T, typename C, int kDim, int kRows, int kThreads>
__device__ __forceinline__ void load_queries(const AttentionArgs& args, const RowTile& tile,
                                             char* to) {
  const T* const q = static_cast<const T*>(args.q);
  for (int i = threadIdx.x; i < kRows * kDim / 8; i += kThreads) {
    const int row = i / (kDim / 8), at = i % (kDim / 8) * 8;
    const int32_t pair = tile.first_pair + row;
    Vector<T> x;
    x.words = uint4{0, 0, 0, 0};
    if (pair < tile.num_pairs && at < args.cache.head_dim) {
      x = load_vector(q + pair_offset(args, tile, args.q_stride, pair) + at);
    }
    T* const line = reinterpret_cast<T*>(to + row * TileShape<Half, kDim>::kStride);
    if constexpr (kIsFloat8<C>) {
#pragma unroll
      for (int e = 0; e < 8; ++e) line[query_position<C>(at + e)] = x.elements[e];
    } else {
      *reinterpret_cast<uint4*>(line + at) = x.words;
    }
  }
}

// Positions and slopes of the tile's rows; those behind the last are as it is.
template <int kRows, int kThreads>
__device__ __forceinline__ void fill_rules(const AttentionArgs& args, const RowTile& tile,
                                           RowRule* to) {
  const float* const slopes = args.params.alibi_slopes;
  for (int row = threadIdx.x; row < kRows; row += kThreads) {
    const int32_t pair = min(tile.first_pair + row, tile.num_pairs - 1);
    const int32_t token = pair / args.group;
    const int32_t head = tile.kv_head * args.group + (pair - token * args.group);
    to[row] = RowRule{tile.context + token, slopes != nullptr ? load_global(slopes + head) : 0.0f};
  }
}

}  // namespace fastpage::cuda
