#include "fastpage/block_manager.h"

#include <gtest/gtest.h>

namespace fastpage {
namespace {

BlockManagerConfig small_config() {
  BlockManagerConfig config;
  config.num_blocks = 6;
  config.block_size = 4;
  config.max_num_seqs = 3;
  config.max_model_len = 18;
  return config;
}

std::vector<BlockHash> some_hashes(uint64_t n) {
  std::vector<BlockHash> hashes;
  for (uint64_t i = 1; i <= n; ++i) hashes.push_back({i * 77, i});
  return hashes;
}

TEST(BlockManager, RowsGrowByWholeBlocks) {
  BlockManager blocks(small_config());
  EXPECT_EQ(blocks.stride(), 5);
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
  BlockManager blocks(small_config());
  ASSERT_TRUE(blocks.grow(0, 16));
  EXPECT_FALSE(blocks.grow(1, 12));
  EXPECT_EQ(blocks.num_blocks_of(1), 0);
  EXPECT_EQ(blocks.pool().num_free(), 2);
  blocks.check_integrity();
  EXPECT_TRUE(blocks.grow(1, 8));
}

TEST(BlockManager, FreeLeavesAnEmptyRowOfZeros) {
  BlockManager blocks(small_config());
  ASSERT_TRUE(blocks.grow(1, 18));
  blocks.free(1, Keep::kCache);
  EXPECT_EQ(blocks.num_blocks_of(1), 0);
  for (int32_t i = 0; i < blocks.stride(); ++i) EXPECT_EQ(blocks.block_at(1, i), 0);
  EXPECT_EQ(blocks.pool().num_free(), 6);
  blocks.check_integrity();
}

TEST(BlockManager, FindsTheLongestPublishedPrefix) {
  BlockManager blocks(small_config());
  const std::vector<BlockHash> hashes = some_hashes(4);
  ASSERT_TRUE(blocks.grow(0, 16));
  blocks.publish(0, 0, 2, hashes.data(), nullptr, false);
  blocks.publish(0, 3, 4, hashes.data(), nullptr, false);  // a gap: the run ends before it
  const CachedPrefix prefix = blocks.find_cached(hashes);
  ASSERT_EQ(prefix.blocks.size(), 2u);
  EXPECT_EQ(prefix.num_held, 2);
  EXPECT_EQ(prefix.blocks[1].device, blocks.block_at(0, 1));

  blocks.take_cached(1, prefix.blocks);
  EXPECT_EQ(blocks.num_blocks_of(1), 2);
  EXPECT_EQ(blocks.pool().block(blocks.block_at(0, 0)).ref_count, 2);
  blocks.check_integrity();
  blocks.free(0, Keep::kCache);
  EXPECT_EQ(blocks.pool().block(blocks.block_at(1, 0)).ref_count, 1);
  blocks.check_integrity();
  blocks.free(1, Keep::kCache);
  EXPECT_EQ(blocks.find_cached(hashes).num_held, 0);
}

TEST(BlockManager, APrefixOutlivesItsTail) {
  BlockManager blocks(small_config());
  const std::vector<BlockHash> hashes = some_hashes(4);
  ASSERT_TRUE(blocks.grow(0, 16));
  blocks.publish(0, 0, 4, hashes.data(), nullptr, false);
  blocks.free(0, Keep::kCache);
  ASSERT_TRUE(blocks.grow(1, 16));  // two that were never used, then two of the cached
  EXPECT_EQ(blocks.find_cached(hashes).blocks.size(), 2u);
}

}  // namespace
}  // namespace fastpage
