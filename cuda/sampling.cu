// From logits to tokens, as cpp/src/core/sampling does it on the CPU, so that the same seed draws
// the same token from the same logits. Weights are the same to the bit: the same polynomial, no
// contraction, and sums over the same 32 lanes of chunks of 1024. What may differ is a top_p
// threshold: masses are summed in fixed point here (2^-45, which no order of additions changes) and
// in fp32 there, so that a token whose place is within some 1e-6 of top_p may be on either side.
//
// A block takes a row and reads it twice: for the greatest logits, one a thread, of which the k-th
// is a bound below which no logit is among the first k, and for those above that bound. What is
// left is few, unless neither top_k nor min_p is asked for.
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
};

// What a block shares.
struct Shared {
  unsigned long long bins[kBins];
  float greatest[kThreads];  // of each thread's logits
  int32_t counts[kWarps];
  int32_t size;
  uint32_t key;
  double target;
  int32_t first;
  float sums[1];  // of each chunk
};

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

// The greatest key such that the amounts of those at or above it reach `target`; 0 if they never
// do. for_each(fn) calls fn(key, amount) for the thread's share.
template <typename ForEach>
__device__ uint32_t select_key(Shared* shared, unsigned long long target, ForEach for_each) {
  uint32_t prefix = 0, mask = 0;
  unsigned long long above = 0;
  for (int round = 0; round < 3; ++round) {
    const int shift = round == 0 ? 21 : round == 1 ? 10 : 0;
    const uint32_t digit_mask = round == 2 ? 0x3ffu : 0x7ffu;
    for (int i = threadIdx.x; i < kBins; i += kThreads) shared->bins[i] = 0;
    __syncthreads();
    for_each([&](uint32_t key, unsigned long long amount) {
      if ((key & mask) == prefix) atomicAdd(&shared->bins[key >> shift & digit_mask], amount);
    });
    __syncthreads();
    if (threadIdx.x < 32) {
      // Lane 0 has the highest bins.
      constexpr int kEach = kBins / 32;
      const int lane = static_cast<int>(threadIdx.x);
      const int top = kBins - 1 - lane * kEach;
      unsigned long long sum = 0;
      for (int i = 0; i < kEach; ++i) sum += shared->bins[top - i];
      unsigned long long before = sum;
#pragma unroll
      for (int by = 1; by < 32; by *= 2) {
        const unsigned long long other = __shfl_up_sync(kFullWarp, before, by);
        if (lane >= by) before += other;
      }
      before += above - sum;  // all that is above this lane's bins
      const bool reaches = before < target && before + sum >= target;
      if (__ballot_sync(kFullWarp, reaches) == 0 && lane == 0) shared->first = -1;
      __syncwarp();  // all lanes have read their bins, of which bins[0] is written to
      if (reaches) {
        int bin = top;
        while (before + shared->bins[bin] < target) before += shared->bins[bin--];
        shared->first = bin;
        shared->bins[0] = before;  // read below; nobody needs the bins any more
      }
    }
    __syncthreads();
    const int bin = shared->first;
    above = shared->bins[0];
    __syncthreads();
    if (bin < 0) return 0;
    prefix |= static_cast<uint32_t>(bin) << shift;
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
  if (threadIdx.x % 32 == 0) shared->bins[threadIdx.x / 32] = __float_as_uint(best);
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) {
    best = fmaxf(best, __uint_as_float(static_cast<uint32_t>(shared->bins[i])));
  }
  __syncthreads();
  return best;
}

// The lowest id with this logit.
__device__ int32_t find_first(Shared* shared, const float* logits, int32_t n, float value) {
  if (threadIdx.x == 0) shared->first = n;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += kThreads) {
    if (load_global(logits + i) == value) atomicMin(&shared->first, i);
  }
  __syncthreads();
  return shared->first;
}

