// Physical KV blocks: who holds them, which are free, and which can be found again by what they
// contain.
#pragma once

#include <string_view>
#include <vector>

#include "fastpage/types.h"

namespace fastpage {

// 128 bits that stand for the contents of a full block and of everything before it. {0, 0} = none.
struct BlockHash {
  uint64_t lo = 0;
  uint64_t hi = 0;
  bool operator==(const BlockHash& o) const { return lo == o.lo && hi == o.hi; }
  explicit operator bool() const { return (lo | hi) != 0; }
};

// A chain of SipHash-2-4-128 (Aumasson & Bernstein 2012), keyed by a secret of the process: who
// does not know the key cannot construct two prompts whose blocks collide (a collision would show
// one tenant another's cache).
class BlockHasher {
 public:
  BlockHasher(uint64_t key_lo, uint64_t key_hi) : k0_(key_lo), k1_(key_hi) {}
  // The chain's start. Requests with different salts never share blocks.
  BlockHash root(std::string_view cache_salt) const;
  BlockHash next(BlockHash parent, Span<const TokenId> block_tokens) const;

 private:
  uint64_t k0_, k1_;
};

struct Block {
  BlockHash hash;         // set = published: findable
  int32_t ref_count = 0;  // block tables that hold it; 0 = on the free list
  BlockId prev_free = kNoBlock;
  BlockId next_free = kNoBlock;
  // BlockManager's own. The first two are for published blocks only, and end with that.
  bool announced = false;    // its publication is in the KV events, and so its removal has to be
  bool offload = false;      // goes to the host tier when it is evicted
  bool swapping_in = false;  // the current step fills it from the host tier
};
static_assert(sizeof(Block) <= 32, "two a cache line: the pool is walked all over");

// A free block keeps its hash, and can be found by it, until it is taken for something else. Blocks
// that cannot be found are taken first (nothing is lost with them), then the least recently freed.
// All operations are O(1) but those on the whole cache; nothing allocates after construction.
// Serves the device's KV cache and the host tier alike (there "held" means pinned).
class BlockPool {
 public:
  explicit BlockPool(int32_t num_blocks);

  int32_t num_blocks() const { return static_cast<int32_t>(blocks_.size()) - 1; }
  int32_t num_free() const { return num_free_; }
  int32_t num_published() const { return num_published_; }
  const Block& block(BlockId id) const { return blocks_[id]; }
  // What allocate() would take; kNoBlock if none is free.
  BlockId first_free() const { return num_free_ == 0 ? kNoBlock : blocks_.back().next_free; }

  // Takes the first block of the free list, forgets its hash. ref_count becomes 1. kNoBlock if none
  // is free.
  BlockId allocate();
  // One more holder; takes it off the free list if it was free.
  void add_ref(BlockId id);
  // One holder less; the last one puts it on the free list: at its end if the block is published,
  // else at its front.
  void release(BlockId id);

  // Makes a full block findable. False if there is one with that hash already: it stays the one
  // that is found.
  bool publish(BlockId id, BlockHash hash);
  // Makes a published block unfindable; if it is free, it is the next to be taken.
  void unpublish(BlockId id);
  BlockId find(BlockHash hash) const;  // kNoBlock if unknown
  // Forgets every hash (blocks in use keep their contents and holders).
  void reset_prefix_cache();

  void set_announced(BlockId id, bool value) { blocks_[id].announced = value; }
  void set_offload(BlockId id, bool value) { blocks_[id].offload = value; }
  void set_swapping_in(BlockId id, bool value) { blocks_[id].swapping_in = value; }

  // Walks everything; throws Error on the first broken invariant. For tests and for when idle.
  void check_integrity() const;

 private:
  void forget(BlockId id);
  void link_free(BlockId id);
  void unlink_free(BlockId id);

  std::vector<Block> blocks_;   // the last one is the free list's sentinel
  std::vector<BlockId> table_;  // open-addressed, linear probing, backward-shift deletion
  uint64_t table_mask_;
  int32_t num_free_;
  int32_t num_published_ = 0;
};

}  // namespace fastpage
