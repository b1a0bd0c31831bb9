// Decode attention: one new token a sequence, and as fast as its KV can be read.
//
// A block of four warps takes a part of one sequence's KV, for the (up to 16) heads that share a KV
// head: they are the 16 rows of the MMAs. Every warp is on its own: it takes every fourth tile of
// 16 tokens, keeps up to three stages of them (keys and values) in shared memory, of which all but
// the one it works on are still on their way, and has a softmax of its own; there is no barrier
// until the end, when the four are merged, in order. Which warp gets a tile depends on its position
// alone.
//
// Bytes in flight, which is what decides: an H100 moves 3 TB/s with some 700 ns to an answer,
// so 2.1 MB must be on their way, 16 KB per multiprocessor, and more like 40 under load. There are
// as many stages as a block's shared memory holds, up to 3. With 227 KB, bf16, head_dim 128: a
// stage of a warp is 8 KB; of 3 stages 2 are in flight; 4 warps and 2 blocks (106 KB each) give 128
// KB. head_dim 64: 56 KB a block, 3 blocks, 96 KB. head_dim 256: 16 KB a stage, 1 block of 206 KB:
// 128 KB. float8 halves a stage, and there is room for more blocks. With 99 KB there are 3 stages
// up to head_dim 64, 2 at 128, 1 at 256, where only the other warps' tiles are on their way.
//
// Arithmetic is far from the limit: a tile (8 KB) takes some 250 warp instructions, and at 3 TB/s a
// multiprocessor gets one every 630 cycles, in which it issues 2,520.
#include "cuda/attention_tile.cuh"

namespace fastpage::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kDecodeThreads = kWarps * 32;
constexpr int kTile = 16;  // tokens
constexpr int kMaxStages = 3;

template <typename C, int kDim>
struct DecodeShape {
  using Tile = TileShape<C, kDim>;
  static constexpr int kTileBytes = kTile * Tile::kStride;  // of keys, and of values
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kQueryStride = TileShape<Half, kDim>::kStride;
  static constexpr int kQueryBytes = kTile * kQueryStride;
  // The warps' results, at the end, where the tiles were: rows so far apart that the lanes of a
  // warp, which write columns of eight of them, meet in no bank.
  static constexpr int kResultStride = kDim + (kIsFloat8<C> ? 16 : 8);
  static constexpr int kResultBytes = kWarps * kTile * (kResultStride + 2) * 4;
  static constexpr int bytes(int stages) {
    const int tiles = kWarps * stages * kStageBytes;
    return kQueryBytes + (tiles > kResultBytes ? tiles : kResultBytes);
  }
};

struct Work {
  int32_t seq;
  int32_t begin, end;  // tokens of the KV
  int32_t partial;
  int32_t position;  // of the new token
  int64_t row;       // of q
  int32_t kv_head;
  int32_t first_head;  // of the group
  int32_t num_heads;
};

__device__ __forceinline__ bool find_work(const AttentionArgs& args, Work* work) {
  const int32_t* const plan = args.plan;
  const int32_t index = static_cast<int32_t>(blockIdx.x);
  // Both loads at once: there is room for an item of every block, if nothing in it. (No item has a
  // negative sequence; but what the condition needs is not loaded after it.)
  const int32_t count = load_global(plan + args.layout.counts + 1);
  const int4 item = load_global(reinterpret_cast<const int4*>(plan + args.layout.decode) + index);
  if ((index >= count) | (item.x < 0)) return false;
  work->seq = item.x;
  work->partial = item.w;
  work->position = load_global(plan + args.layout.seq_lens + item.x) - 1;
  work->row = load_global(plan + args.layout.query_start_loc + item.x);
  work->begin = item.y;
  work->end = item.z;
  if (args.params.sliding_window > 0) {
    work->begin = max(work->begin, work->position + 1 - args.params.sliding_window);
  }
  const int parts = (args.group + kTile - 1) / kTile;
  work->kv_head = static_cast<int32_t>(blockIdx.y) / parts;
  const int part = static_cast<int32_t>(blockIdx.y) % parts;
  work->first_head = work->kv_head * args.group + part * kTile;
  work->num_heads = min(kTile, args.group - part * kTile);
  return true;
}

