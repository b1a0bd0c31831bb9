#include "fastpage/block_manager.h"

#include <gtest/gtest.h>

#include <numeric>

#include "counting_allocator.h"

namespace fastpage {
namespace {

constexpr int32_t kBlockSize = 4;
constexpr BlockHash kNone;

BlockManagerConfig small_config(int32_t num_host_blocks = 0) {
  BlockManagerConfig config;
  config.num_blocks = 6;
  config.num_host_blocks = num_host_blocks;
  config.block_size = kBlockSize;
  config.max_num_seqs = 4;
  config.max_model_len = 22;
  config.enable_kv_events = true;
  return config;
}

// The hashes of one prompt's blocks; those of two prompts have none in common.
std::vector<BlockHash> hashes_of(uint64_t prompt, uint64_t num_blocks = 4) {
  std::vector<BlockHash> hashes;
  for (uint64_t i = 1; i <= num_blocks; ++i) hashes.push_back({i * 77, prompt});
  return hashes;
}

// A block manager and what a scheduler would do with it.
struct Blocks : BlockManager {
  explicit Blocks(const BlockManagerConfig& config) : BlockManager(config), tokens(24) {
    std::iota(tokens.begin(), tokens.end(), 100);
  }
  explicit Blocks(int32_t num_host_blocks) : Blocks(small_config(num_host_blocks)) { begin(); }

  void begin() {
    transfers.clear();
    begin_step(&transfers);
  }
  // The row computes the first blocks of a prompt, from the first that it has not.
  void compute(int32_t row, uint64_t prompt, int32_t num_blocks, bool announce = false) {
    ASSERT_TRUE(grow(row, num_blocks * kBlockSize));
    publish(row, 0, num_blocks, hashes_of(prompt).data(), tokens.data(), announce);
  }
  // Computes and frees it, and evicts it with all that is free.
  void evict(uint64_t prompt, int32_t num_blocks, bool announce = false) {
    compute(3, prompt, num_blocks, announce);
    free(3, Keep::kOffload);
    ASSERT_TRUE(take_all());
    free(3, Keep::kForget);
  }
  // Into the empty row 3.
  bool take_all() { return grow(3, pool().num_free() * kBlockSize); }
  CachedPrefix find(uint64_t prompt) { return find_cached(hashes_of(prompt)); }
  size_t num_found(uint64_t prompt) { return find(prompt).blocks.size(); }
  bool on_device(uint64_t prompt, int32_t i) const {
    return pool().find(hashes_of(prompt)[i]) != kNoBlock;
  }
  bool on_host(uint64_t prompt, int32_t i) const {
    return host_pool().find(hashes_of(prompt)[i]) != kNoBlock;
  }
  std::vector<std::string> events() {
    std::vector<KvEvent> taken;
    take_kv_events(&taken);
    std::vector<std::string> out;
    for (const KvEvent& event : taken) out.push_back(describe(event));
    return out;
  }

  // "+d 1.0 < none: 100" = stored on the device: block 0 of prompt 1, its parent, its first token.
  static std::string describe(const KvEvent& event) {
    const auto name = [](BlockHash hash) {
      if (!hash) return std::string("none");
      return std::to_string(hash.hi) + "." + std::to_string(hash.lo / 77 - 1);
    };
    if (event.kind == KvEvent::Kind::kCleared) return "cleared";
    const bool stored = event.kind == KvEvent::Kind::kStored;
    std::string out = stored ? "+" : "-";
    out += event.tier == KvTier::kDevice ? "d " : "h ";
    out += name(event.hash);
    if (!stored || event.tier == KvTier::kHost) {
      EXPECT_TRUE(event.token_ids.empty());
      EXPECT_TRUE(event.parent_hash == kNone);
      return out;
    }
    EXPECT_EQ(event.token_ids.size(), size_t{kBlockSize});
    return out + " < " + name(event.parent_hash) + ": " + std::to_string(event.token_ids[0]);
  }

