#include <algorithm>
#include <string>

#include "fastpage/ops.h"
#include "ops/kernels.h"
#include "ops/scratch.h"

namespace fastpage::ops {

namespace {

// One head's vector into its place among 16 positions: a column of k, a row of v.
template <typename T>
void write_head(const T* k, const T* v, int64_t head_dim, int64_t position, T* granule_k,
                T* granule_v) {
  for (int64_t d = 0; d < head_dim; ++d) granule_k[d * cpu::kGranule + position] = k[d];
  std::copy(v, v + head_dim, granule_v + position * head_dim);
}

template <typename T>
void write_row(const T* k, const T* v, int64_t slot, const KvCacheView& cache) {
  const int64_t head_dim = cache.head_dim;
  const int64_t offset = slot % cache.block_size;
  const int64_t head_elements = cache.block_size * head_dim;
  const int64_t granule = slot / cache.block_size * cache.elements_per_block() +
                          offset / cpu::kGranule * cpu::kGranule * head_dim;
  for (int64_t h = 0; h < cache.num_kv_heads; ++h) {
    const int64_t at = granule + h * head_elements;
    write_head(k + h * head_dim, v + h * head_dim, head_dim, offset % cpu::kGranule,
               static_cast<T*>(cache.k) + at, static_cast<T*>(cache.v) + at);
  }
}

}  // namespace

void reshape_and_cache(ThreadPool& pool, Matrix<const float> k, Matrix<const float> v,
                       Span<const int32_t> slot_mapping, const KvCacheView& cache) {
  const cpu::ElementType type = element_type(cache.dtype, "kv cache");
  if (cache.block_size <= 0 || cache.block_size % cpu::kGranule != 0) {
    throw InvalidArgument("reshape_and_cache: blocks of " + std::to_string(cache.block_size) +
                          ": a multiple of 16 is needed");
  }
  const int64_t cols = static_cast<int64_t>(cache.num_kv_heads) * cache.head_dim;
  if (k.cols != cols || v.cols != cols || k.rows != v.rows ||
      k.rows != static_cast<int64_t>(slot_mapping.size())) {
    throw InvalidArgument(
        "reshape_and_cache: k is " + std::to_string(k.rows) + " x " + std::to_string(k.cols) +
        ", v " + std::to_string(v.rows) + " x " + std::to_string(v.cols) + ", slot_mapping " +
        std::to_string(slot_mapping.size()) + "; the cache takes rows of " + std::to_string(cols));
  }
  const int64_t num_slots = static_cast<int64_t>(cache.num_blocks) * cache.block_size;
  for (const int32_t slot : slot_mapping) {
    if (slot >= num_slots) {
      throw InvalidArgument("reshape_and_cache: slot " + std::to_string(slot) +
                            " is past the cache's " + std::to_string(num_slots));
    }
  }
  const int64_t grain = k.rows * cols < kSerialElements / 4 ? std::max<int64_t>(1, k.rows) : 1;
  pool.parallel_for(k.rows, grain, [&](int64_t begin, int64_t end, int) {
    thread_local Scratch scratch;
    auto* narrow_k = reinterpret_cast<uint16_t*>(scratch.floats(static_cast<size_t>(cols)));
    uint16_t* narrow_v = narrow_k + cols;
    for (int64_t i = begin; i < end; ++i) {
      if (slot_mapping[i] < 0) continue;
      if (type == cpu::kF32) {
        write_row(k.row(i), v.row(i), slot_mapping[i], cache);
        continue;
      }
      kernels().narrow(type, k.row(i), cols, narrow_k);
      kernels().narrow(type, v.row(i), cols, narrow_v);
      write_row<uint16_t>(narrow_k, narrow_v, slot_mapping[i], cache);
    }
  });
}

}  // namespace fastpage::ops