// The heads of the new token, as rows in shared memory; zeros where there are none.
template <typename T, typename C, int kDim>
__device__ __forceinline__ void load_queries(const AttentionArgs& args, const Work& work,
                                             char* to) {
  using Shape = DecodeShape<C, kDim>;
  const T* const from = static_cast<const T*>(args.q) + work.row * args.q_stride +
                        int64_t{work.first_head} * args.cache.head_dim;
  for (int i = threadIdx.x; i < kTile * kDim / 8; i += kDecodeThreads) {
    const int head = i / (kDim / 8), at = i % (kDim / 8) * 8;
    Vector<T> x;
    x.words = uint4{0, 0, 0, 0};
    if (head < work.num_heads && at < args.cache.head_dim) {
      x = load_vector(from + head * args.cache.head_dim + at);
    }
    T* const row = reinterpret_cast<T*>(to + head * Shape::kQueryStride);
    if constexpr (kIsFloat8<C>) {
#pragma unroll
      for (int e = 0; e < 8; ++e) row[query_position<C>(at + e)] = x.elements[e];
    } else {
      *reinterpret_cast<uint4*>(row + at) = x.words;
    }
  }
}

// One warp's tiles: t, t + kWarps, ...
template <typename C, int kDim>
struct TileReader {
  using Shape = DecodeShape<C, kDim>;

  const AttentionArgs& args;
  const int32_t* block_table;
  int64_t head_offset;
  int32_t end;
  int32_t first_tile;
  int32_t num_tiles;
  char* memory;
  int32_t stages;
  int32_t next_stage = 0;  // that is filled
  int32_t blocks = 0;      // lane i: the block of the i-th of these 32 tiles

  // Tile i of this warp to its stage.
  __device__ void fetch(int i) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (i % 32 == 0) {
      const int32_t tile = first_tile + (i + lane) * kWarps;
      const bool there = i + lane < num_tiles;
      blocks = there ? load_global(block_table + block_index(args, tile)) : 0;
    }
    if (i < num_tiles) {
      const int32_t tile = first_tile + i * kWarps;
      // A block id out of range is never followed.
      const int32_t block =
          min(max(__shfl_sync(kFullWarp, blocks, i % 32), 0), args.cache.num_blocks - 1);
      const int32_t first = tile * kTile - block_index(args, tile) * args.cache.block_size;
      const int64_t offset =
          block * args.cache.block_stride + first * args.cache.token_stride + head_offset;
      const int valid = end - tile * kTile;
      const int vectors = args.cache.head_dim * static_cast<int>(sizeof(C)) / 16;
      char* const to = memory + next_stage * Shape::kStageBytes;
      next_stage = next_stage + 1 == stages ? 0 : next_stage + 1;
      fetch_rows<C, kDim, 32, kTile>(to, static_cast<const C*>(args.cache.k) + offset,
                                     args.cache.token_stride, valid, vectors, lane);
      fetch_rows<C, kDim, 32, kTile>(to + Shape::kTileBytes,
                                     static_cast<const C*>(args.cache.v) + offset,
                                     args.cache.token_stride, valid, vectors, lane);
    }
    cp_async_commit();  // empty groups, too: waits count them
  }

  // For the oldest tile that is on its way.
  __device__ void wait() const {
    if (stages == 3) {
      cp_async_wait<2>();
    } else if (stages == 2) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
  }
};

// sums[row][column] over a tile.
template <typename T, typename C, int kDim>
__device__ __forceinline__ void attend_tile(const char* queries, const char* keys, int32_t first,
                                            const Work& work, const ScoreRule& rule,
                                            const float (&slopes)[2], bool has_slopes,
                                            SoftmaxState* state, float (&sums)[kDim / 8][4]) {
  using Shape = DecodeShape<C, kDim>;
  float scores[2][4] = {};
  score_keys<T, C, kDim>(queries, keys, scores);
  const bool needs_mask = first < work.begin || first + kTile > work.end;
  const float factor = finish_scores(scores, rule, first, work.end, has_slopes, needs_mask,
                                     [&](int i) { return RowRule{work.position, slopes[i]}; });
  float correction[2];
  update_softmax(scores, factor, state, correction);
  if (__any_sync(kFullWarp, correction[0] != 1.0f || correction[1] != 1.0f)) {
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] *= correction[i / 2];
    }
  }
  const uint32_t a[4] = {pack<T>(scores[0][0], scores[0][1]), pack<T>(scores[0][2], scores[0][3]),
                         pack<T>(scores[1][0], scores[1][1]), pack<T>(scores[1][2], scores[1][3])};
  const char* const values = keys + Shape::kTileBytes;
#pragma unroll
  for (int step = 0; step < kDim / 32; ++step) {
    uint32_t b[4][2];
    load_values<T, C, kDim>(values, step, b);
#pragma unroll
    for (int n = 0; n < 4; ++n) mma_16x8x16<T>(sums[step * 4 + n], a, b[n][0], b[n][1]);
  }
}

