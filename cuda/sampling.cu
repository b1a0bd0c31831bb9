// From logits to tokens, as cpp/src/core/sampling does it on the CPU, so that the same seed draws
// the same token from the same logits. Weights are the same to the bit: the same polynomial, no
// contraction, and sums over the same 32 lanes of chunks of 1024. What may differ is a top_p
// threshold: masses are summed in fixed point here (2^-45, which no order of additions changes) and
// in fp32 there, so that a token whose place is within some 1e-6 of top_p may be on either side.
//
// A block takes a row, of which it keeps as much in shared memory as fits: all of it up to some
// 50,000 tokens with 227 KB. top_k or min_p: it is read for the greatest logits, one a thread, of
// which the k-th is a bound below which no logit is among the first k, and for those above that
// bound, of which there are few. Else it is read for the greatest logit and for the sum of weights;
// with top_p, whose threshold may be anywhere, that reading also finds which 1 / 2048 of the
// weights' range it is in, the next one lists those weights, and a fourth sums up what is above it.
#include "cuda/launch.cuh"

namespace fastpage::cuda {

namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kChunk = 1024;  // as in core/sampling/kernels.h
constexpr int kBins = 2048;
constexpr int kBatch = 8;  // loads of a thread that are on their way at once

struct SampleArgs {
  const float* logits;
  int64_t stride;
  int32_t vocab_size;
  SamplingRows rows;
  float* values;    // [rows][vocab_size]
  int32_t* ids;     // [rows][vocab_size]
  int32_t* tokens;  // [rows]
  int32_t num_kept;
};

struct Bin {
  int index;                 // -1: there is none
  unsigned long long above;  // of the amounts, those above it
};

// What a block shares.
struct Shared {
  uint32_t bins[kBins][2];   // of 64 bits, the lower half first
  float greatest[kThreads];  // of each thread's logits
  int32_t counts[kWarps];
  int32_t size;
  uint32_t key;
  Bin bin;
  double target;
  int32_t first;
  float sums[1];  // of each chunk; behind them, the logits that are kept
};

__host__ __device__ __forceinline__ int num_chunks(int32_t n) { return (n + kChunk - 1) / kChunk; }

// A row's logits.
struct Row {
  const float* logits;
  float* kept;       // the first of them, in shared memory
  int32_t num_kept;  // all, or a multiple of kChunk

  __device__ float operator()(int32_t i) const {
    return i < num_kept ? kept[i] : load_global(logits + i);
  }
};

// There is no 64-bit addition to shared memory but a loop of compare and swap.
__device__ __forceinline__ void add_to_bin(Shared* shared, uint32_t bin,
                                           unsigned long long amount) {
  const uint32_t low = static_cast<uint32_t>(amount);
  const uint32_t sum = atomicAdd(&shared->bins[bin][0], low) + low;
  const uint32_t high = static_cast<uint32_t>(amount >> 32) + (sum < low);
  if (high != 0) atomicAdd(&shared->bins[bin][1], high);
}
__device__ __forceinline__ unsigned long long bin_amount(const Shared& shared, int bin) {
  return static_cast<unsigned long long>(shared.bins[bin][1]) << 32 | shared.bins[bin][0];
}
__device__ __forceinline__ void clear_bins(Shared* shared) {
  for (int i = threadIdx.x; i < kBins; i += kThreads) {
    shared->bins[i][0] = shared->bins[i][1] = 0;
  }
  __syncthreads();
}

// philox_uniform() of core/sampling/philox.h, which is no device code: std::array is not.
__device__ double uniform_of(uint64_t seed, uint64_t position) {
  uint32_t counter[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0,
                         0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0];
    const uint64_t b = uint64_t{0xCD9E8D57} * counter[2];
    counter[0] = static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0];
    counter[1] = static_cast<uint32_t>(b);
    counter[2] = static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1];
    counter[3] = static_cast<uint32_t>(a);
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  const uint64_t word = uint64_t{counter[0]} << 32 | counter[1];
  return static_cast<double>(word >> 11) * 0x1p-53;
}