// This thread's greatest logit; a NaN is none.
__device__ __forceinline__ float greatest_of_thread(const float* logits, int32_t n) {
  float best = -INFINITY;
#pragma unroll kBatch
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const float x = load_global(logits + i);
    best = x > best ? x : best;
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

__device__ void list_from(Shared* shared, const float* logits, int32_t n, float bound,
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
      x[b] = i < end ? load_global(logits + i) : -INFINITY;
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
// lists; returns their number. shared->greatest holds what greatest_of_thread() gave.
__device__ int32_t keep_top_k(Shared* shared, const float* logits, int32_t n, int32_t k,
                              float bound, const Lists& lists) {
  const float lowest = -3.402823466e38f;
  bound = fmaxf(bound, lowest);
  if (k <= kThreads / 2) {
    // At least k logits are as great as the k-th of the threads' greatest.
    const uint32_t key = select_key(shared, static_cast<unsigned long long>(k), [&](auto count) {
      count(key_of(shared->greatest[threadIdx.x]), 1ull);
    });
    bound = fmaxf(bound, value_of(key));
  }
  list_from(shared, logits, n, bound, lists);
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

// sums[c] = the sum over chunk c of f(i), a warp a chunk.
template <typename F>
__device__ void sum_chunks(Shared* shared, int32_t n, F f) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x) / 32;
  const int chunks = (n + kChunk - 1) / kChunk;
  __syncthreads();
  for (int chunk = warp; chunk < chunks; chunk += kWarps) {
    float sum = 0.0f;
    for (int i = 0; i < kChunk; i += 32) {
      const int32_t at = chunk * kChunk + i + lane;
      if (at < n) sum = __fadd_rn(sum, f(at));
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
  for (int i = 0; i < (n + kChunk - 1) / kChunk; ++i) total += shared.sums[i];
  return total;
}

// The greatest weight t such that all weights >= t together reach `mass` of `total`.
__device__ float mass_threshold(Shared* shared, const float* weights, int32_t n, double mass,
                                double total) {
  const auto low = static_cast<float>((total - mass) / static_cast<double>(n) / 2);
  constexpr double kUnit = 35184372088832.0;  // 2^45: 2^18 weights of 1 fit
  const auto target = static_cast<unsigned long long>(mass * kUnit);
  const uint32_t key = select_key(shared, target > 0 ? target : 1, [&](auto count) {
    for (int32_t i = threadIdx.x; i < n; i += kThreads) {
      const float w = load_global(weights + i);
      if (w >= low && w > 0.0f) {
        count(__float_as_uint(w), static_cast<unsigned long long>(static_cast<double>(w) * kUnit));
      }
    }
  });
  return key == 0 ? low : __uint_as_float(key);
}

// The first weight >= threshold at which the running sum exceeds the target.
__device__ int32_t draw(Shared* shared, const float* weights, int32_t n, float threshold,
                        double uniform) {
  if (threadIdx.x == 0) {
    const int chunks = (n + kChunk - 1) / kChunk;
    const double target = uniform * sum_of_chunks(*shared, n);
    double below = 0.0;
    int chunk = 0;
    for (int c = 0; c < chunks; ++c) {
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
    const float w = i < n ? load_global(weights + i) : 0.0f;
    return w > 0.0f && w >= threshold ? w : 0.0f;
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

__global__ void __launch_bounds__(kThreads) sample_kernel(SampleArgs a) {
  Shared* const shared = reinterpret_cast<Shared*>(dynamic_shared());
  const int64_t row = blockIdx.x;
  const int32_t n = a.vocab_size;
  const float* const logits = a.logits + row * a.stride;
  const Lists lists{a.values + row * n, a.ids + row * n, (n + kThreads - 1) / kThreads * 32};
  const float greatest = greatest_of_block(shared, greatest_of_thread(logits, n));
  const float temperature = load_global(a.rows.temperature + row);
  if (greatest == -INFINITY || greatest == INFINITY || temperature == 0.0f) {
    const int32_t token = greatest == -INFINITY ? -1 : find_first(shared, logits, n, greatest);
    if (threadIdx.x == 0) store_global(a.tokens + row, token);
    return;
  }
  const int32_t top_k = load_global(a.rows.top_k + row);
  const float min_p = load_global(a.rows.min_p + row), top_p = load_global(a.rows.top_p + row);
  const bool has_top_k = top_k > 0 && top_k < n;
  const bool all = !has_top_k && min_p <= 0.0f;
  int32_t size = n;
  if (!all) {
    float bound = -INFINITY;
    if (min_p > 0.0f) {
      const float log_p = static_cast<float>(log(static_cast<double>(min_p)));
      bound = __fadd_rn(greatest, __fmul_rn(temperature, log_p));
    }
    size = keep_top_k(shared, logits, n, has_top_k ? top_k : n, bound, lists);
  }
  // As on the CPU, the list of everything is the vocabulary itself.
  const float* const from = size == n ? logits : lists.values;
  const float scale = __fmul_rn(1.0f / fmaxf(temperature, 1e-30f), 1.44269504f);
  sum_chunks(shared, size, [&](int32_t i) {
    const float w = exp2_of_negative(__fmul_rn(__fadd_rn(load_global(from + i), -greatest), scale));
    store_global(lists.values + i, w);
    return w;
  });
  float threshold = 0.0f;
  if (top_p < 1.0f) {
    const double total = sum_of_chunks(*shared, size);
    threshold = mass_threshold(shared, lists.values, size, top_p * total, total);
    sum_chunks(shared, size, [&](int32_t i) {
      const float w = load_global(lists.values + i);
      return w >= threshold ? w : 0.0f;
    });
  }
  const double uniform = uniform_of(static_cast<uint64_t>(load_global(a.rows.seeds + row)),
                                    static_cast<uint64_t>(load_global(a.rows.positions + row)));
  const int32_t index = draw(shared, lists.values, size, threshold, uniform);
  if (threadIdx.x == 0) {
    store_global(a.tokens + row, size == n ? index : load_global(lists.ids + index));
  }
}

// ---- what changes logits

struct ProcessArgs {
  float* logits;
  int64_t stride;
  int32_t vocab_size;
  LogitsRows rows;
};

// A block a row. Every step is over before the next begins; counts are zero before and after.
__global__ void __launch_bounds__(kThreads) process_kernel(ProcessArgs a) {
  const int64_t row = blockIdx.x;
  const int32_t n = a.vocab_size;
  float* const logits = a.logits + row * a.stride;
  const LogitsRows& r = a.rows;
  if (r.allowed != nullptr) {
    const uint32_t* const bits = r.allowed + row * ((n + 31) / 32);
    for (int i = threadIdx.x; i < n; i += kThreads) {
      if (!(load_global(bits + i / 32) >> (i % 32) & 1)) store_global(logits + i, -INFINITY);
    }
    __syncthreads();
  }
  if (r.bias_start != nullptr) {
    const int32_t end = load_global(r.bias_start + row + 1);
    for (int32_t i = load_global(r.bias_start + row) + threadIdx.x; i < end; i += kThreads) {
      const int32_t token = load_global(r.bias_ids + i);
      if (token < 0 || token >= n) continue;
      store_global(logits + token, load_global(logits + token) + load_global(r.bias + i));
    }
    __syncthreads();
  }
  if (r.token_start == nullptr) return;
  int32_t* const counts = r.counts + row * n;
  const int32_t begin = load_global(r.token_start + row),
                end = load_global(r.token_start + row + 1);
  const int32_t output = begin + load_global(r.num_prompt_tokens + row);
  const auto for_tokens = [&](int32_t first, auto fn) {
    for (int32_t i = first + threadIdx.x; i < end; i += kThreads) {
      const int32_t token = load_global(r.tokens + i);
      if (token >= 0 && token < n) fn(token);
    }
    __syncthreads();
  };
  const float repetition = load_global(r.repetition_penalty + row);
  if (repetition != 1.0f) {
    for_tokens(begin, [&](int32_t token) {
      if (atomicExch(counts + token, 1) != 0) return;  // once, however often it occurs
      const float x = load_global(logits + token);
      store_global(logits + token, x > 0.0f ? x / repetition : x * repetition);
    });
    for_tokens(begin, [&](int32_t token) { store_global(counts + token, 0); });
  }
  const float frequency = load_global(r.frequency_penalty + row);
  const float presence = load_global(r.presence_penalty + row);
  if (frequency == 0.0f && presence == 0.0f) return;
  for_tokens(output, [&](int32_t token) { atomicAdd(counts + token, 1); });
  for_tokens(output, [&](int32_t token) {
    const int32_t count = atomicExch(counts + token, 0);
    if (count == 0) return;
    const float x =
        __fadd_rn(load_global(logits + token), -__fmul_rn(frequency, static_cast<float>(count)));
    store_global(logits + token, __fadd_rn(x, -presence));
  });
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
};

__global__ void __launch_bounds__(kThreads) logprob_kernel(LogprobArgs a) {
  Shared* const shared = reinterpret_cast<Shared*>(dynamic_shared());
  const int64_t row = blockIdx.x;
  const int32_t n = a.vocab_size;
  const float* const logits = a.logits + row * a.stride;
  const Lists lists{a.values + row * n, a.ids + row * n, (n + kThreads - 1) / kThreads * 32};
  const float largest = 3.402823466e38f;
  // +inf is certain: as the largest number, of which there are few enough.
  const float greatest = fminf(greatest_of_block(shared, greatest_of_thread(logits, n)), largest);
  const auto logit = [&](int32_t i) {
    const float x = load_global(logits + i);
    return x > largest ? largest : x > -INFINITY ? x : -INFINITY;  // NaN: impossible
  };
  sum_chunks(shared, n, [&](int32_t i) {
    return exp2_of_negative(__fmul_rn(__fadd_rn(logit(i), -greatest), 1.44269504f));
  });
  const double log_sum = log(sum_of_chunks(*shared, n));
  const auto logprob = [&](float x) {
    return x == -INFINITY ? -INFINITY
                          : static_cast<float>(static_cast<double>(x) - greatest - log_sum);
  };

  const int32_t token = load_global(a.tokens + row);
  const float chosen = token >= 0 && token < n ? logit(token) : -INFINITY;
  int32_t* const out_ids = a.out_ids + row * (1 + a.k);
  float* const out_logprobs = a.out_logprobs + row * (1 + a.k);
  if (threadIdx.x == 0) {
    shared->first = 0;
    store_global(out_ids, token);
    store_global(out_logprobs, logprob(chosen));
  }
  __syncthreads();
  int32_t above = 0;
  for (int32_t i = threadIdx.x; i < n; i += kThreads) above += logit(i) > chosen;
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

size_t shared_bytes(int32_t vocab_size) {
  return sizeof(Shared) + sizeof(float) * static_cast<size_t>((vocab_size + kChunk - 1) / kChunk);
}

void check_logits(const Rows& logits) {
  check(logits.dtype == DType::kFloat32, logits.name, "must be float32");
  check(logits.cols > 0 && logits.cols <= (1 << 18), logits.name,
        "must have between 1 and 262144 columns");
}

}  // namespace

int64_t sampling_workspace_size(int64_t rows, int64_t vocab_size) { return 2 * rows * vocab_size; }

void sample(const Rows& logits, const SamplingRows& rows, float* workspace, int32_t* tokens,
            Stream stream) {
  check_logits(logits);
  const auto n = static_cast<int32_t>(logits.cols);
  const SampleArgs a{logits.as<const float>(),
                     logits.stride,
                     n,
                     rows,
                     workspace,
                     reinterpret_cast<int32_t*>(workspace + logits.rows * n),
                     tokens};
  launch("sample", sample_kernel, dim3(static_cast<unsigned>(logits.rows)), kThreads,
         shared_bytes(n), stream, a);
}

void process_logits(const Rows& logits, const LogitsRows& rows, Stream stream) {
  check_logits(logits);
  const ProcessArgs a{logits.as<float>(), logits.stride, static_cast<int32_t>(logits.cols), rows};
  launch("process_logits", process_kernel, dim3(static_cast<unsigned>(logits.rows)), kThreads, 0,
         stream, a);
}

void logprobs(const Rows& logits, const int32_t* tokens, int32_t k, float* workspace,
              int32_t* out_ids, float* out_logprobs, int32_t* out_ranks, Stream stream) {
  check_logits(logits);
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
                      out_ranks};
  launch("logprobs", logprob_kernel, dim3(static_cast<unsigned>(logits.rows)), kThreads,
         shared_bytes(n), stream, a);
}

}  // namespace fastpage::cuda
