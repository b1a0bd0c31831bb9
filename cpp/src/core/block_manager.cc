#include "fastpage/block_manager.h"

#include <algorithm>

namespace fastpage {

// Why the order of a step's transfers (swap_outs, block_copies, swap_ins; see BlockTransfers) never
// lets one read what another overwrote:
// - A swap_out reads a published block. Nothing is published before the step that filled it is
//   done, so what it reads was there before this step, and swap_outs come first.
// - A block that is taken twice in a step (its row was freed again) gets the last taker's contents:
//   copies are in order, and the swap_in of an earlier taker is cancelled.
// - Host blocks that are source or target of a swap stay pinned until the next begin_step(): a
//   swap_in's source is not overwritten by a swap_out, and no host block is a target twice.

BlockManager::BlockManager(const BlockManagerConfig& config)
    : config_(config),
      pool_(config.num_blocks),
      host_pool_(config.num_host_blocks),
      stride_(blocks_for(config.max_model_len)),
      tables_(static_cast<size_t>(config.max_num_seqs) * stride_, 0),
      num_blocks_(config.max_num_seqs, 0),
      found_(stride_) {}

void BlockManager::begin_step(BlockTransfers* transfers) {
  transfers_ = transfers;
  for (const BlockSwap& pin : pins_) {
    host_pool_.release(pin.host);
    if (pin.device != kNoBlock) pool_.set_swapping_in(pin.device, false);
  }
  pins_.clear();
}

void BlockManager::discard_step(const BlockTransfers& transfers) {
  for (const BlockSwap& swap : transfers.swap_outs) {
    if (host_pool_.block(swap.host).hash) unpublish_host(swap.host);
  }
}

CachedPrefix BlockManager::find_cached(Span<const BlockHash> hashes) {
  CachedPrefix prefix;
  size_t n = 0;
  for (; n < hashes.size(); ++n) {
    CachedBlock found;
    found.device = pool_.find(hashes[n]);
    if (found.device != kNoBlock) {
      prefix.num_held += pool_.block(found.device).ref_count > 0;
    } else {
      found.host = host_pool_.find(hashes[n]);
      if (found.host == kNoBlock) break;
      ++prefix.num_on_host;
    }
    found_[n] = found;
  }
  prefix.blocks = {found_.data(), n};
  return prefix;
}

int32_t BlockManager::take_cached(int32_t row, Span<const CachedBlock> blocks) {
  const int32_t n = static_cast<int32_t>(blocks.size());
  BlockId* table = row_of(row);
  // All of them are held before anything is allocated, which evicts. From the last one on, since
  // the host tier gives up first what was pinned first.
  int32_t first_swapped_in = n;
  for (int32_t i = n - 1; i >= 0; --i) {
    const BlockId id = blocks[i].device;
    if (id == kNoBlock) {
      host_pool_.add_ref(blocks[i].host);
      first_swapped_in = i;
      continue;
    }
    if (pool_.block(id).ref_count == 0) pool_.set_offload(id, false);
    pool_.add_ref(id);
    table[i] = id;
  }
  num_blocks_[row] = n;
  for (int32_t i = n - 1; i >= first_swapped_in; --i) {
    if (blocks[i].device != kNoBlock) continue;
    const BlockSwap swap{take_block(), blocks[i].host};
    pool_.set_swapping_in(swap.device, true);
    pins_.push_back(swap);
    transfers_->swap_ins.push_back(swap);
    ++stats_.num_swapped_in;
    table[i] = swap.device;
  }
  return first_swapped_in;
}

bool BlockManager::allocate(int32_t row, int32_t num_tokens) {
  const int32_t wanted = blocks_for(num_tokens);
  if (wanted - num_blocks_[row] > pool_.num_free()) return false;
  BlockId* table = row_of(row);
  while (num_blocks_[row] < wanted) table[num_blocks_[row]++] = take_block();
  return true;
}

bool BlockManager::make_writable(int32_t row, int32_t index) {
  BlockId& entry = row_of(row)[index];
  if (pool_.block(entry).ref_count == 1) return true;
  if (pool_.num_free() == 0) return false;
  const BlockCopy copy{entry, pool_.first_free()};
  transfers_->block_copies.push_back(copy);  // before anything that has to be undone without memory
  take_block();
  ++stats_.num_copied;
  pool_.release(copy.src);
  entry = copy.dst;
  return true;
}

void BlockManager::fork(int32_t from, int32_t to, int32_t num_blocks) {
  const BlockId* source = row_of(from);
  for (int32_t i = 0; i < num_blocks; ++i) pool_.add_ref(source[i]);
  std::copy_n(source, num_blocks, row_of(to));
  num_blocks_[to] = num_blocks;
}

void BlockManager::publish(int32_t row, int32_t first, int32_t end, const BlockHash* hashes,
                           const TokenId* tokens, bool announce) {
  for (int32_t i = first; i < end; ++i) {
    const BlockId id = block_at(row, i);
    if (!pool_.publish(id, hashes[i]) || !config_.enable_kv_events) continue;
    if (!announce) {
      const BlockId host = host_pool_.find(hashes[i]);
      if (host == kNoBlock || !host_pool_.block(host).announced) continue;
    }
    pool_.set_announced(id, true);
    const TokenId* own = tokens + static_cast<int64_t>(i) * config_.block_size;
    events_.push_back({KvEvent::Kind::kStored,
                       KvTier::kDevice,
                       hashes[i],
                       i == 0 ? BlockHash{} : hashes[i - 1],
                       {own, own + config_.block_size}});
  }
}

void BlockManager::free(int32_t row, Keep keep, int32_t num_kept) {
  BlockId* table = row_of(row);
  for (int32_t i = num_blocks_[row] - 1; i >= num_kept; --i) {
    const BlockId id = table[i];
    const Block& block = pool_.block(id);
    if (block.hash) {
      if (keep == Keep::kOffload) pool_.set_offload(id, true);
      if (keep == Keep::kForget && block.ref_count == 1) {
        if (block.announced) announce_removed(KvTier::kDevice, block.hash);
        pool_.unpublish(id);
      }
    }
    pool_.release(id);
    table[i] = 0;
  }
  num_blocks_[row] = std::min(num_blocks_[row], num_kept);
}

// The next free block, which is evicted if it is published. There must be one.
BlockId BlockManager::take_block() {
  const BlockId id = pool_.first_free();
  const Block& block = pool_.block(id);
  if (block.offload) offload(id);
  if (block.announced) announce_removed(KvTier::kDevice, block.hash);
  if (block.swapping_in) cancel_swap_in(id);
  return pool_.allocate();
}

// To the host tier, for which it counts as a use if the contents are there already. Not if all of
// that is pinned.
void BlockManager::offload(BlockId id) {
  const Block& block = pool_.block(id);
  BlockId host = host_pool_.find(block.hash);
  if (host != kNoBlock) {
    host_pool_.add_ref(host);
    host_pool_.release(host);
  } else {
    host = host_pool_.first_free();
    if (host == kNoBlock || transfers_ == nullptr) return;
    if (host_pool_.block(host).announced) {
      announce_removed(KvTier::kHost, host_pool_.block(host).hash);
    }
    transfers_->swap_outs.push_back({id, host});
    pins_.push_back({kNoBlock, host});
    host_pool_.allocate();
    host_pool_.publish(host, block.hash);
    ++stats_.num_swapped_out;
  }
  if (block.announced && !host_pool_.block(host).announced) {
    host_pool_.set_announced(host, true);
    events_.push_back({KvEvent::Kind::kStored, KvTier::kHost, block.hash, {}, {}});
  }
}

// Its row was freed again within the step, and another one takes it.
void BlockManager::cancel_swap_in(BlockId id) {
  const auto to_it = [id](const BlockSwap& swap) { return swap.device == id; };
  std::vector<BlockSwap>& swaps = transfers_->swap_ins;
  swaps.erase(std::find_if(swaps.begin(), swaps.end(), to_it));
  std::find_if(pins_.begin(), pins_.end(), to_it)->device = kNoBlock;
  pool_.set_swapping_in(id, false);
  --stats_.num_swapped_in;
}

void BlockManager::unpublish_host(BlockId host) {
  const Block& block = host_pool_.block(host);
  if (block.announced) announce_removed(KvTier::kHost, block.hash);
  host_pool_.unpublish(host);
}

void BlockManager::announce_removed(KvTier tier, BlockHash hash) {
  events_.push_back({KvEvent::Kind::kRemoved, tier, hash, {}, {}});
}

void BlockManager::reset_prefix_cache() {
  pool_.reset_prefix_cache();
  host_pool_.reset_prefix_cache();
  if (config_.enable_kv_events) events_.push_back({KvEvent::Kind::kCleared, {}, {}, {}, {}});
}

void BlockManager::take_kv_events(std::vector<KvEvent>* events) {
  events->clear();
  events->swap(events_);
}

void BlockManager::check_integrity() const {
  pool_.check_integrity();
  host_pool_.check_integrity();
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
  std::vector<int32_t> pins(config_.num_host_blocks, 0);
  std::vector<bool> swapping_in(config_.num_blocks, false);
  for (const BlockSwap& pin : pins_) {
    ++pins.at(pin.host);
    if (pin.device != kNoBlock) swapping_in.at(pin.device) = true;
  }
  const auto compare = [](const char* what, BlockId id, int32_t count, int32_t real) {
    if (count == real) return;
    throw Error(std::string(what) + " " + std::to_string(id) + ": ref_count " +
                std::to_string(count) + ", but " + std::to_string(real) + " hold it");
  };
  for (BlockId id = 0; id < config_.num_blocks; ++id) {
    compare("block", id, pool_.block(id).ref_count, holders[id]);
    if (pool_.block(id).swapping_in != swapping_in[id]) {
      throw Error("block " + std::to_string(id) +
                  (swapping_in[id] ? ": is being swapped in, yet not marked so"
                                   : ": marked as being swapped in, yet no host block is pinned"));
    }
  }
  for (BlockId id = 0; id < config_.num_host_blocks; ++id) {
    compare("host block", id, host_pool_.block(id).ref_count, pins[id]);
  }
}

}  // namespace fastpage
