// What moves keys and values: into the cache, within it, and between it and the host.
#include <algorithm>
#include <vector>

#include "cuda/launch.cuh"

namespace fastpage::cuda {

namespace {

// Where a slot's first head lies, in elements; -1: nowhere.
__device__ __forceinline__ int64_t slot_offset(const KvCache& cache, int32_t slot) {
  if (slot < 0) return -1;
  const int32_t block = slot / cache.block_size;
  if (block >= cache.num_blocks) return -1;
  return block * cache.block_stride + (slot - block * cache.block_size) * cache.token_stride;
}

// The vectors of T that become one of the cache.
template <typename T, typename C>
struct Item {
  static constexpr int kSize = Vector<C>::kSize;
  static constexpr int kParts = kSize / Vector<T>::kSize;
  Vector<T> parts[kParts];
};

template <typename T, typename C>
__device__ __forceinline__ Item<T, C> load_item(const T* from) {
  Item<T, C> x;
#pragma unroll
  for (int i = 0; i < x.kParts; ++i) x.parts[i] = load_vector(from + i * Vector<T>::kSize);
  return x;
}

// x / scale, of 16-bit x and as far as float8 can tell: to the bit where the quotient is neither
// tiny nor huge, in four instructions instead of a dozen and a branch (Markstein 1990).
struct Quotient {
  float scale, inverse;

  explicit __device__ Quotient(float s) : scale(s), inverse(fminf(1.0f / s, 3.402823466e38f)) {}
  __device__ float operator()(float x) const {
    const float near = x * inverse;
    const float right = fmaf(fmaf(-near, scale, x), inverse, near);
    return fabsf(near) > 0x1p-100f && fabsf(near) < 0x1p100f ? right : near;
  }
};

// New values to the cache; into float8, the quotient by `scale` is what is rounded.
template <typename T, typename C>
__device__ __forceinline__ void store_item(C* to, const Item<T, C>& x, float scale) {
  Vector<C> y;
  if constexpr (sizeof(T) == sizeof(C)) {
    y.words = x.parts[0].words;
  } else {
    constexpr int kEach = Vector<T>::kSize;
    const Quotient quotient(scale);
#pragma unroll
    for (int i = 0; i < x.kSize; ++i) {
      y.elements[i] = from_float<C>(quotient(to_float(x.parts[i / kEach].elements[i % kEach])));
    }
  }
  store_vector(to, y);
}

__device__ __forceinline__ float head_scale(const float* scales, int head) {
  return scales != nullptr ? load_global(scales + head) : 1.0f;
}

struct CacheWrite {
  const void* k;
  const void* v;
  int64_t k_stride, v_stride;  // elements
  const int32_t* slot_mapping;
  int64_t rows;
  KvCache cache;
};

constexpr int kWriteThreads = 128;

// A thread takes 16 bytes of the cache, of k and of v, of two tokens: all loads are before the
// first store.
template <typename T, typename C>
__global__ void __launch_bounds__(kWriteThreads) reshape_and_cache_kernel(CacheWrite w) {
  constexpr int kSize = Item<T, C>::kSize;
  const int per_head = w.cache.head_dim / kSize;
  const int per_row = w.cache.num_kv_heads * per_head;
  const int64_t row = int64_t{blockIdx.x} * 2;
  const bool has_second = row + 1 < w.rows;
  const int64_t slot[2] = {
      slot_offset(w.cache, load_global(w.slot_mapping + row)),
      has_second ? slot_offset(w.cache, load_global(w.slot_mapping + row + 1)) : -1};
  for (int i = threadIdx.x; i < per_row; i += kWriteThreads) {
    const T* const k = static_cast<const T*>(w.k) + row * w.k_stride + i * kSize;
    const T* const v = static_cast<const T*>(w.v) + row * w.v_stride + i * kSize;
    Item<T, C> keys[2], values[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (slot[r] < 0) continue;
      keys[r] = load_item<T, C>(k + r * w.k_stride);
      values[r] = load_item<T, C>(v + r * w.v_stride);
    }
    const int head = i / per_head;
    const int64_t within = head * w.cache.head_stride + (i - head * per_head) * kSize;
    const float k_scale = head_scale(w.cache.k_scale, head);
    const float v_scale = head_scale(w.cache.v_scale, head);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (slot[r] < 0) continue;
      store_item<T, C>(static_cast<C*>(w.cache.k) + slot[r] + within, keys[r], k_scale);
      store_item<T, C>(static_cast<C*>(w.cache.v) + slot[r] + within, values[r], v_scale);
    }
  }
}

// ---- rotary

struct RotaryWrite {
  const void* q;
  const void* k;  // null: only q is turned
  const void* v;
  void* rotated_q;
  int64_t q_stride, k_stride, v_stride, rotated_stride;
  const int32_t* positions;
  const int32_t* slot_mapping;
  const float* cos_sin;
  int64_t cos_sin_stride;
  int32_t max_position;
  int32_t rotary_dim;
  int32_t num_heads;
  int32_t head_dim;
  KvCache cache;
  HeadNorms norms;
};

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Few {
  T elements[kWidth];
};

// kWidth elements that lie together; into float8, the quotients by `scale` are what is rounded.
template <typename T, typename C, int kWidth>
__device__ __forceinline__ void store_few(C* to, const float (&x)[kWidth], float scale) {
  Few<C, kWidth> y;
  const Quotient quotient(scale);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if constexpr (sizeof(T) == sizeof(C)) {
      y.elements[i] = from_float<C>(x[i]);
    } else {
      // As if it had been written to memory as T in between.
      y.elements[i] = from_float<C>(quotient(to_float(from_float<T>(x[i]))));
    }
  }
  store_global(reinterpret_cast<Few<C, kWidth>*>(to), y);
}

