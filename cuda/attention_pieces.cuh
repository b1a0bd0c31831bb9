// What batch-invariant attention consists of. KV is cut at absolute positions into pieces of
// kPieceTokens. What a row makes of a piece (its greatest score, sum of weights and weighted
// values, in fp32) depends on the row and the piece alone: tiles of kSoftmaxTokens go through the
// softmax in order, whatever kernel does it. The row's result is its pieces, folded from the left.
// Who computes a piece, and where it is kept until it is folded, is the plan's choice, and shows in
// no bit.
//
// A block takes a run of a tile's consecutive pieces. The first run folds its pieces as they come.
// The others leave each of theirs in a slot of the workspace, and the last block of the tile to
// finish folds them all: slot 0 is the first run's, one slot for each piece follows.
#pragma once

#include "cuda/attention_rows.cuh"

namespace fastpage::cuda {

struct PieceRun {
  int32_t first, end;  // pieces
  int32_t num_pieces;  // of the tile
  int32_t length;      // pieces of the tile's runs, all but the last
  int32_t rows;        // of the tile
  int32_t counter;
  int64_t first_slot_row;  // of the workspace, for this KV head; meaningless if is_whole()

  __device__ bool is_first() const { return first == 0; }
  __device__ bool is_whole() const { return num_pieces <= length; }
  __device__ int32_t num_runs() const { return (num_pieces + length - 1) / length; }
  __device__ int32_t num_slots() const { return max(1, num_pieces - length + 1); }
  // Of the workspace: row 0 of the tile, for a piece.
  __device__ int64_t slot_row(int32_t piece) const {
    return first_slot_row + int64_t{max(0, piece - length + 1)} * rows;
  }
};

// A row's greatest score and sum of weights, of pieces; greatest -inf: nothing was seen.
using Stats = float2;

// The block's work, from the plan's items at `items`, of which there are `*count`.
template <int kRows>
__device__ __forceinline__ bool find_run(const AttentionArgs& args, int64_t items, int64_t count,
                                         RowTile* tile, PieceRun* run) {
  const int32_t index = static_cast<int32_t>(blockIdx.x);
  const int4* const item = reinterpret_cast<const int4*>(args.plan + items) + int64_t{index} * 2;
  // All loads at once: there is room for an item of every block, if nothing in it. (No item has a
  // negative sequence; but what the condition needs is not loaded after it.)
  const int32_t num_items = load_global(args.plan + count);
  const int4 what = load_global(item), where = load_global(item + 1);
  if ((index >= num_items) | (what.x < 0)) return false;
  *tile = row_tile(args, what.x, what.y, kRows);
  run->first = what.z;
  run->end = what.w;
  run->num_pieces = where.x;
  run->length = where.y;
  run->counter = where.w;
  run->rows = min(kRows, tile->num_pairs - tile->first_pair);
  run->first_slot_row = int64_t{where.z} * args.cache.num_kv_heads +
                        int64_t{tile->kv_head} * run->rows * run->num_slots();
  return true;
}

// The part of the range that is in the run's pieces; may be empty, the end before the beginning.
__device__ __forceinline__ KvRange within(const KvRange& range, const PieceRun& run) {
  return KvRange{max(range.begin, run.first * kPieceTokens),
                 min(range.end, run.end * kPieceTokens)};
}

__device__ __forceinline__ Stats* stats_of(const AttentionArgs& args, int64_t slot_row) {
  return reinterpret_cast<Stats*>(args.partial_stats) + slot_row;
}
// [head_dim], in the order of fragments: value_column says which column a place is.
__device__ __forceinline__ float* sums_of(const AttentionArgs& args, int64_t slot_row) {
  return args.partial_sums + slot_row * args.cache.head_dim;
}

// How the next piece of a row is folded into what came before.
struct Fold {
  float before, piece;  // factors
  Stats stats;          // of both

  __device__ Fold(const Stats& a, const Stats& b) {
    const float greatest = fmaxf(a.x, b.x);
    const float base = greatest == -INFINITY ? 0.0f : greatest;
    before = exp2_fast(a.x - base);
    piece = exp2_fast(b.x - base);
    stats = Stats{greatest, operator()(a.y, b.y)};
  }
  // Spelt out: both kernels are to round alike.
  __device__ float operator()(float a, float b) const { return fmaf(a, before, b * piece); }
};

// What sums are to be multiplied with, in the end.
__device__ __forceinline__ float final_factor(float weights, float v_scale) {
  return weights > 0.0f ? v_scale / weights : 0.0f;
}

// Pieces of a run before the first that a row of the tile sees: slots without anything.
template <int kThreads>
__device__ __forceinline__ void leave_hidden_pieces(const AttentionArgs& args, const PieceRun& run,
                                                    int32_t first_seen) {
  if (run.is_first()) return;
  for (int32_t piece = run.first; piece < min(first_seen, run.end); ++piece) {
    for (int row = threadIdx.x; row < run.rows; row += kThreads) {
      store_global(stats_of(args, run.slot_row(piece) + row), Stats{-INFINITY, 0.0f});
    }
  }
}

// The last of a tile's blocks to get here folds what all of them have left, and writes the rows.
template <typename T, typename C, int kThreads>
__device__ __forceinline__ void fold_runs(const AttentionArgs& args, const RowTile& tile,
                                          const PieceRun& run, float v_scale) {
  bool& is_last = *reinterpret_cast<bool*>(dynamic_shared());  // nobody reads queries any more
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t* const counter = args.counters + int64_t{run.counter} * gridDim.y + blockIdx.y;
    is_last = atomicAdd(counter, 1u) == static_cast<uint32_t>(run.num_runs()) - 1;
    if (is_last) *counter = 0;  // for the next run
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  const int quads = args.cache.head_dim / 4;
  for (int i = threadIdx.x; i < run.rows * quads; i += kThreads) {
    const int row = i / quads, at = i % quads * 4;
    Stats stats{-INFINITY, 0.0f};
    float sums[4] = {};
#pragma unroll 8
    for (int32_t slot = 0; slot < run.num_slots(); ++slot) {
      const int64_t slot_row = run.first_slot_row + int64_t{slot} * run.rows + row;
      const Stats next = load_from_l2(stats_of(args, slot_row));
      const float4 x = load_from_l2(reinterpret_cast<const float4*>(sums_of(args, slot_row) + at));
      const Fold fold(stats, next);
      const bool is_empty = next.x == -INFINITY;  // there are no sums
      const float piece[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[e] = is_empty ? sums[e] : fold(sums[e], piece[e]);
      stats = fold.stats;
    }
    const float factor = final_factor(stats.y, v_scale);
    T* const out =
        static_cast<T*>(args.out) + pair_offset(args, tile, args.out_stride, tile.first_pair + row);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int place = at + e;
      store_global(out + value_column<C>(place / 8, place % 8 / 2, place % 2),
                   from_float<T>(sums[e] * factor));
    }
  }
}

}  // namespace fastpage::cuda
