// Attention in float32: right rather than fast. A block takes a head of a new token, and 128 tokens
// of its KV at a time: first a thread computes the score of a token, then the sum of a column.
// Every row is computed on its own, whatever the batch and the plan.
#include "cuda/attention_tile.cuh"

namespace fastpage::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kMaxColumns = 256 / kThreads;  // a thread's

// The sequence of which `row` of q is a new token; -1 if there is none.
__device__ __forceinline__ int32_t find_sequence(const AttentionArgs& args, int32_t row) {
  const int32_t* const starts = args.plan + args.layout.query_start_loc;
  const int32_t num_seqs = load_global(args.plan + args.layout.counts);
  int32_t low = 0, high = num_seqs + 1;  // of the starts, how many are not behind the row
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (load_global(starts + middle) <= row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low <= num_seqs ? low - 1 : -1;
}

__device__ __forceinline__ float greatest_of_block(float x, float* shared) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, bits));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) x = fmaxf(x, shared[i]);
  return x;
}

// Times scale, capped, biased.
__device__ __forceinline__ float score(const AttentionParams& params, const float* query,
                                       const float* key, int32_t head_dim, float slope,
                                       int32_t distance) {
  float sum = 0.0f;
  for (int i = 0; i < head_dim; i += 4) {
    const Vector<float> x = load_vector(key + i);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum = fmaf(query[i + e], x.elements[e], sum);
  }
  sum *= params.scale;
  if (params.soft_cap > 0.0f) sum = params.soft_cap * tanhf(sum / params.soft_cap);
  return sum - slope * static_cast<float>(distance);
}

__global__ void __launch_bounds__(kThreads, 4) float32_kernel(AttentionArgs args) {
  __shared__ float query[kThreads * kMaxColumns];
  __shared__ float weights[kThreads];
  __shared__ int64_t offsets[kThreads];  // of the tokens, in the cache
  __shared__ float maxima[kThreads / 32];
  const int64_t row = blockIdx.x;
  const int32_t seq = find_sequence(args, static_cast<int32_t>(row));
  if (seq < 0) return;
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t head = static_cast<int32_t>(blockIdx.y), head_dim = args.cache.head_dim;
  const int32_t behind_row =
      load_global(args.plan + args.layout.query_start_loc + seq + 1) - static_cast<int32_t>(row);
  const int32_t position = load_global(args.plan + args.layout.seq_lens + seq) - behind_row;
  const int32_t window = args.params.sliding_window;
  const int32_t* const table = args.block_tables + seq * args.block_table_stride;
  const float* const keys = static_cast<const float*>(args.cache.k);
  const float* const values = static_cast<const float*>(args.cache.v);
  const float* const slopes = args.params.alibi_slopes;
  const float slope = slopes != nullptr ? load_global(slopes + head) : 0.0f;
  for (int i = thread; i < head_dim; i += kThreads) {
    query[i] = load_global(static_cast<const float*>(args.q) + row * args.q_stride +
                           int64_t{head} * head_dim + i);
  }

  float base = -INFINITY, sum = 0.0f, sums[kMaxColumns] = {};
  for (int32_t first = window > 0 ? max(0, position + 1 - window) : 0; first <= position;
       first += kThreads) {
    const int32_t token = first + thread;
    const int32_t index = block_index(args, min(token, position) / 16);
    const int32_t block = min(max(load_global(table + index), 0), args.cache.num_blocks - 1);
    offsets[thread] =
        block * args.cache.block_stride +
        (min(token, position) - index * args.cache.block_size) * args.cache.token_stride +
        head / args.group * args.cache.head_stride;
    __syncthreads();  // the query is there; nobody reads the weights any more
    const float mine = token <= position ? score(args.params, query, keys + offsets[thread],
                                                 head_dim, slope, position - token)
                                         : -INFINITY;
    const float greatest = fmaxf(base, greatest_of_block(mine, maxima));
    const float correction = expf(base - greatest);
    base = greatest;
    weights[thread] = expf(mine - base);
    __syncthreads();
    sum *= correction;
#pragma unroll
    for (int c = 0; c < kMaxColumns; ++c) sums[c] *= correction;
    for (int i = 0; i < min(kThreads, position + 1 - first); ++i) {
      sum += weights[i];
#pragma unroll
      for (int c = 0; c < kMaxColumns; ++c) {
        const int column = thread + c * kThreads;
        if (column >= head_dim) continue;
        sums[c] = fmaf(weights[i], load_global(values + offsets[i] + column), sums[c]);
      }
    }
    __syncthreads();  // nobody reads the offsets any more
  }
  float* const out =
      static_cast<float*>(args.out) + row * args.out_stride + int64_t{head} * head_dim;
#pragma unroll
  for (int c = 0; c < kMaxColumns; ++c) {
    const int column = thread + c * kThreads;
    if (column < head_dim) store_global(out + column, sum > 0.0f ? sums[c] / sum : 0.0f);
  }
}

}  // namespace

void launch_float32(const AttentionArgs& args, int64_t num_rows, Stream stream) {
  launch("paged_attention (float32)", float32_kernel,
         dim3(static_cast<unsigned>(num_rows), static_cast<unsigned>(args.num_heads)), kThreads, 0,
         stream, args);
}

}  // namespace fastpage::cuda