// Keys in the order of floats; -0 is 0.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(__fadd_rn(x, 0.0f));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// The highest bin such that its amount and those above it, and `above`, reach `target`.
__device__ Bin find_bin(Shared* shared, unsigned long long above, unsigned long long target) {
  __syncthreads();  // all amounts are there
  if (threadIdx.x < 32) {
    // Lane 0 has the highest bins.
    constexpr int kEach = kBins / 32;
    const int lane = static_cast<int>(threadIdx.x);
    const int top = kBins - 1 - lane * kEach;
    unsigned long long sum = 0;
    for (int i = 0; i < kEach; ++i) sum += bin_amount(*shared, top - i);
    unsigned long long before = sum;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
      const unsigned long long other = __shfl_up_sync(kFullWarp, before, by);
      if (lane >= by) before += other;
    }
    before += above - sum;  // all that is above this lane's bins
    const bool reaches = before < target && before + sum >= target;
    if (__ballot_sync(kFullWarp, reaches) == 0 && lane == 0) shared->bin = Bin{-1, 0};
    if (reaches) {
      int bin = top;
      while (before + bin_amount(*shared, bin) < target) before += bin_amount(*shared, bin--);
      shared->bin = Bin{bin, before};
    }
  }
  __syncthreads();
  const Bin bin = shared->bin;
  __syncthreads();
  return bin;
}

// The greatest key such that the amounts of those at or above it reach `target`; 0 if they never
// do. for_each(fn) calls fn(key, amount) for the thread's share.
template <typename ForEach>
__device__ uint32_t select_key(Shared* shared, unsigned long long target, ForEach for_each) {
  uint32_t prefix = 0, mask = 0;
  unsigned long long above = 0;
  for (int round = 0; round < 3; ++round) {
    const int shift = round == 0 ? 21 : round == 1 ? 10 : 0;
    const uint32_t digit_mask = round == 2 ? 0x3ffu : 0x7ffu;
    clear_bins(shared);
    for_each([&](uint32_t key, unsigned long long amount) {
      if ((key & mask) == prefix) add_to_bin(shared, key >> shift & digit_mask, amount);
    });
    const Bin bin = find_bin(shared, above, target);
    if (bin.index < 0) return 0;
    above = bin.above;
    prefix |= static_cast<uint32_t>(bin.index) << shift;
    mask |= digit_mask << shift;
  }
  return prefix;
}

__device__ __forceinline__ float greatest_of_block(Shared* shared, float mine) {
  shared->greatest[threadIdx.x] = mine;
  __syncthreads();
  float best = mine;
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2)
    best = fmaxf(best, __shfl_xor_sync(kFullWarp, best, bits));
  if (threadIdx.x % 32 == 0) shared->bins[threadIdx.x / 32][0] = __float_as_uint(best);
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) {
    best = fmaxf(best, __uint_as_float(shared->bins[i][0]));
  }
  __syncthreads();
  return best;
}

// The lowest id with this logit.
__device__ int32_t find_first(Shared* shared, const Row& row, int32_t n, float value) {
  if (threadIdx.x == 0) shared->first = n;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += kThreads) {
    if (row(i) == value) atomicMin(&shared->first, i);
  }
  __syncthreads();
  return shared->first;
}

// This thread's greatest logit; a NaN is none. Those that are to be kept are, from here on.
__device__ __forceinline__ float keep_and_find_greatest(const Row& row, int32_t n) {
  float best = -INFINITY;
  for (int32_t first = threadIdx.x; first < n; first += kThreads * kBatch) {
    float x[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int32_t i = first + b * kThreads;
      x[b] = i < n ? load_global(row.logits + i) : -INFINITY;
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      best = x[b] > best ? x[b] : best;
      if (first + b * kThreads < row.num_kept) row.kept[first + b * kThreads] = x[b];
    }
  }
  return best;
}

// Each warp has a part of the vocabulary, and lists what it keeps of it from there on, in order.
struct Lists {
  float* values;
  int32_t* ids;
  int32_t part;  // of the vocabulary, a warp's

  __device__ int32_t begin() const { return static_cast<int32_t>(threadIdx.x) / 32 * part; }
};

__device__ void list_from(Shared* shared, const Row& row, int32_t n, float bound,
                          const Lists& lists) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x) / 32;
  const int32_t begin = lists.begin(), end = min(n, begin + lists.part);
  int32_t count = 0;
  for (int32_t first = begin; first < end; first += 32 * kBatch) {
    // Loads cannot be moved before the stores below: what is stored might be what they read.
    float x[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int32_t i = first + 32 * b + lane;
      x[b] = i < end ? row(i) : -INFINITY;
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const bool is_kept = x[b] >= bound;
      const unsigned kept = __ballot_sync(kFullWarp, is_kept);
      if (is_kept) {
        const int32_t at = begin + count + __popc(kept & ((1u << lane) - 1));
        store_global(lists.values + at, x[b]);
        store_global(lists.ids + at, first + 32 * b + lane);
      }
      count += __popc(kept);
    }
  }
  if (lane == 0) shared->counts[warp] = count;
  __syncthreads();
}

