// Block tables: which blocks hold the KV of each sequence, in one matrix that kernels read as it
// is.
#pragma once

#include <vector>

#include "fastpage/block_pool.h"
#include "fastpage/types.h"

namespace fastpage {

struct BlockManagerConfig {
  int32_t num_blocks = 0;
  int32_t block_size = 16;
  int32_t max_num_seqs = 256;    // rows
  int32_t max_model_len = 2048;  // tokens a row can hold
  bool enable_prefix_caching = true;
};

struct CachedPrefix {
  Span<const BlockId> blocks;
  int32_t num_free = 0;  // of them on the free list: taking them leaves that many fewer to allocate
};

class BlockManager {
 public:
  explicit BlockManager(const BlockManagerConfig& config);

  // [max_num_seqs][stride()]; entries past num_blocks_of(row) are 0.
  const BlockId* block_tables() const { return tables_.data(); }
  int32_t stride() const { return stride_; }
  // Blocks that hold `num_tokens`.
  int32_t blocks_for(int32_t num_tokens) const {
    return (num_tokens + config_.block_size - 1) / config_.block_size;
  }
  int32_t num_blocks_of(int32_t row) const { return num_blocks_[row]; }
  BlockId block_at(int32_t row, int32_t index) const {
    return tables_[static_cast<int64_t>(row) * stride_ + index];
  }

  // The longest cached run of leading `hashes`. Empty when caching is off. The result is valid
  // until the next call, and its blocks are the caller's to take only until the next grow().
  CachedPrefix find_cached(Span<const BlockHash> hashes);
  // Puts them into an empty row, which becomes one more holder of each.
  void take_cached(int32_t row, Span<const BlockId> blocks);
  // Grows the row to hold `num_tokens`. All or nothing: false, and nothing changed, if blocks are
  // short.
  bool grow(int32_t row, int32_t num_tokens) {
    return num_tokens <= num_blocks_[row] * config_.block_size || allocate(row, num_tokens);
  }
  // Publishes the row's blocks [first, first + hashes.size()): they are full and computed.
  void publish(int32_t row, int32_t first, Span<const BlockHash> hashes);
  // Releases all blocks of the row, last block first, so that a prefix outlives its tail in the
  // cache.
  void free(int32_t row);

  BlockPool& pool() { return pool_; }
  const BlockPool& pool() const { return pool_; }
  const BlockManagerConfig& config() const { return config_; }
  // Invariants 1: every ref_count equals the number of tables that hold the block, and the pool's
  // own.
  void check_integrity() const;

 private:
  bool allocate(int32_t row, int32_t num_tokens);

  BlockManagerConfig config_;
  BlockPool pool_;
  int32_t stride_;
  std::vector<BlockId> tables_;
  std::vector<int32_t> num_blocks_;
  std::vector<BlockId> found_;  // find_cached()'s result
};

}  // namespace fastpage
