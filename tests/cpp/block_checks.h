// What must hold of a scheduler's blocks, seen from outside.
#pragma once

#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "fastpage/scheduler.h"

namespace fastpage {

// An invariant does not hold.
class Broken : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

inline void hold(bool ok, const char* what) {
  if (!ok) throw Broken(what);
}

class BlockChecks {
 public:
  explicit BlockChecks(const Scheduler& scheduler)
      : scheduler_(scheduler),
        config_(scheduler.config()),
        hasher_(config_.hash_key_lo, config_.hash_key_hi),
        owners_(config_.num_blocks, kNobody),
        host_owners_(config_.num_host_blocks, kNobody) {}

  // Invariant 1.
  void check_holders();
  // Replayed, the events give what the pools hold now.
  void check_events(const std::vector<KvEvent>& events);
  // Invariants 2 and 5.
  void check_written_slots(const InputBatch& batch);
  // No block's contents ever come from those of another owner (a tenant, or a request if nothing
  // is shared). owners[i]: of sequence i of the batch.
  void check_owners(const InputBatch& batch, const std::vector<uint64_t>& owners);

 private:
  static constexpr uint64_t kNobody = ~uint64_t{0};

  const Scheduler& scheduler_;
  const SchedulerConfig& config_;
  BlockHasher hasher_;
  std::vector<int32_t> holders_;
  std::vector<bool> written_;
  std::unordered_map<uint64_t, BlockHash> announced_[2];  // by tier
  std::vector<uint64_t> owners_;                          // by block
  std::vector<uint64_t> host_owners_;
};

inline void BlockChecks::check_holders() {
  const BlockManager& blocks = scheduler_.blocks();
  holders_.assign(config_.num_blocks, 0);
  for (int32_t row = 0; row < config_.max_num_seqs; ++row) {
    for (int32_t i = 0; i < blocks.num_blocks_of(row); ++i) ++holders_.at(blocks.block_at(row, i));
  }
  int32_t num_free = 0;
  for (BlockId id = 0; id < config_.num_blocks; ++id) {
    hold(blocks.pool().block(id).ref_count == holders_[id], "invariant 1: ref_count");
    num_free += holders_[id] == 0;
  }
  hold(num_free == blocks.pool().num_free(), "invariant 1: free + referenced = total");
}

inline void BlockChecks::check_events(const std::vector<KvEvent>& events) {
  for (const KvEvent& event : events) {
    auto& known = announced_[event.tier == KvTier::kHost];
    switch (event.kind) {
      case KvEvent::Kind::kStored:
        hold(known.emplace(event.hash.lo, event.hash).second, "KV events: stored twice");
        if (event.tier == KvTier::kHost) break;
        hold(event.token_ids.size() == static_cast<size_t>(config_.block_size),
             "KV events: not a block of tokens");
        if (event.parent_hash) {
          hold(hasher_.next(event.parent_hash, event.token_ids) == event.hash,
               "KV events: the hash is not that of the parent and the tokens");
        }
        break;
      case KvEvent::Kind::kRemoved:
        hold(known.erase(event.hash.lo) == 1, "KV events: removed what was not stored");
        break;
      case KvEvent::Kind::kCleared:
        announced_[0].clear();
        announced_[1].clear();
        break;
    }
  }
  const BlockPool* pools[] = {&scheduler_.blocks().pool(), &scheduler_.blocks().host_pool()};
  for (int tier = 0; tier < 2; ++tier) {
    size_t num_announced = 0;
    for (BlockId id = 0; id < pools[tier]->num_blocks(); ++id) {
      const Block& block = pools[tier]->block(id);
      if (!block.hash || !block.announced) continue;
      ++num_announced;
      hold(announced_[tier].count(block.hash.lo) == 1, "KV events: a stored block is missing");
    }
    hold(num_announced == announced_[tier].size(), "KV events: a removal is missing");
  }
}

inline void BlockChecks::check_written_slots(const InputBatch& batch) {
  written_.assign(static_cast<size_t>(config_.num_blocks) * config_.block_size, false);
  for (const int32_t slot : batch.slot_mapping) {
    hold(!written_.at(slot), "invariant 2: a slot is written twice");
    written_[slot] = true;
    const Block& block = scheduler_.blocks().pool().block(slot / config_.block_size);
    hold(block.ref_count == 1, "invariant 2: a shared block is written");
    hold(!block.hash, "invariants 2 and 5: a published block is written");
  }
}

inline void BlockChecks::check_owners(const InputBatch& batch,
                                      const std::vector<uint64_t>& owners) {
  for (const BlockSwap& swap : batch.transfers.swap_outs) {
    host_owners_.at(swap.host) = owners_.at(swap.device);
  }
  for (const BlockCopy& copy : batch.transfers.block_copies) {
    owners_.at(copy.dst) = owners_.at(copy.src);
  }
  for (const BlockSwap& swap : batch.transfers.swap_ins) {
    owners_.at(swap.device) = host_owners_.at(swap.host);
  }
  for (int32_t seq = 0; seq < batch.num_seqs; ++seq) {
    const int32_t begin = batch.positions[batch.query_start_loc[seq]];
    for (int32_t i = 0; i * config_.block_size < batch.seq_lens[seq]; ++i) {
      uint64_t& owner = owners_.at(batch.block_table(seq)[i]);
      if (i * config_.block_size >= begin) owner = owners[seq];
      hold(owner == owners[seq], "a block of another tenant, or request, is read");
    }
  }
}

}  // namespace fastpage