// Four columns of a head.
struct Merged {
  float sums[4] = {};
  float weights = 0.0f;
};

// Results of `count` parts, merged in order. greatest: of all. stats(part): greatest and sum of
// weights; sums(part): of the columns.
template <typename Stats, typename Sums>
__device__ __forceinline__ Merged merge(int count, float greatest, Stats stats, Sums sums) {
  const float base = greatest == -INFINITY ? 0.0f : greatest;
  Merged merged;
#pragma unroll 8
  for (int i = 0; i < count; ++i) {
    const float2 part = stats(i);
    const float4 x = sums(i);
    const float factor = exp2_fast(part.x - base);
    merged.sums[0] += x.x * factor;
    merged.sums[1] += x.y * factor;
    merged.sums[2] += x.z * factor;
    merged.sums[3] += x.w * factor;
    merged.weights += part.y * factor;
  }
  return merged;
}

// fn(head, column) for every fourth column of a block's heads.
template <typename Fn>
__device__ __forceinline__ void for_columns(const AttentionArgs& args, const Work& work, Fn fn) {
  const int columns = args.cache.head_dim / 4;
  for (int i = threadIdx.x; i < work.num_heads * columns; i += kDecodeThreads) {
    const int head = i / columns;
    fn(head, (i - head * columns) * 4);
  }
}

template <typename T, typename C>
__device__ __forceinline__ void write_out(const AttentionArgs& args, const Work& work, int head,
                                          int column, const Merged& merged) {
  const float scale =
      kIsFloat8<C> ? kv_scale(args.cache.v_scale, work.kv_head) * Widen<T>::kFactor : 1.0f;
  float values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[i] = merged.weights > 0.0f ? merged.sums[i] / merged.weights * scale : 0.0f;
  }
  T* const to = static_cast<T*>(args.out) + work.row * args.out_stride +
                int64_t{work.first_head + head} * args.cache.head_dim + column;
  store_global(reinterpret_cast<uint2*>(to),
               uint2{pack<T>(values[0], values[1]), pack<T>(values[2], values[3])});
}

// The last of a sequence's blocks to get here merges what all of them have left. There may be
// dozens of parts in L2, each some 300 cycles away: as many as can be are asked for at once.
template <typename T, typename C, int kDim>
__device__ __forceinline__ void merge_partials(const AttentionArgs& args, const Work& work) {
  float* const greatest = reinterpret_cast<float*>(dynamic_shared());  // of a head, once
  bool& is_last = *reinterpret_cast<bool*>(greatest + kTile);  // nobody reads queries any more
  __threadfence();
  __syncthreads();
  const int32_t count = load_global(args.plan + args.layout.num_partials + work.seq);
  if (threadIdx.x == 0) {
    uint32_t* const counter = args.counters + int64_t{work.seq} * gridDim.y + blockIdx.y;
    is_last = atomicAdd(counter, 1u) == static_cast<uint32_t>(count) - 1;
    if (is_last) *counter = 0;  // for the next run
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  const int64_t first = load_global(args.plan + args.layout.first_partial + work.seq);
  const auto at = [&](int part, int head) {
    return (first + part) * args.num_heads + work.first_head + head;
  };
  const auto stats = [&](int part, int head) {
    return load_from_l2(reinterpret_cast<const float2*>(args.partial_stats) + at(part, head));
  };
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int head = static_cast<int>(threadIdx.x / 32); head < work.num_heads; head += kWarps) {
    float most = -INFINITY;
    for (int part = lane; part < count; part += 32) most = fmaxf(most, stats(part, head).x);
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) {
      most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, bits));
    }
    if (lane == 0) greatest[head] = most;
  }
  __syncthreads();
  for_columns(args, work, [&](int head, int column) {
    const Merged merged = merge(
        count, greatest[head], [&](int part) { return stats(part, head); },
        [&](int part) {
          return load_from_l2(reinterpret_cast<const float4*>(
              args.partial_sums + at(part, head) * args.cache.head_dim + column));
        });
    write_out<T, C>(args, work, head, column, merged);
  });
}