// 16 bytes at a time, if they are that many.
template <typename T, int kWidth>
__device__ __forceinline__ void load_few(const T* from, float (&x)[kWidth]) {
  constexpr int kEach = kWidth < Vector<T>::kSize ? kWidth : Vector<T>::kSize;
#pragma unroll
  for (int i = 0; i < kWidth; i += kEach) {
    const auto y = load_global(reinterpret_cast<const Few<T, kEach>*>(from + i));
#pragma unroll
    for (int e = 0; e < kEach; ++e) x[i + e] = to_float(y.elements[e]);
  }
}

// Each product rounded: left to the compiler, one kernel might fuse what another does not.
__device__ __forceinline__ float turned_low(float a, float b, float cos, float sin) {
  return __fadd_rn(__fmul_rn(a, cos), -__fmul_rn(b, sin));
}
__device__ __forceinline__ float turned_high(float a, float b, float cos, float sin) {
  return __fadd_rn(__fmul_rn(b, cos), __fmul_rn(a, sin));
}

// What a head's elements are multiplied by in its norm, before the weight; by a warp, in the order
// of norm_kernel (elementwise.cu), so that the bits are the same.
template <typename T>
__device__ __forceinline__ float norm_factor(const T* head, int head_dim, float eps) {
  constexpr int kWide = Vector<T>::kSize;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float sum = 0.0f;
  for (int i = lane * kWide; i < head_dim; i += 32 * kWide) {
    float x[kWide];
    load_few(head + i, x);
#pragma unroll
    for (int e = 0; e < kWide; ++e) sum = __fadd_rn(sum, __fmul_rn(x[e], x[e]));
  }
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(kFullWarp, sum, bits);
  return rsqrtf(sum / static_cast<float>(head_dim) + eps);
}

// A head as it is read: normed first, if it has a norm.
template <typename T, bool kNormed>
struct Head {
  const T* elements;
  const float* weight;
  float factor;

  template <int kWidth>
  __device__ __forceinline__ void load(int at, float (&x)[kWidth]) const {
    load_few(elements + at, x);
    if (!kNormed) return;
    float by[kWidth];
    load_few(weight + at, by);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      // As if it had been written to memory as T in between.
      x[i] = to_float(from_float<T>(__fmul_rn(__fmul_rn(x[i], factor), by[i])));
    }
  }
};