// Puts the lists together at the front, without what is below `bound`; in order, and in place: one
// warp after the other, none of which writes behind what it has read.
__device__ int32_t compact(Shared* shared, float bound, const Lists& lists) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) shared->size = 0;
  for (int turn = 0; turn < kWarps; ++turn) {
    __syncthreads();
    if (warp != turn) continue;
    int32_t to = shared->size;
    const int32_t begin = lists.begin();
    for (int32_t i = 0; i < shared->counts[warp]; i += 32) {
      const bool there = i + lane < shared->counts[warp];
      const float x = there ? load_global(lists.values + begin + i + lane) : -INFINITY;
      const int32_t id = there ? load_global(lists.ids + begin + i + lane) : 0;
      const unsigned kept = __ballot_sync(kFullWarp, there && x >= bound);
      __syncwarp();
      if (there && x >= bound) {
        const int32_t at = to + __popc(kept & ((1u << lane) - 1));
        store_global(lists.values + at, x);
        store_global(lists.ids + at, id);
      }
      to += __popc(kept);
    }
    __syncwarp();
    if (lane == 0) shared->size = to;
  }
  __syncthreads();
  return shared->size;
}

// The tokens whose logits are at least the k-th greatest, and at least `bound`, at the front of the
// lists; returns their number. shared->greatest holds what keep_and_find_greatest() gave.
__device__ int32_t keep_top_k(Shared* shared, const Row& row, int32_t n, int32_t k, float bound,
                              const Lists& lists) {
  const float lowest = -3.402823466e38f;
  bound = fmaxf(bound, lowest);
  if (k <= kThreads / 2) {
    // At least k logits are as great as the k-th of the threads' greatest.
    const uint32_t key = select_key(shared, static_cast<unsigned long long>(k), [&](auto count) {
      count(key_of(shared->greatest[threadIdx.x]), 1ull);
    });
    bound = fmaxf(bound, value_of(key));
  }
  list_from(shared, row, n, bound, lists);
  int32_t total = 0;
  for (int i = 0; i < kWarps; ++i) total += shared->counts[i];
  if (total > k) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x) / 32;
    const uint32_t key = select_key(shared, static_cast<unsigned long long>(k), [&](auto count) {
      for (int32_t i = lane; i < shared->counts[warp]; i += 32) {
        count(key_of(load_global(lists.values + lists.begin() + i)), 1ull);
      }
    });
    bound = value_of(key);
  }
  return compact(shared, bound, lists);
}

// core/sampling/kernels_impl.h's, to the bit.
__device__ __forceinline__ float exp2_of_negative(float x) {
  const float kRound = 12582912.0f;
  x = x > -127.0f ? x : -127.0f;
  const float shifted = __fadd_rn(x, kRound);
  const float f = __fadd_rn(x, -__fadd_rn(shifted, -kRound));
  float p = __fadd_rn(__fmul_rn(f, 0.001326472731307149f), 0.009671512991189957f);
  p = __fadd_rn(__fmul_rn(p, f), 0.05550733581185341f);
  p = __fadd_rn(__fmul_rn(p, f), 0.24022242426872253f);
  p = __fadd_rn(__fmul_rn(p, f), 0.6931470036506653f);
  p = __fadd_rn(__fmul_rn(p, f), 1.0f);
  return __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
}

// sums[c] = the sum over chunk c of weigh(i, load(i)), a warp a chunk.
template <typename Load, typename Weigh>
__device__ void sum_chunks(Shared* shared, int32_t n, Load load, Weigh weigh) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x) / 32;
  __syncthreads();
  for (int chunk = warp; chunk < num_chunks(n); chunk += kWarps) {
    float sum = 0.0f;
    for (int32_t first = chunk * kChunk + lane; first < min(n, chunk * kChunk + kChunk);
         first += 32 * kBatch) {
      float x[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) x[b] = first + 32 * b < n ? load(first + 32 * b) : 0.0f;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (first + 32 * b < n) sum = __fadd_rn(sum, weigh(first + 32 * b, x[b]));
      }
    }
