#include "fastpage/block_manager.h"

#include <algorithm>

namespace fastpage {

BlockManager::BlockManager(const BlockManagerConfig& config)
    : config_(config),
      pool_(config.num_blocks),
      stride_(blocks_for(config.max_model_len)),
      tables_(static_cast<size_t>(config.max_num_seqs) * stride_, 0),
      num_blocks_(config.max_num_seqs, 0),
      found_(stride_) {}

CachedPrefix BlockManager::find_cached(Span<const BlockHash> hashes) {
  CachedPrefix prefix;
  if (!config_.enable_prefix_caching) return prefix;
  size_t n = 0;
  for (; n < hashes.size(); ++n) {
    const BlockId id = pool_.find(hashes[n]);
    if (id == kNoBlock) break;
    found_[n] = id;
    prefix.num_free += pool_.block(id).ref_count == 0;
  }
  prefix.blocks = {found_.data(), n};
  return prefix;
}

void BlockManager::take_cached(int32_t row, Span<const BlockId> blocks) {
  BlockId* table = &tables_[static_cast<int64_t>(row) * stride_];
  for (size_t i = 0; i < blocks.size(); ++i) {
    pool_.add_ref(blocks[i]);
    table[i] = blocks[i];
  }
  num_blocks_[row] = static_cast<int32_t>(blocks.size());
}

bool BlockManager::allocate(int32_t row, int32_t num_tokens) {
  const int32_t wanted = blocks_for(num_tokens);
  if (wanted - num_blocks_[row] > pool_.num_free()) return false;
  BlockId* table = &tables_[static_cast<int64_t>(row) * stride_];
  while (num_blocks_[row] < wanted) table[num_blocks_[row]++] = pool_.allocate();
  return true;
}

void BlockManager::publish(int32_t row, int32_t first, Span<const BlockHash> hashes) {
  for (size_t i = 0; i < hashes.size(); ++i) {
    pool_.publish(block_at(row, first + static_cast<int32_t>(i)), hashes[i]);
  }
}

void BlockManager::free(int32_t row) {
  BlockId* table = &tables_[static_cast<int64_t>(row) * stride_];
  for (int32_t i = num_blocks_[row] - 1; i >= 0; --i) pool_.release(table[i]);
  std::fill_n(table, num_blocks_[row], 0);
  num_blocks_[row] = 0;
}

void BlockManager::check_integrity() const {
  pool_.check_integrity();
  std::vector<int32_t> holders(config_.num_blocks, 0);
  for (int32_t row = 0; row < config_.max_num_seqs; ++row) {
    for (int32_t i = 0; i < stride_; ++i) {
      const BlockId id = block_at(row, i);
      if (i < num_blocks_[row]) {
        ++holders.at(id);
      } else if (id != 0) {
        throw Error("block table row " + std::to_string(row) + ": entry " + std::to_string(i) +
                    " past its " + std::to_string(num_blocks_[row]) + " blocks is not 0");
      }
    }
  }
  for (BlockId id = 0; id < config_.num_blocks; ++id) {
    if (holders[id] != pool_.block(id).ref_count) {
      throw Error("block " + std::to_string(id) + ": ref_count " +
                  std::to_string(pool_.block(id).ref_count) + ", but " +
                  std::to_string(holders[id]) + " tables hold it");
    }
  }
}

}  // namespace fastpage