// One work item of a head: kWidth elements, or (NeoX) two such groups that are turned together.
// write(offset in the head, values).
template <int kWidth, bool kNeox, typename Head, typename Write>
__device__ __forceinline__ void rotate_item(const RotaryWrite& w, const Head& head, int item,
                                            const float* cos, const float* sin, Write write) {
  const int half = w.rotary_dim / 2;
  float a[kWidth], b[kWidth], c[kWidth], s[kWidth];
  if (kNeox) {
    const int pairs = half / kWidth;
    if (item >= pairs) {
      const int at = (item + pairs) * kWidth;
      head.load(at, a);
      return write(at, a);
    }
    const int at = item * kWidth;
    head.load(at, a);
    head.load(at + half, b);
    load_few(cos + at, c);
    load_few(sin + at, s);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float low = turned_low(a[i], b[i], c[i], s[i]);
      b[i] = turned_high(a[i], b[i], c[i], s[i]);
      a[i] = low;
    }
    write(at, a);
    write(at + half, b);
  } else {
    const int at = item * kWidth;
    head.load(at, a);
    if (at < w.rotary_dim) {
#pragma unroll
      for (int i = 0; i + 1 < kWidth; i += 2) {
        const float cosine = load_global(cos + (at + i) / 2),
                    sine = load_global(sin + (at + i) / 2);
        const float low = turned_low(a[i], a[i + 1], cosine, sine);
        a[i + 1] = turned_high(a[i], a[i + 1], cosine, sine);
        a[i] = low;
      }
    }
    write(at, a);
  }
}

constexpr int kRotaryThreads = 256;

// A block takes a token: the heads of q, and those of k and v if there is a cache. kWidth,
// kCacheWidth: elements of an item of q, and of k.
template <typename T, typename C, int kWidth, int kCacheWidth, bool kNeox, bool kNormed>
__global__ void __launch_bounds__(kRotaryThreads) rotary_kernel(RotaryWrite w) {
  const int64_t row = blockIdx.x;
  const int32_t position = min(max(load_global(w.positions + row), 0), w.max_position - 1);
  const float* const cos = w.cos_sin + position * w.cos_sin_stride;
  const float* const sin = cos + w.rotary_dim / 2;
  // NeoX: a pair of items is one.
  const int items = kNeox ? w.head_dim - w.rotary_dim / 2 : w.head_dim;

  const T* const q = static_cast<const T*>(w.q) + row * w.q_stride;
  const T* const k = static_cast<const T*>(w.k) + row * w.k_stride;
  T* const rotated = static_cast<T*>(w.rotated_q) + row * w.rotated_stride;
  float* const factors = reinterpret_cast<float*>(dynamic_shared());  // of q's heads, then k's
  if (kNormed) {
    const int heads = w.num_heads + w.cache.num_kv_heads;
    for (int i = static_cast<int>(threadIdx.x) / 32; i < heads; i += kRotaryThreads / 32) {
      const T* const head =
          i < w.num_heads ? q + int64_t{i} * w.head_dim : k + int64_t{i - w.num_heads} * w.head_dim;
      const float factor = norm_factor(head, w.head_dim, w.norms.eps);
      if (threadIdx.x % 32 == 0) factors[i] = factor;
    }
    __syncthreads();
  }
  const int per_head = items / kWidth;
  for (int i = threadIdx.x; i < w.num_heads * per_head; i += kRotaryThreads) {
    const int head = i / per_head;
    const int64_t first = int64_t{head} * w.head_dim;
    rotate_item<kWidth, kNeox>(
        w, Head<T, kNormed>{q + first, w.norms.q_weight, kNormed ? factors[head] : 1.0f},
        i - head * per_head, cos, sin,
        [&](int at, const float (&x)[kWidth]) { store_few<T>(rotated + first + at, x, 1.0f); });
  }
  if (w.k == nullptr) return;
  const int64_t slot = slot_offset(w.cache, load_global(w.slot_mapping + row));
  if (slot < 0) return;
  C* const keys = static_cast<C*>(w.cache.k) + slot;
  const int per_key = items / kCacheWidth;
  for (int i = threadIdx.x; i < w.cache.num_kv_heads * per_key; i += kRotaryThreads) {
    const int head = i / per_key;
    const float scale = head_scale(w.cache.k_scale, head);
    C* const to = keys + head * w.cache.head_stride;
    rotate_item<kCacheWidth, kNeox>(
        w,
        Head<T, kNormed>{k + int64_t{head} * w.head_dim, w.norms.k_weight,
                         kNormed ? factors[w.num_heads + head] : 1.0f},
        i - head * per_key, cos, sin,
        [&](int at, const float (&x)[kCacheWidth]) { store_few<T>(to + at, x, scale); });
  }
  const T* const v = static_cast<const T*>(w.v) + row * w.v_stride;
  C* const values = static_cast<C*>(w.cache.v) + slot;
  constexpr int kSize = Item<T, C>::kSize;
  const int per_value = w.head_dim / kSize;
  for (int i = threadIdx.x; i < w.cache.num_kv_heads * per_value; i += kRotaryThreads) {
    const int head = i / per_value;
    store_item<T, C>(values + head * w.cache.head_stride + (i - head * per_value) * kSize,
                     load_item<T, C>(v + i * kSize), head_scale(w.cache.v_scale, head));
  }
}