#pragma unroll
    for (int half = 16; half > 0; half /= 2) {
      sum = __fadd_rn(sum, __shfl_down_sync(kFullWarp, sum, half));
    }
    if (lane == 0) shared->sums[chunk] = sum;
  }
  __syncthreads();
}

__device__ __forceinline__ double sum_of_chunks(const Shared& shared, int32_t n) {
  double total = 0.0;
  for (int i = 0; i < num_chunks(n); ++i) total += shared.sums[i];
  return total;
}

// Masses in fixed point: n weights of 1 fit into 63 bits.
struct MassUnit {
  float unit;

  static __device__ MassUnit for_weights(int32_t n) {
    const int bits = min(45, 31 + __clz(n - 1));
    return {__uint_as_float(static_cast<uint32_t>(127 + bits) << 23)};
  }
  __device__ unsigned long long of(float weight) const {
    return static_cast<unsigned long long>(weight * unit);
  }
  // At least 1: what is asked for is never nothing.
  __device__ unsigned long long target(double mass) const {
    const auto target = static_cast<unsigned long long>(mass * static_cast<double>(unit));
    return target > 0 ? target : 1;
  }
};

// Weights below it are so few that all others together reach `mass` of `total`.
__device__ __forceinline__ float lowest_threshold(int32_t n, double mass, double total) {
  return static_cast<float>((total - mass) / static_cast<double>(n) / 2);
}

// The greatest weight t such that all weights >= t together reach `mass` of `total`.
__device__ float mass_threshold(Shared* shared, const float* weights, int32_t n, double mass,
                                double total) {
  const float low = lowest_threshold(n, mass, total);
  const MassUnit unit = MassUnit::for_weights(n);
  const uint32_t key = select_key(shared, unit.target(mass), [&](auto count) {
    for (int32_t i = threadIdx.x; i < n; i += kThreads) {
      const float w = load_global(weights + i);
      if (w >= low && w > 0.0f) count(__float_as_uint(w), unit.of(w));
    }
  });
  return key == 0 ? low : __uint_as_float(key);
}

// The weights of a whole row.
struct RowWeights {
  const Row& row;
  float greatest;
  float scale;

  __device__ float of(float logit) const {
    return exp2_of_negative(__fmul_rn(__fadd_rn(logit, -greatest), scale));
  }
  __device__ float operator()(int32_t i) const { return of(row(i)); }
};

// Lists the weights of one bin, in any order; returns their number.
__device__ int32_t list_bin(Shared* shared, const RowWeights& weights, int32_t n, uint32_t lowest,
                            int shift, int bin, float* list) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) shared->size = 0;
  __syncthreads();
  for (int32_t first = warp * 32 * kBatch; first < n; first += kThreads * kBatch) {
    float x[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int32_t i = first + 32 * b + lane;
      x[b] = i < n ? weights(i) : 0.0f;
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const uint32_t key = __float_as_uint(x[b]);
      const bool is_there = key >= lowest && (key - lowest) >> shift == static_cast<uint32_t>(bin);
      const unsigned there = __ballot_sync(kFullWarp, is_there);
      int32_t to = 0;
      if (there != 0 && lane == 0) to = atomicAdd(&shared->size, __popc(there));
      to = __shfl_sync(kFullWarp, to, 0) + __popc(there & ((1u << lane) - 1));
      if (is_there) store_global(list + to, x[b]);
    }
  }
  __syncthreads();
  return shared->size;
}

// Sums up the chunks of a row's weights that are at least the threshold which mass_threshold()
// would give for top_p < 1; returns it. `list`: room for n.
__device__ float sum_top_p(Shared* shared, const RowWeights& weights, int32_t n, float top_p,
                           float* list) {
  const auto logit = [&](int32_t i) { return weights.row(i); };
  const MassUnit unit = MassUnit::for_weights(n);
  // The greatest weight is 1: no threshold is below this, whatever the total. Bins from there to 1.
  const uint32_t lowest = __float_as_uint(fmaxf(lowest_threshold(n, top_p, 1.0), 0x1p-126f));
  const int shift = max(0, 21 - __clz(static_cast<int>(0x3f800000u - lowest)));
  clear_bins(shared);
  sum_chunks(shared, n, logit, [&](int32_t, float x) {
    const float w = weights.of(x);
    const uint32_t key = __float_as_uint(w);
    if (key >= lowest) add_to_bin(shared, (key - lowest) >> shift, unit.of(w));
    return w;
  });
  const double total = sum_of_chunks(*shared, n);
  const double mass = top_p * total;
  const unsigned long long target = unit.target(mass);
  const Bin bin = find_bin(shared, 0, target);
  float threshold = lowest_threshold(n, mass, total);
  if (bin.index >= 0) {
    const int32_t size = list_bin(shared, weights, n, lowest, shift, bin.index, list);
    const uint32_t key = select_key(shared, target - bin.above, [&](auto count) {
      for (int32_t i = threadIdx.x; i < size; i += kThreads) {
        const float w = load_global(list + i);
        count(__float_as_uint(w), unit.of(w));
      }
    });
    threshold = __uint_as_float(key);
  }
  sum_chunks(shared, n, logit, [&](int32_t, float x) {
    const float w = weights.of(x);
    return w >= threshold ? w : 0.0f;
  });
  return threshold;
}

