#include <algorithm>
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

}  // namespace fastpage::ops