template <typename T, typename C, bool kNormed>
void launch_rotary(const char* name, const RotaryWrite& w, ops::RotaryStyle style, int64_t rows,
                   Stream stream) {
  constexpr int kWide = Vector<T>::kSize, kCacheWide = Vector<C>::kSize;
  const bool neox = style == ops::RotaryStyle::kNeox;
  // The table is read in vectors, too.
  const bool table_fits =
      reinterpret_cast<uintptr_t>(w.cos_sin) % 16 == 0 && w.cos_sin_stride % 4 == 0;
  const auto fits = [&](int width) {
    return neox ? w.rotary_dim / 2 % width == 0 && table_fits : w.rotary_dim % width == 0;
  };
  const dim3 grid(static_cast<unsigned>(rows));
  const int32_t heads = kNormed ? w.num_heads + w.cache.num_kv_heads : 0;
  const auto run = [&](auto kernel) {
    launch(name, kernel, grid, kRotaryThreads, sizeof(float) * heads, stream, w);
  };
  // Whole vectors of the cache, or of T, or else pairs: of single elements (NeoX), of two that lie
  // together.
  if (neox) {
    if (fits(kCacheWide)) return run(rotary_kernel<T, C, kWide, kCacheWide, true, kNormed>);
    if (fits(kWide)) return run(rotary_kernel<T, C, kWide, kWide, true, kNormed>);
    return run(rotary_kernel<T, C, 1, 1, true, kNormed>);
  }
  if (fits(kCacheWide)) return run(rotary_kernel<T, C, kWide, kCacheWide, false, kNormed>);
  if (fits(kWide)) return run(rotary_kernel<T, C, kWide, kWide, false, kNormed>);
  run(rotary_kernel<T, C, 2, 2, false, kNormed>);
}

RotaryWrite rotary_write(const Rows& q, const int32_t* positions, const Rows& cos_sin,
                         int64_t head_dim, const Rows& rotated_q) {
  check(head_dim > 0 && head_dim % 8 == 0 && q.cols % head_dim == 0, "q",
        "must have heads of head_dim columns, a multiple of 8");
  check_vectorized(q);
  check_rows(rotated_q, q.rows, q.cols);
  check(rotated_q.dtype == q.dtype, rotated_q.name, "must be of the type of q");
  check_vectorized(rotated_q);
  check(cos_sin.dtype == DType::kFloat32 && cos_sin.rows > 0, "cos_sin",
        "must be float32 and not empty");
  check(cos_sin.cols > 0 && cos_sin.cols % 2 == 0 && cos_sin.cols <= head_dim, "cos_sin",
        "must have an even number of columns, at most head_dim");
  RotaryWrite w{};
  w.q = q.data;
  w.q_stride = q.stride;
  w.rotated_q = rotated_q.data;
  w.rotated_stride = rotated_q.stride;
  w.positions = positions;
  w.cos_sin = cos_sin.as<const float>();
  w.cos_sin_stride = cos_sin.stride;
  w.max_position = static_cast<int32_t>(cos_sin.rows);
  w.rotary_dim = static_cast<int32_t>(cos_sin.cols);
  w.num_heads = static_cast<int32_t>(q.cols / head_dim);
  w.head_dim = static_cast<int32_t>(head_dim);
  return w;
}

void check_new_tokens(const Rows& k, const Rows& v, const KvCache& cache) {
  check_cache(cache);
  const int64_t cols = int64_t{cache.num_kv_heads} * cache.head_dim;
  check_rows(k, k.rows, cols);
  check_rows(v, k.rows, cols);
  check(v.dtype == k.dtype, "v", "must be of the type of k");
  check_cached_type(k, cache);
  check_vectorized(k);
  check_vectorized(v);
}