// The first weight at which the running sum exceeds the target; shared->sums are the chunks'.
template <typename Weight>
__device__ int32_t draw(Shared* shared, int32_t n, double uniform, Weight weight_of) {
  if (threadIdx.x == 0) {
    const double target = uniform * sum_of_chunks(*shared, n);
    double below = 0.0;
    int chunk = 0;
    for (int c = 0; c < num_chunks(n); ++c) {
      const float sum = shared->sums[c];
      if (sum <= 0.0f) continue;
      chunk = c;
      if (below + sum > target) break;
      below += sum;
    }
    shared->target = target - below;
    shared->first = chunk;
  }
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x);
  if (lane >= 32) return 0;
  // 32 neighbours a lane.
  const int32_t begin = shared->first * kChunk + lane * 32;
  const double target = shared->target;
  const auto weight = [&](int32_t i) {
    const float w = i < n ? weight_of(i) : 0.0f;
    return w > 0.0f ? w : 0.0f;
  };
  double mine = 0.0;
  int32_t last = -1;
  for (int32_t i = begin; i < begin + 32; ++i) {
    const float w = weight(i);
    mine += w;
    if (w > 0.0f) last = i;
  }
  double until = mine;
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const double other = __shfl_up_sync(kFullWarp, until, by);
    if (lane >= by) until += other;
  }
  // Rounding may let the chunk end before the target: its last candidate is the answer then.
  const unsigned reaching = __ballot_sync(kFullWarp, until > target);
  const unsigned filled = __ballot_sync(kFullWarp, last >= 0);
  const int winner =
      reaching ? __ffs(static_cast<int>(reaching)) - 1 : 31 - __clz(static_cast<int>(filled));
  if (reaching && lane == winner) {
    double sum = until - mine;
    for (int32_t i = begin; i < begin + 32; ++i) {
      const float w = weight(i);
      if (w <= 0.0f) continue;
      last = i;
      sum += w;
      if (sum > target) break;
    }
  }
  return __shfl_sync(kFullWarp, last, winner);
}

// Of all tokens; `uniform` as of the row. The token is thread 0's.
__device__ int32_t draw_of_all(Shared* shared, const RowWeights& weights, int32_t n, float top_p,
                               double uniform, float* list) {
  float threshold = 0.0f;
  if (top_p < 1.0f) {
    threshold = sum_top_p(shared, weights, n, top_p, list);
  } else {
    sum_chunks(
        shared, n, [&](int32_t i) { return weights.row(i); },
        [&](int32_t, float x) { return weights.of(x); });
  }
  return draw(shared, n, uniform, [&](int32_t i) {
    const float w = weights(i);
    return w >= threshold ? w : 0.0f;
  });
}

// Of those listed, whose logits become weights.
__device__ int32_t draw_of_listed(Shared* shared, const RowWeights& weights, int32_t size,
                                  float top_p, double uniform, const Lists& lists) {
  const auto listed = [&](int32_t i) { return load_global(lists.values + i); };
  sum_chunks(shared, size, listed, [&](int32_t i, float x) {
    const float w = weights.of(x);
    store_global(lists.values + i, w);
    return w;
  });
  float threshold = 0.0f;
  if (top_p < 1.0f) {
    const double total = sum_of_chunks(*shared, size);
    threshold = mass_threshold(shared, lists.values, size, top_p * total, total);
    sum_chunks(shared, size, listed, [&](int32_t, float w) { return w >= threshold ? w : 0.0f; });
  }
  const int32_t index = draw(shared, size, uniform, [&](int32_t i) {
    const float w = listed(i);
    return w >= threshold ? w : 0.0f;
  });
  return threadIdx.x == 0 && index >= 0 ? load_global(lists.ids + index) : -1;
}