template <typename T, typename C, int kDim>
__global__ void __launch_bounds__(kDecodeThreads, 2) decode_kernel(AttentionArgs args, int stages) {
  using Shape = DecodeShape<C, kDim>;
  Work work;
  if (!find_work(args, &work)) return;
  char* const queries = dynamic_shared();
  char* const tiles = queries + Shape::kQueryBytes;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int group = static_cast<int>(threadIdx.x % 32) / 4;
  // The first tile from `begin` on whose number is `warp` modulo four.
  const int32_t begin_tile = work.begin / kTile;
  const int32_t first_tile = begin_tile + ((warp - begin_tile) & (kWarps - 1));
  const int32_t end_tile = (work.end + kTile - 1) / kTile;
  const int32_t num_tiles = max(0, (end_tile - first_tile + kWarps - 1) / kWarps);
  TileReader<C, kDim> reader{args,
                             args.block_tables + work.seq * args.block_table_stride,
                             work.kv_head * args.cache.head_stride,
                             work.end,
                             first_tile,
                             num_tiles,
                             tiles + warp * stages * Shape::kStageBytes,
                             stages};

  // Keys and values first: what else there is to load arrives while they are on their way.
  for (int i = 0; i < stages - 1; ++i) reader.fetch(i);
  load_queries<T, C, kDim>(args, work, queries);
  const float k_scale =
      kIsFloat8<C> ? kv_scale(args.cache.k_scale, work.kv_head) * Widen<T>::kFactor : 1.0f;
  const ScoreRule rule{args.params.scale * k_scale, args.params.soft_cap,
                       args.params.sliding_window};
  const bool has_slopes = args.params.alibi_slopes != nullptr;
  float slopes[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int head = group + 8 * i;
    if (has_slopes && head < work.num_heads) {
      slopes[i] = load_global(args.params.alibi_slopes + work.first_head + head);
    }
  }

  SoftmaxState state;
  float sums[kDim / 8][4] = {};
  __syncthreads();  // queries are there
  int stage = 0;
  for (int i = 0; i < num_tiles; ++i) {
    reader.fetch(i + stages - 1);
    reader.wait();
    __syncwarp();
    attend_tile<T, C, kDim>(queries, reader.memory + stage * Shape::kStageBytes,
                            (first_tile + i * kWarps) * kTile, work, rule, slopes, has_slopes,
                            &state, sums);
    stage = stage + 1 == stages ? 0 : stage + 1;
    __syncwarp();  // the stage is filled again by the next fetch
  }
  cp_async_wait<0>();
  __syncthreads();

  // results[warp][row][column], stats[warp][row], of the rows that are heads.
  float* const results = reinterpret_cast<float*>(tiles);
  float2* const stats = reinterpret_cast<float2*>(results + kWarps * kTile * Shape::kResultStride);
  const int pair = static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float sum = sum_of_quad(state.sum[row]);
    if (group + 8 * row >= work.num_heads) continue;
    const int at = warp * kTile + group + 8 * row;
    if (pair == 0) stats[at] = float2{state.base[row], sum};
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        results[at * Shape::kResultStride + value_column<C>(n, pair, i)] = sums[n][2 * row + i];
      }
    }
  }
  __syncthreads();
  for_columns(args, work, [&](int head, int column) {
    float greatest = -INFINITY;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) greatest = fmaxf(greatest, stats[w * kTile + head].x);
    const Merged merged = merge(
        kWarps, greatest, [&](int w) { return stats[w * kTile + head]; },
        [&](int w) {
          return *reinterpret_cast<const float4*>(
              results + (w * kTile + head) * Shape::kResultStride + column);
        });
    if (work.partial < 0) return write_out<T, C>(args, work, head, column, merged);
    const int64_t at = int64_t{work.partial} * args.num_heads + work.first_head + head;
    store_global(reinterpret_cast<float4*>(args.partial_sums + at * args.cache.head_dim + column),
                 float4{merged.sums[0], merged.sums[1], merged.sums[2], merged.sums[3]});
    if (column == 0) {
      store_global(reinterpret_cast<float2*>(args.partial_stats) + at,
                   float2{greatest, merged.weights});
    }
  });
  if (work.partial >= 0) merge_partials<T, C, kDim>(args, work);
}

}  // namespace

void launch_decode(DType dtype, const AttentionArgs& args, int32_t num_items, Stream stream) {
  with_attention_types(dtype, args.cache, [&](auto t, auto c, auto dim) {
    using C = typename decltype(c)::type;
    constexpr int kDim = decltype(dim)::value;
    using Shape = DecodeShape<C, kDim>;
    const int parts = (args.group + kTile - 1) / kTile;
    int stages = kMaxStages;
    while (stages > 1 && Shape::bytes(stages) > max_shared_bytes()) --stages;
    launch("paged_attention (decode)", decode_kernel<typename decltype(t)::type, C, kDim>,
           dim3(static_cast<unsigned>(num_items),
                static_cast<unsigned>(args.cache.num_kv_heads * parts)),
           kDecodeThreads, Shape::bytes(stages), stream, args, stages);
  });
}

}  // namespace fastpage::cuda