// fn(Type<T>, Type<C>) for new tokens of `dtype` and a cache.
template <typename Fn>
void with_cache_types(DType dtype, const KvCache& cache, Fn fn) {
  if (cache.dtype == DType::kUInt8) {
    with_half_type(dtype, "k", [&](auto type) { fn(type, Type<Float8>{}); });
  } else {
    with_float_type(dtype, "k", [&](auto type) { fn(type, type); });
  }
}

// ---- whole blocks

constexpr int kMaxPairs = 256;  // a kernel's parameters are at most 4 KB
struct Pairs {
  int32_t from[kMaxPairs];
  int32_t to[kMaxPairs];
};
constexpr int kCopyThreads = 256;
constexpr int kUnroll = 4;

// x: parts of a block, y: pairs, z: layers.
__global__ void __launch_bounds__(kCopyThreads)
    copy_blocks_kernel(BlockMemory from, BlockMemory to, Pairs pairs, int num_pairs) {
  const int64_t vectors = from.bytes / 16;
  const int64_t step = int64_t{gridDim.x} * kCopyThreads;
  for (int pair = blockIdx.y; pair < num_pairs; pair += gridDim.y) {
    const auto* const source = reinterpret_cast<const uint4*>(static_cast<const char*>(from.data) +
                                                              blockIdx.z * from.layer_stride +
                                                              pairs.from[pair] * from.block_stride);
    auto* const target =
        reinterpret_cast<uint4*>(static_cast<char*>(to.data) + blockIdx.z * to.layer_stride +
                                 pairs.to[pair] * to.block_stride);
    for (int64_t i = int64_t{blockIdx.x} * kCopyThreads + threadIdx.x; i < vectors;
         i += step * kUnroll) {
      uint4 x[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (i + u * step < vectors) x[u] = load_global(source + i + u * step);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (i + u * step < vectors) store_global(target + i + u * step, x[u]);
      }
    }
  }
}

void check_memory(const BlockMemory& memory, const char* name) {
  for (const int64_t bytes : {memory.layer_stride, memory.block_stride, memory.bytes,
                              static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory.data))}) {
    check(bytes % 16 == 0, name, "must have blocks that begin and end on 16 bytes");
  }
  check(memory.bytes > 0 && memory.num_layers > 0, name, "is empty");
}

void check_block(const BlockMemory& memory, const char* name, int32_t block) {
  check(block >= 0 && block < memory.num_blocks, name,
        "has no block " + std::to_string(block) + " (" + std::to_string(memory.num_blocks) + ")");
}

void launch_copy(const char* name, const BlockMemory& from, const BlockMemory& to,
                 const Pairs& pairs, int num_pairs, int most_pairs_at_once, Stream stream) {
  const int64_t per_block = int64_t{kCopyThreads} * kUnroll * 16;
  const dim3 grid(static_cast<unsigned>((from.bytes + per_block - 1) / per_block),
                  static_cast<unsigned>(std::min(num_pairs, most_pairs_at_once)),
                  static_cast<unsigned>(from.num_layers));
  launch(name, copy_blocks_kernel, grid, kCopyThreads, 0, stream, from, to, pairs, num_pairs);
}

}  // namespace

void reshape_and_cache(const Rows& k, const Rows& v, const int32_t* slot_mapping,
                       const KvCache& cache, Stream stream) {
  check_new_tokens(k, v, cache);
  const CacheWrite w{k.data, v.data, k.stride, v.stride, slot_mapping, k.rows, cache};
  with_cache_types(k.dtype, cache, [&](auto t, auto c) {
    launch("reshape_and_cache",
           reshape_and_cache_kernel<typename decltype(t)::type, typename decltype(c)::type>,
           dim3(static_cast<unsigned>((k.rows + 1) / 2)), kWriteThreads, 0, stream, w);
  });
}