__global__ void __launch_bounds__(kThreads, 1) sample_kernel(SampleArgs a) {
  Shared* const shared = reinterpret_cast<Shared*>(dynamic_shared());
  const int64_t at = blockIdx.x;
  const int32_t n = a.vocab_size;
  const Row row{a.logits + at * a.stride, shared->sums + num_chunks(n), a.num_kept};
  const Lists lists{a.values + at * n, a.ids + at * n, (n + kThreads - 1) / kThreads * 32};
  const float greatest = greatest_of_block(shared, keep_and_find_greatest(row, n));
  const float temperature = load_global(a.rows.temperature + at);
  if (greatest == -INFINITY || greatest == INFINITY || temperature == 0.0f) {
    const int32_t token = greatest == -INFINITY ? -1 : find_first(shared, row, n, greatest);
    if (threadIdx.x == 0) store_global(a.tokens + at, token);
    return;
  }
  const int32_t top_k = load_global(a.rows.top_k + at);
  const float min_p = load_global(a.rows.min_p + at), top_p = load_global(a.rows.top_p + at);
  const bool has_top_k = top_k > 0 && top_k < n;
  const float scale = __fmul_rn(1.0f / fmaxf(temperature, 1e-30f), 1.44269504f);
  const RowWeights weights{row, greatest, scale};
  const double uniform = uniform_of(static_cast<uint64_t>(load_global(a.rows.seeds + at)),
                                    static_cast<uint64_t>(load_global(a.rows.positions + at)));
  int32_t token;
  if (has_top_k || min_p > 0.0f) {
    float bound = -INFINITY;
    if (min_p > 0.0f) {
      const float log_p = static_cast<float>(log(static_cast<double>(min_p)));
      bound = __fadd_rn(greatest, __fmul_rn(temperature, log_p));
    }
    const int32_t size = keep_top_k(shared, row, n, has_top_k ? top_k : n, bound, lists);
    token = draw_of_listed(shared, weights, size, top_p, uniform, lists);
  } else {
    token = draw_of_all(shared, weights, n, top_p, uniform, lists.values);
  }
  if (threadIdx.x == 0) store_global(a.tokens + at, token);
}

// ---- log probabilities

struct LogprobArgs {
  const float* logits;
  int64_t stride;
  int32_t vocab_size;
  const int32_t* tokens;
  int32_t k;
  float* values;  // as SampleArgs
  int32_t* ids;
  int32_t* out_ids;     // [rows][1 + k]
  float* out_logprobs;  // [rows][1 + k]
  int32_t* out_ranks;   // [rows]
  int32_t num_kept;
};

