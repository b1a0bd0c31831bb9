// Whole blocks, within the KV cache and between it and a host cache.
#include <algorithm>
#include <cstring>
#include <string>

#include "fastpage/ops.h"
#include "ops/kernels.h"

namespace fastpage::ops {

namespace {

std::string layout(const KvCacheView& cache) {
  return std::to_string(cache.num_kv_heads) + " heads x " + std::to_string(cache.block_size) +
         " tokens x " + std::to_string(cache.head_dim) + " " + dtype_name(cache.dtype);
}

void check_same_layout(const KvCacheView& a, const KvCacheView& b) {
  if (a.dtype == b.dtype && a.num_kv_heads == b.num_kv_heads && a.block_size == b.block_size &&
      a.head_dim == b.head_dim) {
    return;
  }
  throw InvalidArgument("blocks are moved between a cache of " + layout(a) + " and one of " +
                        layout(b) + ": both must be of one layout");
}

bool holds(const KvCacheView& cache, BlockId block) {
  return block >= 0 && block < cache.num_blocks;
}

void check_copies(const KvCacheView& cache, Span<const BlockCopy> copies) {
  for (const BlockCopy& copy : copies) {
    if (holds(cache, copy.src) && holds(cache, copy.dst)) continue;
    throw InvalidArgument("copy_blocks: " + std::to_string(copy.src) + " -> " +
                          std::to_string(copy.dst) + " is outside the cache's " +
                          std::to_string(cache.num_blocks) + " blocks");
  }
}

void check_swaps(const KvCacheView& device, const KvCacheView& host, Span<const BlockSwap> swaps) {
  for (const BlockSwap& swap : swaps) {
    if (holds(device, swap.device) && holds(host, swap.host)) continue;
    throw InvalidArgument("swap_blocks: block " + std::to_string(swap.device) + " and host block " +
                          std::to_string(swap.host) + " are not both within the cache's " +
                          std::to_string(device.num_blocks) + " and the host cache's " +
                          std::to_string(host.num_blocks));
  }
}

size_t half_bytes(const KvCacheView& cache) { return static_cast<size_t>(cache.bytes_per_block()); }

// Bytes of a block's keys, and the same ones of its values.
struct Part {
  size_t begin;
  size_t end;
};

void move(const KvCacheView& from, BlockId src, const KvCacheView& to, BlockId dst, Part part) {
  const size_t bytes = half_bytes(from);
  const size_t at_src = static_cast<size_t>(src) * bytes + part.begin;
  const size_t at_dst = static_cast<size_t>(dst) * bytes + part.begin;
  if (from.k == to.k && src == dst) return;
  const size_t size = part.end - part.begin;
  std::memcpy(static_cast<char*>(to.k) + at_dst, static_cast<const char*>(from.k) + at_src, size);
  std::memcpy(static_cast<char*>(to.v) + at_dst, static_cast<const char*>(from.v) + at_src, size);
}

void copy(const KvCacheView& cache, Span<const BlockCopy> copies, Part part) {
  for (const BlockCopy& copy : copies) move(cache, copy.src, cache, copy.dst, part);
}

void swap(const KvCacheView& device, const KvCacheView& host, Span<const BlockSwap> swaps,
          SwapDirection direction, Part part) {
  for (const BlockSwap& swap : swaps) {
    if (direction == SwapDirection::kOut) {
      move(device, swap.device, host, swap.host, part);
    } else {
      move(host, swap.host, device, swap.device, part);
    }
  }
}

// fn(layer, part) for the blocks of all layers. Threads share layers and the bytes of a block, but
// not the list of blocks: a later one may read or overwrite what an earlier one wrote.
template <typename Fn>
void for_parts(ThreadPool& pool, size_t num_layers, const KvCacheView& cache, size_t num_moves,
               const Fn& fn) {
  if (num_moves == 0) return;
  const size_t bytes = half_bytes(cache);
  const auto total = static_cast<int64_t>(num_layers * bytes);
  const int64_t grain =
      std::max<int64_t>(64, static_cast<int64_t>(4 * kSerialElements / num_moves));
  pool.parallel_for(total, grain, [&](int64_t first, int64_t last, int) {
    for (auto at = static_cast<size_t>(first); at < static_cast<size_t>(last);) {
      const size_t layer = at / bytes;
      const size_t end = std::min((layer + 1) * bytes, static_cast<size_t>(last));
      fn(layer, Part{at - layer * bytes, end - layer * bytes});
      at = end;
    }
  });
}

}  // namespace

void copy_blocks(ThreadPool& pool, const KvCacheView& cache, Span<const BlockCopy> copies) {
  check_copies(cache, copies);
  for_parts(pool, 1, cache, copies.size(), [&](size_t, Part part) { copy(cache, copies, part); });
}

void swap_blocks(ThreadPool& pool, const KvCacheView& device, const KvCacheView& host,
                 Span<const BlockSwap> swaps, SwapDirection direction) {
  check_same_layout(device, host);
  check_swaps(device, host, swaps);
  for_parts(pool, 1, device, swaps.size(),
            [&](size_t, Part part) { swap(device, host, swaps, direction, part); });
}

void transfer_blocks(ThreadPool& pool, Span<const KvCacheView> device, Span<const KvCacheView> host,
                     const BlockTransfers& transfers) {
  if (device.size() != host.size()) {
    throw InvalidArgument("transfer_blocks: " + std::to_string(device.size()) + " layers, and " +
                          std::to_string(host.size()) + " of the host cache");
  }
  if (device.empty()) return;
  const Span<const BlockSwap> outs(transfers.swap_outs), ins(transfers.swap_ins);
  const Span<const BlockCopy> copies(transfers.block_copies);
  for (size_t layer = 0; layer < device.size(); ++layer) {
    check_same_layout(device[0], device[layer]);
    check_same_layout(device[0], host[layer]);
    check_swaps(device[layer], host[layer], outs);
    check_copies(device[layer], copies);
    check_swaps(device[layer], host[layer], ins);
  }
  for_parts(pool, device.size(), device[0], outs.size() + copies.size() + ins.size(),
            [&](size_t layer, Part part) {
              swap(device[layer], host[layer], outs, SwapDirection::kOut, part);
              copy(device[layer], copies, part);
              swap(device[layer], host[layer], ins, SwapDirection::kIn, part);
            });
}

}  // namespace fastpage::ops
