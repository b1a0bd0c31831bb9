#include <algorithm>
#include <cstring>
#include <string>

#include "fastpage/ops.h"
#include "ops/kernels.h"
#include "ops/rotary_row.h"
#include "ops/scratch.h"

namespace fastpage::ops {

namespace {

// Where one head's vectors of one token go: their 16 tokens' memory, and the place among them.
struct Place {
  char* k;
  char* v;
  int64_t position;
};

// A column of k, a row of v.
template <typename T>
void write_head(const T* k, const T* v, int64_t head_dim, bool in_pairs, const Place& place) {
  T* to = reinterpret_cast<T*>(place.k);
  int64_t d = 0;
  if (in_pairs) {
    for (; d + 2 <= head_dim; d += 2) {
      std::copy(k + d, k + d + 2, to + d * cpu::kGranule + 2 * place.position);
    }
  }
  for (; d < head_dim; ++d) to[d * cpu::kGranule + place.position] = k[d];
  std::copy(v, v + head_dim, reinterpret_cast<T*>(place.v) + place.position * head_dim);
}

// As write_head, rounded to the cache's type. `narrow` has room for two such vectors.
void round_head(const float* k, const float* v, const KvCacheView& cache, float* narrow,
                const Place& place) {
  const int64_t n = cache.head_dim;
  if (cache.dtype == DType::kFloat32) return write_head(k, v, n, false, place);
  if (cache.dtype == DType::kInt8) {
    auto* k8 = reinterpret_cast<int8_t*>(narrow);
    const int64_t scales = cpu::kGranule * n;
    const float k_scale = kernels().quantize_i8(k, n, k8);
    const float v_scale = kernels().quantize_i8(v, n, k8 + n);
    reinterpret_cast<float*>(place.k + scales)[place.position] = k_scale;
    reinterpret_cast<float*>(place.v + scales)[place.position] = v_scale;
    return write_head(k8, k8 + n, n, false, place);
  }
  auto* k16 = reinterpret_cast<uint16_t*>(narrow);
  const cpu::ElementType type = element_type(cache.dtype, "kv cache");
  kernels().narrow(type, k, n, k16);
  kernels().narrow(type, v, n, k16 + n);
  write_head(k16, k16 + n, n, type == cpu::kBf16, place);
}

void write_row(const float* k, const float* v, int64_t slot, const KvCacheView& cache,
               float* narrow) {
  const int64_t offset = slot % cache.block_size;
  const int64_t granule_bytes = cache.granule_bytes();
  const int64_t head_bytes = cache.block_size / cpu::kGranule * granule_bytes;
  int64_t at =
      slot / cache.block_size * cache.bytes_per_block() + offset / cpu::kGranule * granule_bytes;
  for (int64_t h = 0; h < cache.num_kv_heads; ++h, at += head_bytes) {
    const Place place{static_cast<char*>(cache.k) + at, static_cast<char*>(cache.v) + at,
                      offset % cpu::kGranule};
    round_head(k + h * cache.head_dim, v + h * cache.head_dim, cache, narrow, place);
  }
}

bool holds(const KvCacheView& cache, BlockId block) {
  return block >= 0 && block < cache.num_blocks;
}

std::string layout(const KvCacheView& cache) {
  return std::to_string(cache.num_kv_heads) + " heads x " + std::to_string(cache.block_size) +
         " tokens x " + std::to_string(cache.head_dim) + " " + dtype_name(cache.dtype);
}

// Block copy_of(i).src of `from` to copy_of(i).dst of `to`, for i in [0, n), in order. Threads
// share the bytes of a block, not the list: a later copy may read or overwrite what an earlier one
// wrote.
template <typename CopyOf>
void move_blocks(ThreadPool& pool, const KvCacheView& from, const KvCacheView& to, size_t n,
                 const CopyOf& copy_of) {
  if (n == 0) return;
  const auto bytes = static_cast<size_t>(from.bytes_per_block());
  const int64_t grain = std::max<int64_t>(64, static_cast<int64_t>(4 * kSerialElements / n));
  pool.parallel_for(static_cast<int64_t>(bytes), grain, [&](int64_t begin, int64_t end, int) {
    const auto part = [&](void* half, BlockId block) {
      return static_cast<char*>(half) + static_cast<size_t>(block) * bytes + begin;
    };
    for (size_t i = 0; i < n; ++i) {
      const BlockCopy copy = copy_of(i);
      if (part(from.k, copy.src) == part(to.k, copy.dst)) continue;
      const auto size = static_cast<size_t>(end - begin);
      std::memcpy(part(to.k, copy.dst), part(from.k, copy.src), size);
      std::memcpy(part(to.v, copy.dst), part(from.v, copy.src), size);
    }
  });
}

void check_write(const char* op, const Matrix<const float>& k, const Matrix<const float>& v,
                 Span<const int32_t> slot_mapping, const KvCacheView& cache) {
  cache_type(cache.dtype);
  if (cache.block_size <= 0 || cache.block_size % cpu::kGranule != 0) {
    throw InvalidArgument(std::string(op) + ": blocks of " + std::to_string(cache.block_size) +
                          ": a multiple of 16 is needed");
  }
  const int64_t cols = static_cast<int64_t>(cache.num_kv_heads) * cache.head_dim;
  if (k.cols != cols || v.cols != cols || k.rows != v.rows ||
      k.rows != static_cast<int64_t>(slot_mapping.size())) {
    throw InvalidArgument(
        std::string(op) + ": k is " + std::to_string(k.rows) + " x " + std::to_string(k.cols) +
        ", v " + std::to_string(v.rows) + " x " + std::to_string(v.cols) + ", slot_mapping " +
        std::to_string(slot_mapping.size()) + "; the cache takes rows of " + std::to_string(cols));
  }
  const int64_t num_slots = static_cast<int64_t>(cache.num_blocks) * cache.block_size;
  for (const int32_t slot : slot_mapping) {
    if (slot >= num_slots) {
      throw InvalidArgument(std::string(op) + ": slot " + std::to_string(slot) +
                            " is past the cache's " + std::to_string(num_slots));
    }
  }
}

// fn(begin, end, room for a vector of one head) for rows of so many columns in all.
template <typename F>
void for_cache_rows(ThreadPool& pool, int64_t rows, int64_t cols, const KvCacheView& cache,
                    const F& fn) {
  const int64_t grain = rows * cols < kSerialElements / 4 ? std::max<int64_t>(1, rows) : 1;
  pool.parallel_for(rows, grain, [&](int64_t begin, int64_t end, int) {
    thread_local Scratch scratch;
    float* narrow = scratch.floats(static_cast<size_t>(cache.head_dim));
    fn(begin, end, narrow);
  });
}

}  // namespace

void reshape_and_cache(ThreadPool& pool, Matrix<const float> k, Matrix<const float> v,
                       Span<const int32_t> slot_mapping, const KvCacheView& cache) {
  check_write("reshape_and_cache", k, v, slot_mapping, cache);
  for_cache_rows(pool, k.rows, k.cols, cache, [&](int64_t begin, int64_t end, float* narrow) {
    for (int64_t i = begin; i < end; ++i) {
      if (slot_mapping[i] < 0) continue;
      write_row(k.row(i), v.row(i), slot_mapping[i], cache, narrow);
    }
  });
}

void rotary_and_cache(ThreadPool& pool, Matrix<const float> q, Matrix<const float> k,
                      Matrix<const float> v, Span<const int32_t> positions,
                      Span<const int32_t> slot_mapping, Matrix<const float> cos_sin,
                      RotaryStyle style, const KvCacheView& cache, Matrix<float> rotated_q) {
  check_write("rotary_and_cache", k, v, slot_mapping, cache);
  if (q.rows != k.rows || rotated_q.rows != q.rows || rotated_q.cols != q.cols ||
      q.cols % cache.head_dim != 0 || static_cast<int64_t>(positions.size()) != q.rows) {
    throw InvalidArgument("rotary_and_cache: q is " + std::to_string(q.rows) + " x " +
                          std::to_string(q.cols) + ", its result " +
                          std::to_string(rotated_q.rows) + " x " + std::to_string(rotated_q.cols) +
                          ", for " + std::to_string(k.rows) + " keys and " +
                          std::to_string(positions.size()) + " positions");
  }
  if (q.rows == 0) return;
  const RotaryRow row(cos_sin, cache.head_dim, style);
  for_cache_rows(pool, q.rows, q.cols + k.cols, cache,
                 [&](int64_t begin, int64_t end, float* narrow) {
                   thread_local Scratch scratch;
                   float* rotated_k = scratch.floats(static_cast<size_t>(k.cols));
                   for (int64_t i = begin; i < end; ++i) {
                     row.run(q.row(i), positions[i], q.cols, rotated_q.row(i));
                     if (slot_mapping[i] < 0) continue;
                     row.run(k.row(i), positions[i], k.cols, rotated_k);
                     write_row(rotated_k, v.row(i), slot_mapping[i], cache, narrow);
                   }
                 });
}

void copy_blocks(ThreadPool& pool, const KvCacheView& cache, Span<const BlockCopy> copies) {
  for (const BlockCopy& copy : copies) {
    if (holds(cache, copy.src) && holds(cache, copy.dst)) continue;
    throw InvalidArgument("copy_blocks: " + std::to_string(copy.src) + " -> " +
                          std::to_string(copy.dst) + " is outside the cache's " +
                          std::to_string(cache.num_blocks) + " blocks");
  }
  move_blocks(pool, cache, cache, copies.size(), [&](size_t i) { return copies[i]; });
}

void swap_blocks(ThreadPool& pool, const KvCacheView& device, const KvCacheView& host,
                 Span<const BlockSwap> swaps, SwapDirection direction) {
  if (swaps.empty()) return;
  if (device.dtype != host.dtype || device.num_kv_heads != host.num_kv_heads ||
      device.block_size != host.block_size || device.head_dim != host.head_dim) {
    throw InvalidArgument("swap_blocks: a block is " + layout(device) + " in the cache, but " +
                          layout(host) + " in the host cache: both must be of one layout");
  }
  for (const BlockSwap& swap : swaps) {
    if (holds(device, swap.device) && holds(host, swap.host)) continue;
    throw InvalidArgument("swap_blocks: block " + std::to_string(swap.device) + " and host block " +
                          std::to_string(swap.host) + " are not both within the cache's " +
                          std::to_string(device.num_blocks) + " and the host cache's " +
                          std::to_string(host.num_blocks));
  }
  if (direction == SwapDirection::kOut) {
    move_blocks(pool, device, host, swaps.size(),
                [&](size_t i) { return BlockCopy{swaps[i].device, swaps[i].host}; });
  } else {
    move_blocks(pool, host, device, swaps.size(),
                [&](size_t i) { return BlockCopy{swaps[i].host, swaps[i].device}; });
  }
}

}  // namespace fastpage::ops