__global__ void __launch_bounds__(kThreads, 1) logprob_kernel(LogprobArgs a) {
  Shared* const shared = reinterpret_cast<Shared*>(dynamic_shared());
  const int64_t row = blockIdx.x;
  const int32_t n = a.vocab_size;
  const Row logits{a.logits + row * a.stride, shared->sums + num_chunks(n), a.num_kept};
  const Lists lists{a.values + row * n, a.ids + row * n, (n + kThreads - 1) / kThreads * 32};
  const float largest = 3.402823466e38f;
  // +inf is certain: as the largest number, of which there are few enough.
  const float greatest =
      fminf(greatest_of_block(shared, keep_and_find_greatest(logits, n)), largest);
  const auto logit = [&](int32_t i) {
    const float x = logits(i);
    return x > largest ? largest : x > -INFINITY ? x : -INFINITY;  // NaN: impossible
  };
  const int32_t token = load_global(a.tokens + row);
  const float chosen = token >= 0 && token < n ? logit(token) : -INFINITY;
  int32_t above = 0;  // of this thread's logits
  sum_chunks(shared, n, logit, [&](int32_t, float x) {
    above += x > chosen;
    return exp2_of_negative(__fmul_rn(__fadd_rn(x, -greatest), 1.44269504f));
  });
  const double log_sum = log(sum_of_chunks(*shared, n));
  const auto logprob = [&](float x) {
    return x == -INFINITY ? -INFINITY
                          : static_cast<float>(static_cast<double>(x) - greatest - log_sum);
  };

  int32_t* const out_ids = a.out_ids + row * (1 + a.k);
  float* const out_logprobs = a.out_logprobs + row * (1 + a.k);
  if (threadIdx.x == 0) {
    shared->first = 0;
    store_global(out_ids, token);
    store_global(out_logprobs, logprob(chosen));
  }
  __syncthreads();
  if (above > 0) atomicAdd(&shared->first, above);
  __syncthreads();
  if (threadIdx.x == 0) store_global(a.out_ranks + row, 1 + shared->first);
  __syncthreads();
  if (a.k == 0) return;

  const int32_t size = keep_top_k(shared, logits, n, a.k, -INFINITY, lists);
  // The next one each time, of those that are left; the lower id first.
  float last = INFINITY;
  int32_t last_id = -1;
  for (int32_t i = 0; i < a.k; ++i) {
    if (threadIdx.x == 0) {
      shared->key = 0;
      shared->first = n;
    }
    __syncthreads();
    uint32_t best = 0;
    const auto left = [&](float x, int32_t id) { return x < last || (x == last && id > last_id); };
    for (int32_t c = threadIdx.x; c < size; c += kThreads) {
      const float x = load_global(lists.values + c);
      if (left(x, load_global(lists.ids + c))) best = max(best, key_of(x));
    }
    if (best > 0) atomicMax(&shared->key, best);
    __syncthreads();
    const uint32_t key = shared->key;
    for (int32_t c = threadIdx.x; c < size && key > 0; c += kThreads) {
      const float x = load_global(lists.values + c);
      const int32_t id = load_global(lists.ids + c);
      if (key_of(x) == key && left(x, id)) atomicMin(&shared->first, id);
    }
    __syncthreads();
    last = value_of(key);
    last_id = shared->first;
    if (threadIdx.x == 0) {
      // Fewer than k are possible: the rest is no token.
      store_global(out_ids + 1 + i, key > 0 ? last_id : -1);
      store_global(out_logprobs + 1 + i, key > 0 ? logprob(fminf(last, largest)) : -INFINITY);
    }
    if (key == 0) last = -INFINITY;
    __syncthreads();
  }
}

// Without logits that are kept.
size_t shared_bytes(int32_t vocab_size) {
  return sizeof(Shared) + sizeof(float) * static_cast<size_t>(num_chunks(vocab_size));
}

// How many of a row's logits are kept in shared memory: all, or whole chunks.
int32_t num_kept(int32_t vocab_size) {
  const auto room = static_cast<int32_t>(
      (static_cast<size_t>(max_shared_bytes()) - shared_bytes(vocab_size)) / sizeof(float));
  return vocab_size <= room ? vocab_size : room / kChunk * kChunk;
}

}  // namespace

int64_t sampling_workspace_size(int64_t rows, int64_t vocab_size) { return 2 * rows * vocab_size; }

void sample(const Rows& logits, const SamplingRows& rows, float* workspace, int32_t* tokens,
            Stream stream) {
  check_vocabulary(logits);
  const auto n = static_cast<int32_t>(logits.cols);
  const SampleArgs a{logits.as<const float>(),
                     logits.stride,
                     n,
                     rows,
                     workspace,
                     reinterpret_cast<int32_t*>(workspace + logits.rows * n),
                     tokens,
                     num_kept(n)};
  launch("sample", sample_kernel, dim3(static_cast<unsigned>(logits.rows)), kThreads,
         shared_bytes(n) + sizeof(float) * static_cast<size_t>(a.num_kept), stream, a);
}

void logprobs(const Rows& logits, const int32_t* tokens, int32_t k, float* workspace,
              int32_t* out_ids, float* out_logprobs, int32_t* out_ranks, Stream stream) {
  check_vocabulary(logits);
  check(k >= 0 && k <= logits.cols, "k", "must be between 0 and the vocabulary's size");
  const auto n = static_cast<int32_t>(logits.cols);
  const LogprobArgs a{logits.as<const float>(),
                      logits.stride,
                      n,
                      tokens,
                      k,
                      workspace,
                      reinterpret_cast<int32_t*>(workspace + logits.rows * n),
                      out_ids,
                      out_logprobs,
                      out_ranks,
                      num_kept(n)};
  launch("logprobs", logprob_kernel, dim3(static_cast<unsigned>(logits.rows)), kThreads,
         shared_bytes(n) + sizeof(float) * static_cast<size_t>(a.num_kept), stream, a);
}

}  // namespace fastpage::cuda