  std::vector<TokenId> tokens;
  BlockTransfers transfers;
};

using Events = std::vector<std::string>;

TEST(BlockManager, RowsGrowByWholeBlocks) {
  Blocks blocks(0);
  EXPECT_EQ(blocks.stride(), 6);
  ASSERT_TRUE(blocks.grow(0, 1));
  EXPECT_EQ(blocks.num_blocks_of(0), 1);
  ASSERT_TRUE(blocks.grow(0, 4));
  EXPECT_EQ(blocks.num_blocks_of(0), 1);
  ASSERT_TRUE(blocks.grow(0, 5));
  EXPECT_EQ(blocks.num_blocks_of(0), 2);
  ASSERT_TRUE(blocks.grow(0, 3));  // never shrinks
  EXPECT_EQ(blocks.num_blocks_of(0), 2);
  blocks.check_integrity();
}

TEST(BlockManager, GrowIsAllOrNothing) {
  Blocks blocks(0);
  ASSERT_TRUE(blocks.grow(0, 16));
  EXPECT_FALSE(blocks.grow(1, 12));
  EXPECT_EQ(blocks.num_blocks_of(1), 0);
  EXPECT_EQ(blocks.pool().num_free(), 2);
  blocks.check_integrity();
  EXPECT_TRUE(blocks.grow(1, 8));
}

TEST(BlockManager, FreeLeavesAnEmptyRowOfZeros) {
  Blocks blocks(0);
  ASSERT_TRUE(blocks.grow(1, 18));
  blocks.free(1, Keep::kCache);
  EXPECT_EQ(blocks.num_blocks_of(1), 0);
  for (int32_t i = 0; i < blocks.stride(); ++i) EXPECT_EQ(blocks.block_at(1, i), 0);
  EXPECT_EQ(blocks.pool().num_free(), 6);
  blocks.check_integrity();
}

TEST(BlockManager, FreeKeepsTheFirstBlocksOfARow) {
  Blocks blocks(0);
  ASSERT_TRUE(blocks.grow(0, 4));  // block 0, so that no entry below is 0 by right
  ASSERT_TRUE(blocks.grow(1, 18));
  const BlockId second = blocks.block_at(1, 1);
  blocks.free(1, Keep::kCache, 2);
  EXPECT_EQ(blocks.num_blocks_of(1), 2);
  EXPECT_EQ(blocks.block_at(1, 1), second);
  for (int32_t i = 2; i < blocks.stride(); ++i) EXPECT_EQ(blocks.block_at(1, i), 0);
  EXPECT_EQ(blocks.pool().num_free(), 3);
  blocks.free(1, Keep::kCache, 3);  // has fewer already
  EXPECT_EQ(blocks.num_blocks_of(1), 2);
  blocks.check_integrity();
}

TEST(BlockManager, FindsTheLongestPublishedPrefix) {
  Blocks blocks(0);
  const std::vector<BlockHash> hashes = hashes_of(1);
  ASSERT_TRUE(blocks.grow(0, 16));
  blocks.publish(0, 0, 2, hashes.data(), blocks.tokens.data(), false);
  blocks.publish(0, 3, 4, hashes.data(), blocks.tokens.data(), false);  // a gap ends the run
  const CachedPrefix prefix = blocks.find(1);
  ASSERT_EQ(prefix.blocks.size(), 2u);
  EXPECT_EQ(prefix.num_held, 2);
  EXPECT_EQ(prefix.num_on_host, 0);
  EXPECT_EQ(prefix.blocks[1].device, blocks.block_at(0, 1));

  EXPECT_EQ(blocks.take_cached(1, prefix.blocks), 2);
  EXPECT_EQ(blocks.num_blocks_of(1), 2);
  EXPECT_EQ(blocks.pool().block(blocks.block_at(0, 0)).ref_count, 2);
  blocks.check_integrity();
  blocks.free(0, Keep::kCache);
  EXPECT_EQ(blocks.pool().block(blocks.block_at(1, 0)).ref_count, 1);
  blocks.check_integrity();
  EXPECT_EQ(blocks.find(1).num_held, 2);
  blocks.free(1, Keep::kCache);
  EXPECT_EQ(blocks.find(1).num_held, 0);
  EXPECT_TRUE(blocks.transfers.empty());
}

TEST(BlockManager, APrefixOutlivesItsTail) {
  Blocks blocks(0);
  blocks.compute(0, 1, 4);
  blocks.free(0, Keep::kCache);
  ASSERT_TRUE(blocks.grow(1, 16));  // two that were never used, then two of the cached
  EXPECT_EQ(blocks.num_found(1), 2u);
}

TEST(BlockManager, ForgottenBlocksAreNotFoundAndTakenFirst) {
  Blocks blocks(0);
  blocks.compute(0, 1, 2);
  const BlockId first = blocks.block_at(0, 0);
  blocks.free(0, Keep::kForget);
  EXPECT_EQ(blocks.num_found(1), 0u);
  EXPECT_EQ(blocks.pool().num_published(), 0);
  ASSERT_TRUE(blocks.grow(1, 1));
  EXPECT_EQ(blocks.block_at(1, 0), first);
  blocks.check_integrity();
}

TEST(BlockManager, OnlyTheLastHolderForgets) {
  Blocks blocks(0);
  blocks.compute(0, 1, 2);
  blocks.fork(0, 1, 2);
  blocks.free(0, Keep::kForget);
  EXPECT_EQ(blocks.num_found(1), 2u);
  blocks.free(1, Keep::kCache);
  EXPECT_EQ(blocks.num_found(1), 2u);
  blocks.check_integrity();
}

TEST(BlockManager, AForkSharesTheFirstBlocks) {
  Blocks blocks(0);
  ASSERT_TRUE(blocks.grow(0, 11));
  blocks.fork(0, 1, 2);
  EXPECT_EQ(blocks.num_blocks_of(1), 2);
  for (int32_t i = 0; i < 2; ++i) {
    EXPECT_EQ(blocks.block_at(1, i), blocks.block_at(0, i));
    EXPECT_EQ(blocks.pool().block(blocks.block_at(0, i)).ref_count, 2);
  }
  EXPECT_EQ(blocks.pool().block(blocks.block_at(0, 2)).ref_count, 1);
  EXPECT_TRUE(blocks.transfers.empty());
  blocks.check_integrity();
}

TEST(BlockManager, TheLastHolderWritesInPlaceTheOthersIntoCopies) {
  Blocks blocks(0);
  ASSERT_TRUE(blocks.grow(0, 6));
  blocks.fork(0, 1, 2);
  blocks.fork(0, 2, 2);
  const BlockId shared = blocks.block_at(0, 1);
  for (const int32_t row : {0, 2}) {
    ASSERT_TRUE(blocks.make_writable(row, 1));
    const BlockId own = blocks.block_at(row, 1);
    EXPECT_NE(own, shared);
    EXPECT_EQ(blocks.pool().block(own).ref_count, 1);
    ASSERT_FALSE(blocks.transfers.block_copies.empty());
    EXPECT_EQ(blocks.transfers.block_copies.back().src, shared);
    EXPECT_EQ(blocks.transfers.block_copies.back().dst, own);
    ASSERT_TRUE(blocks.make_writable(row, 1));  // is already
    EXPECT_EQ(blocks.block_at(row, 1), own);
    blocks.check_integrity();
  }
  ASSERT_TRUE(blocks.make_writable(1, 1));
  EXPECT_EQ(blocks.block_at(1, 1), shared);
  EXPECT_EQ(blocks.transfers.block_copies.size(), 2u);
  EXPECT_EQ(blocks.stats().num_copied, 2);
  EXPECT_EQ(blocks.pool().block(blocks.block_at(0, 0)).ref_count, 3);
}

TEST(BlockManager, ACopyNeedsAFreeBlock) {
  Blocks blocks(0);
  ASSERT_TRUE(blocks.grow(0, 4));
  blocks.fork(0, 1, 1);
  ASSERT_TRUE(blocks.grow(2, 18));
  EXPECT_FALSE(blocks.make_writable(1, 0));
  EXPECT_EQ(blocks.block_at(1, 0), blocks.block_at(0, 0));
  EXPECT_TRUE(blocks.transfers.empty());
  blocks.check_integrity();
  blocks.free(0, Keep::kCache);
  EXPECT_TRUE(blocks.make_writable(1, 0));
  EXPECT_TRUE(blocks.transfers.empty());
}

// The host tier.

TEST(HostTier, EvictedBlocksGoThereIfTheyAreToBeKept) {
  Blocks blocks(4);
  blocks.compute(0, 1, 2);
  blocks.compute(1, 2, 2);
  const BlockId tail = blocks.block_at(0, 1);
  blocks.free(0, Keep::kOffload);
  blocks.free(1, Keep::kCache);
  ASSERT_TRUE(blocks.grow(2, 8));  // two that were never used
  EXPECT_TRUE(blocks.transfers.empty());
  ASSERT_TRUE(blocks.grow(2, 12));
  ASSERT_EQ(blocks.transfers.swap_outs.size(), 1u);
  EXPECT_EQ(blocks.transfers.swap_outs[0].device, tail);
  EXPECT_EQ(blocks.transfers.swap_outs[0].host, blocks.host_pool().find(hashes_of(1)[1]));
  EXPECT_FALSE(blocks.on_device(1, 1));
  blocks.check_integrity();
  blocks.free(2, Keep::kForget);
  ASSERT_TRUE(blocks.grow(2, 18));
  EXPECT_TRUE(blocks.on_host(1, 0));
  EXPECT_EQ(blocks.num_found(1), 2u);
  EXPECT_EQ(blocks.find(1).num_on_host, 2);
  EXPECT_FALSE(blocks.on_host(2, 1));  // evicted, too
  EXPECT_EQ(blocks.num_found(2), 1u);
  EXPECT_EQ(blocks.stats().num_swapped_out, 2);
  EXPECT_EQ(blocks.transfers.swap_outs.size(), 2u);
  blocks.check_integrity();
}

TEST(HostTier, WithoutOneEvictedBlocksAreLost) {
  Blocks blocks(0);
  blocks.compute(3, 1, 3);
  blocks.free(3, Keep::kOffload);
  ASSERT_TRUE(blocks.grow(0, 18));
  ASSERT_TRUE(blocks.grow(1, 4));
  EXPECT_EQ(blocks.num_found(1), 0u);
  EXPECT_TRUE(blocks.transfers.empty());
}

TEST(HostTier, NothingGoesThereBeforeTheFirstStep) {
  Blocks blocks(small_config(4));
  blocks.compute(0, 1, 4);
  blocks.free(0, Keep::kOffload);
  ASSERT_TRUE(blocks.grow(1, 18));
  EXPECT_EQ(blocks.host_pool().num_published(), 0);
  blocks.check_integrity();
}

TEST(HostTier, OffloadIsWhatAnyHolderAskedFor) {
  Blocks blocks(4);
  blocks.compute(0, 1, 1);
  blocks.fork(0, 1, 1);
  blocks.free(0, Keep::kOffload);
  blocks.free(1, Keep::kCache);
  EXPECT_TRUE(blocks.pool().block(blocks.find(1).blocks[0].device).offload);
  // Who was preempted has come back, and finished.
  blocks.take_cached(0, blocks.find(1).blocks);
  blocks.free(0, Keep::kCache);
  EXPECT_FALSE(blocks.pool().block(blocks.find(1).blocks[0].device).offload);
  blocks.check_integrity();
}

TEST(HostTier, AnotherHolderLeavesTheWishToOffloadAlone) {
  Blocks blocks(4);
  blocks.compute(0, 1, 1);
  blocks.fork(0, 1, 1);
  blocks.free(0, Keep::kOffload);
  blocks.take_cached(2, blocks.find(1).blocks);
  blocks.free(1, Keep::kCache);
  blocks.free(2, Keep::kCache);
  EXPECT_TRUE(blocks.pool().block(blocks.find(1).blocks[0].device).offload);
}

TEST(HostTier, BlocksComeBackUnpublishedAndStayThere) {
  Blocks blocks(4);
  ASSERT_TRUE(blocks.grow(0, 4));
  blocks.evict(1, 3);
  ASSERT_EQ(blocks.transfers.swap_outs.size(), 3u);
  blocks.begin();
  const CachedPrefix prefix = blocks.find(1);
  ASSERT_EQ(prefix.blocks.size(), 3u);
  EXPECT_EQ(prefix.num_on_host, 3);
  EXPECT_EQ(prefix.num_held, 0);
  EXPECT_EQ(blocks.take_cached(1, prefix.blocks), 0);
  EXPECT_EQ(blocks.num_blocks_of(1), 3);
  ASSERT_EQ(blocks.transfers.swap_ins.size(), 3u);
  for (const BlockSwap& swap : blocks.transfers.swap_ins) {
    int32_t i = 0;
    while (blocks.block_at(1, i) != swap.device) ++i;
    EXPECT_EQ(swap.host, blocks.host_pool().find(hashes_of(1)[i]));
    EXPECT_EQ(blocks.host_pool().block(swap.host).ref_count, 1);
    EXPECT_FALSE(blocks.on_device(1, i));
  }
  EXPECT_EQ(blocks.stats().num_swapped_in, 3);
  blocks.check_integrity();

  blocks.publish(1, 0, 3, hashes_of(1).data(), blocks.tokens.data(), false);
  EXPECT_EQ(blocks.find(1).num_on_host, 0);
  EXPECT_EQ(blocks.find(1).num_held, 3);
  EXPECT_TRUE(blocks.on_host(1, 2));
  // Evicted once more: nothing to be moved.
  blocks.free(1, Keep::kOffload);
  blocks.begin();
  EXPECT_EQ(blocks.host_pool().num_free(), 4);
  ASSERT_TRUE(blocks.take_all());
  EXPECT_TRUE(blocks.transfers.empty());
  EXPECT_EQ(blocks.find(1).num_on_host, 3);
  blocks.check_integrity();
}

TEST(HostTier, TakesWhatIsOnTheDeviceFromThere) {
  Blocks blocks(4);
  blocks.compute(0, 1, 3);
  blocks.free(0, Keep::kOffload);
  ASSERT_TRUE(blocks.grow(3, 16));  // evicts the last block
  ASSERT_EQ(blocks.transfers.swap_outs.size(), 1u);
  blocks.free(3, Keep::kForget);
  blocks.begin();
  const CachedPrefix prefix = blocks.find(1);
  EXPECT_EQ(prefix.num_on_host, 1);
  EXPECT_EQ(blocks.take_cached(1, prefix.blocks), 2);
  EXPECT_EQ(blocks.transfers.swap_ins.size(), 1u);
  EXPECT_EQ(blocks.block_at(1, 0), blocks.pool().find(hashes_of(1)[0]));
  EXPECT_EQ(blocks.block_at(1, 2), blocks.transfers.swap_ins[0].device);
  blocks.check_integrity();
}

// What is found must not be evicted by what the same call swaps in: neither on the device ...
TEST(HostTier, SwappingInEvictsNothingOfThePrefix) {
  Blocks blocks(4);
  blocks.evict(1, 2);  // both blocks on the host
  blocks.begin();
  ASSERT_TRUE(blocks.grow(1, 16));
  blocks.compute(0, 1, 1);  // and the first on the device, ...
  blocks.compute(2, 2, 1);
  blocks.free(0, Keep::kCache);  // ... where it is the next to be taken
  blocks.free(2, Keep::kCache);
  const BlockId first = blocks.pool().first_free();
  EXPECT_EQ(first, blocks.find(1).blocks[0].device);
  EXPECT_EQ(blocks.take_cached(2, blocks.find(1).blocks), 1);
  EXPECT_EQ(blocks.block_at(2, 0), first);
  EXPECT_NE(blocks.block_at(2, 1), first);
  EXPECT_TRUE(blocks.on_device(1, 0));
  EXPECT_EQ(blocks.num_found(2), 0u);
  blocks.check_integrity();
}

// ... nor on the host.
TEST(HostTier, WhatIsSwappedInIsNotOverwrittenInTheSameStep) {
  Blocks blocks(2);
  blocks.evict(1, 2);
  EXPECT_EQ(blocks.host_pool().num_published(), 2);
  blocks.begin();
  for (int32_t row = 0; row < 3; ++row) blocks.compute(row, 2 + row, 2);
  for (int32_t row = 0; row < 3; ++row) blocks.free(row, Keep::kOffload);
  blocks.take_cached(0, blocks.find(1).blocks);  // evicts prompt 2
  EXPECT_TRUE(blocks.transfers.swap_outs.empty());
  EXPECT_EQ(blocks.transfers.swap_ins.size(), 2u);
  EXPECT_EQ(blocks.num_found(2), 0u);
  EXPECT_TRUE(blocks.on_host(1, 0) && blocks.on_host(1, 1));
  blocks.check_integrity();
  blocks.begin();
  ASSERT_TRUE(blocks.grow(1, 4));  // evicts a block of prompt 3
  EXPECT_EQ(blocks.transfers.swap_outs.size(), 1u);
  blocks.check_integrity();
}

TEST(HostTier, NoBlockIsTheTargetOfTwoSwapsInAStep) {
  Blocks blocks(1);
  blocks.compute(0, 1, 3);
  blocks.free(0, Keep::kOffload);
  ASSERT_TRUE(blocks.grow(1, 18));
  EXPECT_EQ(blocks.transfers.swap_outs.size(), 1u);
  EXPECT_TRUE(blocks.on_host(1, 2));
  EXPECT_FALSE(blocks.on_host(1, 1));
  blocks.begin();
  ASSERT_TRUE(blocks.grow(2, 4));
  EXPECT_TRUE(blocks.on_host(1, 0));
  blocks.check_integrity();
}

TEST(HostTier, GivesUpTheLeastRecentlyUsedTailFirst) {
  Blocks blocks(4);
  blocks.evict(1, 2);
  blocks.evict(2, 2);
  blocks.begin();
  // A use: swapped in. Another: evicted from the device again.
  blocks.take_cached(0, blocks.find(1).blocks);
  blocks.publish(0, 0, 2, hashes_of(1).data(), blocks.tokens.data(), false);
  blocks.free(0, Keep::kCache);
  blocks.begin();
  blocks.evict(3, 1);
  EXPECT_FALSE(blocks.on_host(2, 1));
  blocks.begin();
  blocks.compute(0, 2, 1);  // on the host, too
  blocks.free(0, Keep::kOffload);
  ASSERT_TRUE(blocks.take_all());
  EXPECT_TRUE(blocks.transfers.empty());
  blocks.free(3, Keep::kForget);
  blocks.begin();
  blocks.evict(4, 1);
  EXPECT_FALSE(blocks.on_host(1, 1));
  blocks.begin();
  blocks.evict(5, 1);
  EXPECT_FALSE(blocks.on_host(1, 0));
  blocks.begin();
  blocks.evict(6, 1);
  EXPECT_FALSE(blocks.on_host(3, 0));
  EXPECT_TRUE(blocks.on_host(2, 0));
  blocks.check_integrity();
}

// A row that is freed in the step that swaps it in: its block goes to another, whose contents must
// be its own.
TEST(HostTier, ABlockTakenAgainIsNotSwappedIn) {
  Blocks blocks(4);
  ASSERT_TRUE(blocks.grow(0, 12));
  blocks.evict(1, 2);
  blocks.begin();
  blocks.take_cached(1, blocks.find(1).blocks);
  const BlockId second = blocks.block_at(1, 1);
  const BlockId first = blocks.block_at(1, 0);
  blocks.free(1, Keep::kOffload);
  EXPECT_FALSE(blocks.on_device(1, 0));
  blocks.fork(0, 2, 3);
  ASSERT_TRUE(blocks.make_writable(2, 2));
  EXPECT_EQ(blocks.block_at(2, 2), first);
  ASSERT_EQ(blocks.transfers.swap_ins.size(), 1u);
  EXPECT_EQ(blocks.transfers.swap_ins[0].device, second);
  EXPECT_EQ(blocks.stats().num_swapped_in, 1);
  blocks.check_integrity();
  blocks.take_cached(1, blocks.find(1).blocks);
  EXPECT_EQ(blocks.transfers.swap_ins.size(), 2u);
  EXPECT_NE(blocks.transfers.swap_ins[0].device, blocks.transfers.swap_ins[1].device);
  blocks.check_integrity();
  blocks.begin();
  blocks.free(1, Keep::kForget);
  ASSERT_TRUE(blocks.grow(1, 8));  // of an earlier step: nothing to be cancelled
  EXPECT_EQ(blocks.stats().num_swapped_in, 2);
  EXPECT_EQ(blocks.host_pool().num_free(), 4);
  blocks.check_integrity();
}

TEST(HostTier, ADiscardedStepSwappedNothingOut) {
  Blocks blocks(4);
  blocks.evict(1, 1);
  blocks.begin();
  blocks.evict(2, 2);
  blocks.take_cached(0, blocks.find(2).blocks);
  blocks.discard_step(blocks.transfers);
  EXPECT_EQ(blocks.num_found(2), 0u);
  EXPECT_EQ(blocks.num_found(1), 1u);
  blocks.check_integrity();
  blocks.free(0, Keep::kForget);
  blocks.discard_step(blocks.transfers);  // no harm
  blocks.begin();
  EXPECT_EQ(blocks.host_pool().num_free(), 4);
  blocks.check_integrity();
  blocks.evict(3, 3);  // the places are free again: prompt 1 stays
  EXPECT_EQ(blocks.num_found(1), 1u);
}

TEST(HostTier, ResetForgetsBothTiers) {
  Blocks blocks(4);
  blocks.evict(1, 2);
  blocks.compute(0, 2, 2);
  blocks.reset_prefix_cache();
  EXPECT_EQ(blocks.num_found(1) + blocks.num_found(2), 0u);
  EXPECT_EQ(blocks.num_blocks_of(0), 2);
  blocks.check_integrity();
  blocks.begin();
  blocks.check_integrity();
}

// KV events.

TEST(KvEvents, SayWhatIsStoredAndRemoved) {
  Blocks blocks(0);
  blocks.compute(0, 1, 2, true);
  EXPECT_EQ(blocks.events(), (Events{"+d 1.0 < none: 100", "+d 1.1 < 1.0: 104"}));
  EXPECT_TRUE(blocks.events().empty());
  blocks.compute(0, 1, 3, true);  // the first two are known
  EXPECT_EQ(blocks.events(), (Events{"+d 1.2 < 1.1: 108"}));
  blocks.compute(1, 1, 2, true);  // the same contents again
  blocks.free(0, Keep::kCache);
  EXPECT_TRUE(blocks.events().empty());
  ASSERT_TRUE(blocks.grow(2, 8));
  EXPECT_EQ(blocks.events(), (Events{"-d 1.2"}));
  blocks.take_cached(0, blocks.find(1).blocks);
  blocks.free(0, Keep::kForget);
  EXPECT_EQ(blocks.events(), (Events{"-d 1.1", "-d 1.0"}));
  blocks.compute(1, 1, 1, true);
  blocks.reset_prefix_cache();
  blocks.free(1, Keep::kForget);
  EXPECT_EQ(blocks.events(), (Events{"+d 1.0 < none: 100", "cleared"}));
  EXPECT_TRUE(blocks.events().empty());
}

TEST(KvEvents, KeepSilentAboutWhatIsNotAnnounced) {
  Blocks blocks(2);
  blocks.evict(1, 2);
  blocks.begin();
  blocks.take_cached(0, blocks.find(1).blocks);
  blocks.publish(0, 0, 2, hashes_of(1).data(), blocks.tokens.data(), false);
  blocks.free(0, Keep::kForget);
  blocks.discard_step(blocks.transfers);
  EXPECT_TRUE(blocks.events().empty());
}

TEST(KvEvents, NeedToBeEnabled) {
  BlockManagerConfig config = small_config(2);
  config.enable_kv_events = false;
  Blocks blocks(config);
  blocks.begin();
  blocks.evict(1, 3, true);
  blocks.reset_prefix_cache();
  EXPECT_TRUE(blocks.events().empty());
}

TEST(KvEvents, FollowABlockToTheHostAndBack) {
  Blocks blocks(1);
  blocks.evict(1, 1, true);
  EXPECT_EQ(blocks.events(), (Events{"+d 1.0 < none: 100", "+h 1.0", "-d 1.0"}));
  blocks.begin();
  blocks.take_cached(0, blocks.find(1).blocks);
  EXPECT_TRUE(blocks.events().empty());
  blocks.publish(0, 0, 1, hashes_of(1).data(), blocks.tokens.data(), false);  // known to be public
  EXPECT_EQ(blocks.events(), (Events{"+d 1.0 < none: 100"}));
  blocks.free(0, Keep::kOffload);
  ASSERT_TRUE(blocks.grow(0, 18));
  ASSERT_TRUE(blocks.grow(1, 4));
  EXPECT_EQ(blocks.events(), (Events{"-d 1.0"}));  // never left the host
  blocks.begin();
  blocks.free(0, Keep::kForget);
  blocks.free(1, Keep::kForget);
  blocks.evict(2, 1, true);
  EXPECT_EQ(blocks.events(), (Events{"+d 2.0 < none: 100", "-h 1.0", "+h 2.0", "-d 2.0"}));
  blocks.discard_step(blocks.transfers);
  EXPECT_EQ(blocks.events(), (Events{"-h 2.0"}));
}

TEST(KvEvents, TellOfAHostBlockThatIsAnnouncedLater) {
  Blocks blocks(1);
  blocks.evict(1, 1, false);
  blocks.evict(1, 1, true);
  EXPECT_EQ(blocks.events(), (Events{"+d 1.0 < none: 100", "+h 1.0", "-d 1.0"}));
  blocks.check_integrity();
}

TEST(BlockManager, IntegrityCheckNoticesAHolderTooMany) {
  Blocks blocks(2);
  ASSERT_TRUE(blocks.grow(0, 4));
  const_cast<BlockPool&>(blocks.pool()).add_ref(blocks.block_at(0, 0));
  EXPECT_THROW(blocks.check_integrity(), Error);
}

TEST(BlockManager, IntegrityCheckNoticesAForgottenPin) {
  Blocks blocks(2);
  blocks.check_integrity();
  const_cast<BlockPool&>(blocks.host_pool()).allocate();
  EXPECT_THROW(blocks.check_integrity(), Error);
}

TEST(BlockManager, IntegrityCheckNoticesASwapThatIsNotUnderWay) {
  Blocks blocks(2);
  const_cast<BlockPool&>(blocks.pool()).set_swapping_in(1, true);
  EXPECT_THROW(blocks.check_integrity(), Error);
}

TEST(BlockManager, AllocatesNothingWithoutHostTierAndEvents) {
  BlockManagerConfig config = small_config();
  config.enable_kv_events = false;
  Blocks blocks(config);
  blocks.transfers.block_copies.reserve(8);
  blocks.begin_step(&blocks.transfers);
  const std::vector<BlockHash> hashes = hashes_of(1);
  const int64_t before = num_allocations;
  bool ok = true;
  for (int round = 0; round < 4; ++round) {
    const CachedPrefix prefix = blocks.find_cached(hashes);
    blocks.take_cached(0, prefix.blocks);
    ok &= blocks.grow(0, 16);
    blocks.publish(0, 0, 3, hashes.data(), blocks.tokens.data(), true);
    blocks.fork(0, 1, 4);
    ok &= blocks.make_writable(1, 3);
    blocks.free(0, Keep::kOffload);
    ok &= blocks.grow(2, 8);
    blocks.free(2, Keep::kCache);
    blocks.free(1, Keep::kCache);
  }
  EXPECT_EQ(num_allocations, before);
  EXPECT_TRUE(ok);
}

}  // namespace
}  // namespace fastpage
