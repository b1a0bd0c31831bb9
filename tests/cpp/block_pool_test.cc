#include "fastpage/block_pool.h"

#include <gtest/gtest.h>

#include <random>

namespace fastpage {
namespace {

BlockHash hash_of(uint64_t i) { return {i * 0x9e3779b97f4a7c15, i}; }

std::string to_hex(BlockHash hash) {
  std::string out;
  for (const uint64_t word : {hash.lo, hash.hi}) {
    for (int byte = 0; byte < 8; ++byte) {
      char digits[3];
      std::snprintf(digits, sizeof digits, "%02x", static_cast<unsigned>(word >> (8 * byte) & 255));
      out += digits;
    }
  }
  return out;
}

// vectors_sip128 of the authors' implementation (github.com/veorq/SipHash): key 00 01 .. 0f, input
// 00 01 .. of the given length.
TEST(BlockHasher, IsSipHash24With128Bits) {
  const BlockHasher hasher(0x0706050403020100, 0x0f0e0d0c0b0a0908);
  std::string input;
  for (char c = 0; c < 64; ++c) input += c;
  const std::pair<size_t, const char*> vectors[] = {
      {0, "a3817f04ba25a8e66df67214c7550293"},  {1, "da87c1d86b99af44347659119b22fc45"},
      {2, "8177228da4a45dc7fca38bdef60affe4"},  {3, "9c70b60c5267a94e5f33b6b02985ed51"},
      {7, "a1f1ebbed8dbc153c0b84aa61ff08239"},  {8, "3b62a9ba6258f5610f83e264f31497b4"},
      {15, "5493e99933b0a8117e08ec0f97cfc3d9"}, {63, "5150d1772f50834a503e069a973fbd7c"}};
  for (const auto& [length, expected] : vectors) {
    EXPECT_EQ(to_hex(hasher.root(std::string_view(input).substr(0, length))), expected) << length;
  }
}

// The chain hashes the bytes of (parent, tokens), little-endian.
TEST(BlockHasher, NextIsTheHashOfParentAndTokens) {
  const BlockHasher hasher(1, 2);
  const BlockHash parent{0x1122334455667788, 0x99aabbccddeeff00};
  for (const size_t n : {1, 2, 3, 16, 17}) {
    std::vector<TokenId> tokens;
    std::string bytes;
    for (const uint64_t word : {parent.lo, parent.hi}) {
      for (int i = 0; i < 8; ++i) bytes += static_cast<char>(word >> (8 * i) & 255);
    }
    for (size_t i = 0; i < n; ++i) {
      tokens.push_back(static_cast<TokenId>(i * 70001 + 5));
      for (int b = 0; b < 4; ++b) bytes += static_cast<char>(tokens.back() >> (8 * b) & 255);
    }
    EXPECT_EQ(to_hex(hasher.next(parent, tokens)), to_hex(hasher.root(bytes))) << n;
  }
}

TEST(BlockHasher, DependsOnKeySaltParentAndEveryToken) {
  const BlockHasher hasher(1, 2);
  const std::vector<TokenId> tokens = {1, 2, 3, 4};
  const BlockHash root = hasher.root("");
  const BlockHash hash = hasher.next(root, tokens);
  EXPECT_TRUE(hash == hasher.next(root, tokens));
  EXPECT_FALSE(hash == BlockHasher(1, 3).next(root, tokens));
  EXPECT_FALSE(hash == hasher.next(hasher.root("tenant"), tokens));
  for (size_t i = 0; i < tokens.size(); ++i) {
    std::vector<TokenId> other = tokens;
    ++other[i];
    EXPECT_FALSE(hash == hasher.next(root, other)) << i;
  }
}

TEST(BlockPool, GivesEachBlockOnceThenNone) {
  BlockPool pool(3);
  std::vector<bool> seen(3);
  for (int i = 0; i < 3; ++i) {
    const BlockId id = pool.allocate();
    ASSERT_GE(id, 0);
    ASSERT_FALSE(seen.at(id));
    seen[id] = true;
    EXPECT_EQ(pool.block(id).ref_count, 1);
    pool.check_integrity();
  }
  EXPECT_EQ(pool.num_free(), 0);
  EXPECT_EQ(pool.allocate(), kNoBlock);
}

TEST(BlockPool, ABlockIsFreeWhenItsLastHolderLetsGo) {
  BlockPool pool(2);
  const BlockId id = pool.allocate();
  pool.add_ref(id);
  pool.release(id);
  EXPECT_EQ(pool.num_free(), 1);
  pool.release(id);
  EXPECT_EQ(pool.num_free(), 2);
  pool.check_integrity();
}

TEST(BlockPool, FreeBlocksAreFoundUntilTaken) {
  BlockPool pool(2);
  const BlockId id = pool.allocate();
  pool.publish(id, hash_of(1));
  pool.release(id);
  EXPECT_EQ(pool.find(hash_of(1)), id);
  pool.add_ref(id);  // again in use
  EXPECT_EQ(pool.num_free(), 1);
  pool.release(id);
  pool.allocate();
  pool.allocate();
  EXPECT_EQ(pool.find(hash_of(1)), kNoBlock);
  pool.check_integrity();
}

TEST(BlockPool, EvictsTheLeastRecentlyFreedAndUselessOnesFirst) {
  BlockPool pool(4);
  BlockId ids[4];
  for (int i = 0; i < 4; ++i) ids[i] = pool.allocate();
  for (int i = 0; i < 3; ++i) pool.publish(ids[i], hash_of(i + 1));
  pool.release(ids[2]);
  pool.release(ids[0]);
  pool.release(ids[1]);
  pool.release(ids[3]);  // cannot be found: nothing is lost with it
  EXPECT_EQ(pool.allocate(), ids[3]);
  EXPECT_EQ(pool.allocate(), ids[2]);
  EXPECT_EQ(pool.allocate(), ids[0]);
  EXPECT_EQ(pool.find(hash_of(2)), ids[1]);
  pool.check_integrity();
}

TEST(BlockPool, FirstFreeIsWhatAllocateTakes) {
  BlockPool pool(3);
  const BlockId cached = pool.allocate();
  pool.publish(cached, hash_of(1));
  pool.release(cached);
  for (int i = 0; i < 3; ++i) {
    const BlockId first = pool.first_free();
    EXPECT_EQ(pool.block(first).ref_count, 0);
    EXPECT_EQ(pool.allocate(), first);
  }
  EXPECT_EQ(pool.first_free(), kNoBlock);
}

TEST(BlockPool, TheFirstBlockWithAHashStaysTheOneFound) {
  BlockPool pool(2);
  const BlockId a = pool.allocate();
  const BlockId b = pool.allocate();
  EXPECT_TRUE(pool.publish(a, hash_of(1)));
  EXPECT_FALSE(pool.publish(b, hash_of(1)));
  EXPECT_FALSE(pool.publish(a, hash_of(1)));  // nothing new
  EXPECT_EQ(pool.find(hash_of(1)), a);
  EXPECT_FALSE(pool.block(b).hash);
  EXPECT_EQ(pool.num_published(), 1);
  pool.check_integrity();
}

TEST(BlockPool, UnpublishedInUseItStaysWithItsHolder) {
  BlockPool pool(2);
  const BlockId id = pool.allocate();
  pool.publish(id, hash_of(1));
  pool.unpublish(id);
  EXPECT_EQ(pool.find(hash_of(1)), kNoBlock);
  EXPECT_EQ(pool.block(id).ref_count, 1);
  EXPECT_EQ(pool.num_free(), 1);
  EXPECT_EQ(pool.num_published(), 0);
  pool.check_integrity();
}

TEST(BlockPool, UnpublishedWhileFreeItIsTheNextToBeTaken) {
  BlockPool pool(3);
  BlockId ids[3];
  for (int i = 0; i < 3; ++i) {
    ids[i] = pool.allocate();
    pool.publish(ids[i], hash_of(i + 1));
  }
  for (const BlockId id : ids) pool.release(id);
  pool.unpublish(ids[1]);
  pool.check_integrity();
  EXPECT_EQ(pool.num_free(), 3);
  EXPECT_EQ(pool.allocate(), ids[1]);
  EXPECT_EQ(pool.allocate(), ids[0]);
}

TEST(BlockPool, MarksEndWithThePublication) {
  BlockPool pool(1);
  const auto publish_marked = [&] {
    const BlockId id = pool.allocate();
    pool.publish(id, hash_of(1));
    pool.set_announced(id, true);
    pool.set_offload(id, true);
    pool.check_integrity();
    return id;
  };
  const auto is_unmarked = [&](BlockId id) {
    pool.check_integrity();
    return !pool.block(id).announced && !pool.block(id).offload;
  };
  BlockId id = publish_marked();
  pool.release(id);
  EXPECT_FALSE(is_unmarked(id));
  pool.allocate();
  EXPECT_TRUE(is_unmarked(id));
  pool.release(id);

  id = publish_marked();
  pool.unpublish(id);
  EXPECT_TRUE(is_unmarked(id));
  pool.release(id);

  id = publish_marked();
  pool.reset_prefix_cache();
  EXPECT_TRUE(is_unmarked(id));

  pool.set_offload(id, true);  // of a block that is not published
  EXPECT_THROW(pool.check_integrity(), Error);
}

TEST(BlockPool, MayBeEmpty) {
  BlockPool pool(0);
  pool.check_integrity();
  EXPECT_EQ(pool.num_free(), 0);
  EXPECT_EQ(pool.first_free(), kNoBlock);
  EXPECT_EQ(pool.allocate(), kNoBlock);
  EXPECT_EQ(pool.find(hash_of(1)), kNoBlock);
  pool.reset_prefix_cache();
  pool.check_integrity();
}

TEST(BlockPool, ResetForgetsEverythingButHolders) {
  BlockPool pool(2);
  const BlockId id = pool.allocate();
  pool.publish(id, hash_of(1));
  pool.reset_prefix_cache();
  EXPECT_EQ(pool.find(hash_of(1)), kNoBlock);
  EXPECT_EQ(pool.num_published(), 0);
  EXPECT_EQ(pool.block(id).ref_count, 1);
  pool.check_integrity();
}

// Hashes that fall on few places of the table, so that runs are long and wrap around its end.
TEST(BlockPool, SurvivesCollidingHashes) {
  std::mt19937_64 random(7);
  BlockPool pool(24);
  std::vector<BlockId> held;
  std::vector<BlockHash> published(24);
  for (int i = 0; i < 20000; ++i) {
    if (held.size() < 20 && random() % 2 == 0) {
      const BlockId id = pool.allocate();
      ASSERT_NE(id, kNoBlock);
      if (random() % 4 != 0) {
        published[id] = BlockHash{uint64_t{0} - random() % 5, static_cast<uint64_t>(i) + 1};
        pool.publish(id, published[id]);
      }
      held.push_back(id);
    } else if (!held.empty()) {
      std::swap(held[random() % held.size()], held.back());
      if (pool.block(held.back()).hash && random() % 4 == 0) pool.unpublish(held.back());
      pool.release(held.back());
      held.pop_back();
    }
    pool.check_integrity();
    for (const BlockId id : held) {
      if (pool.block(id).hash) {
        ASSERT_EQ(pool.find(published[id]), id);
      }
    }
  }
}

TEST(BlockPool, IntegrityCheckNoticesALostBlock) {
  BlockPool pool(3);
  const BlockId id = pool.allocate();
  pool.add_ref(id);
  pool.release(id);
  pool.release(id);
  pool.check_integrity();
  pool.release(id);  // once too often
  EXPECT_THROW(pool.check_integrity(), Error);
}

}  // namespace
}  // namespace fastpage