void rotary_and_cache(const Rows& q, const Rows& k, const Rows& v, const int32_t* positions,
                      const int32_t* slot_mapping, const Rows& cos_sin, ops::RotaryStyle style,
                      const KvCache& cache, const HeadNorms& norms, const Rows& rotated_q,
                      Stream stream) {
  check_new_tokens(k, v, cache);
  check(k.rows == q.rows && k.dtype == q.dtype, "k", "must have the rows and the type of q");
  RotaryWrite w = rotary_write(q, positions, cos_sin, cache.head_dim, rotated_q);
  w.k = k.data;
  w.v = v.data;
  w.k_stride = k.stride;
  w.v_stride = v.stride;
  w.slot_mapping = slot_mapping;
  w.cache = cache;
  w.norms = norms;
  const bool is_normed = norms.q_weight != nullptr;
  check(is_normed == (norms.k_weight != nullptr), "q_norm", "and k_norm go together");
  for (const float* weight : {norms.q_weight, norms.k_weight}) {
    check(reinterpret_cast<uintptr_t>(weight) % 16 == 0, "q_norm and k_norm",
          "must be on 16 bytes");
  }
  with_cache_types(k.dtype, cache, [&](auto t, auto c) {
    using T = typename decltype(t)::type;
    using C = typename decltype(c)::type;
    const auto run = is_normed ? launch_rotary<T, C, true> : launch_rotary<T, C, false>;
    run("rotary_and_cache", w, style, q.rows, stream);
  });
}

void rotary(const Rows& x, const int32_t* positions, const Rows& cos_sin, int64_t head_dim,
            ops::RotaryStyle style, const Rows& y, Stream stream) {
  const RotaryWrite w = rotary_write(x, positions, cos_sin, head_dim, y);
  with_float_type(x.dtype, x.name, [&](auto t) {
    using T = typename decltype(t)::type;
    launch_rotary<T, T, false>("rotary", w, style, x.rows, stream);
  });
}

void copy_blocks(const BlockMemory& cache, Span<const BlockCopy> copies, Stream stream) {
  check_memory(cache, "cache");
  for (const BlockCopy& copy : copies) {
    check_block(cache, "copies", copy.src);
    check_block(cache, "copies", copy.dst);
  }
  Pairs pairs;
  int count = 0;
  std::vector<bool> is_read(cache.num_blocks), is_written(cache.num_blocks);
  const auto flush = [&] {
    if (count > 0) launch_copy("copy_blocks", cache, cache, pairs, count, kMaxPairs, stream);
    for (int i = 0; i < count; ++i) is_read[pairs.from[i]] = is_written[pairs.to[i]] = false;
    count = 0;
  };
  for (const BlockCopy& copy : copies) {
    if (copy.src == copy.dst) continue;
    // What runs at once must not depend on its order.
    if (is_written[copy.src] || is_written[copy.dst] || is_read[copy.dst] || count == kMaxPairs) {
      flush();
    }
    pairs.from[count] = copy.src;
    pairs.to[count++] = copy.dst;
    is_read[copy.src] = is_written[copy.dst] = true;
  }
  flush();
}

void swap_blocks(const BlockMemory& device, const BlockMemory& host, Span<const BlockSwap> swaps,
                 ops::SwapDirection direction, Stream stream) {
  check_memory(device, "device");
  check_memory(host, "host");
  check(host.bytes == device.bytes && host.num_layers == device.num_layers, "host",
        "must have blocks and layers like the device's");
  const bool out = direction == ops::SwapDirection::kOut;
  std::vector<bool> is_written(out ? host.num_blocks : device.num_blocks);
  for (const BlockSwap& swap : swaps) {
    check_block(device, "device", swap.device);
    check_block(host, "host", swap.host);
    const int32_t to = out ? swap.host : swap.device;
    check(!is_written[to], "swaps", "write block " + std::to_string(to) + " twice");
    is_written[to] = true;
  }
  // The bus is full with a few multiprocessors' worth of requests in flight; the model has the
  // rest.
  constexpr int kPairsAtOnce = 4;
  Pairs pairs;
  for (size_t begin = 0; begin < swaps.size(); begin += kMaxPairs) {
    const int count = static_cast<int>(std::min<size_t>(kMaxPairs, swaps.size() - begin));
    for (int i = 0; i < count; ++i) {
      const BlockSwap& swap = swaps[begin + i];
      pairs.from[i] = out ? swap.device : swap.host;
      pairs.to[i] = out ? swap.host : swap.device;
    }
    launch_copy("swap_blocks", out ? device : host, out ? host : device, pairs, count, kPairsAtOnce,
                stream);
  }
}

}  // namespace fastpage::cuda
