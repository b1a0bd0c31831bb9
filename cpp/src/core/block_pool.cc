#include "fastpage/block_pool.h"

#include "core/siphash.h"

namespace fastpage {

namespace {

// {0, 0} means "no hash".
BlockHash never_none(BlockHash hash) { return hash ? hash : BlockHash{1, 0}; }

uint64_t table_size(int32_t num_blocks) {
  uint64_t size = 16;
  while (size < 2 * static_cast<uint64_t>(num_blocks)) size *= 2;
  return size;
}

void require(bool ok, const char* what, BlockId id) {
  if (!ok) throw Error("block " + std::to_string(id) + ": " + what);
}

}  // namespace

BlockHash BlockHasher::root(std::string_view cache_salt) const {
  SipHash128 sip(k0_, k1_);
  uint64_t word = 0;
  for (size_t i = 0; i < cache_salt.size(); ++i) {
    word |= static_cast<uint64_t>(static_cast<unsigned char>(cache_salt[i])) << (8 * (i % 8));
    if (i % 8 == 7) {
      sip.add(word);
      word = 0;
    }
  }
  return never_none(sip.finish(word, cache_salt.size()));
}

BlockHash BlockHasher::next(BlockHash parent, Span<const TokenId> block_tokens) const {
  SipHash128 sip(k0_, k1_);
  sip.add(parent.lo);
  sip.add(parent.hi);
  const size_t n = block_tokens.size();
  for (size_t i = 0; i + 1 < n; i += 2) {
    sip.add(static_cast<uint32_t>(block_tokens[i]) |
            static_cast<uint64_t>(static_cast<uint32_t>(block_tokens[i + 1])) << 32);
  }
  const uint64_t tail = n % 2 != 0 ? static_cast<uint32_t>(block_tokens[n - 1]) : 0;
  return never_none(sip.finish(tail, 16 + 4 * n));
}

BlockPool::BlockPool(int32_t num_blocks)
    : blocks_(static_cast<size_t>(num_blocks) + 1),
      table_(table_size(num_blocks), kNoBlock),
      table_mask_(table_.size() - 1),
      num_free_(num_blocks) {
  // A circle through the sentinel, whose next is the first to be taken.
  for (int32_t id = 0; id <= num_blocks; ++id) {
    blocks_[id].next_free = id == num_blocks ? 0 : id + 1;
    blocks_[id].prev_free = id == 0 ? num_blocks : id - 1;
  }
}

BlockId BlockPool::allocate() {
  if (num_free_ == 0) return kNoBlock;
  const BlockId id = blocks_.back().next_free;
  unlink_free(id);
  if (blocks_[id].hash) forget(id);
  blocks_[id].ref_count = 1;
  return id;
}

void BlockPool::add_ref(BlockId id) {
  if (blocks_[id].ref_count++ == 0) unlink_free(id);
}

void BlockPool::release(BlockId id) {
  if (--blocks_[id].ref_count == 0) link_free(id);
}

bool BlockPool::publish(BlockId id, BlockHash hash) {
  uint64_t i = hash.lo & table_mask_;
  for (; table_[i] != kNoBlock; i = (i + 1) & table_mask_) {
    if (blocks_[table_[i]].hash == hash) return false;
  }
  table_[i] = id;
  blocks_[id].hash = hash;
  ++num_published_;
  return true;
}

void BlockPool::unpublish(BlockId id) {
  forget(id);
  if (blocks_[id].ref_count != 0) return;
  unlink_free(id);
  link_free(id);
}

BlockId BlockPool::find(BlockHash hash) const {
  for (uint64_t i = hash.lo & table_mask_; table_[i] != kNoBlock; i = (i + 1) & table_mask_) {
    if (blocks_[table_[i]].hash == hash) return table_[i];
  }
  return kNoBlock;
}

void BlockPool::reset_prefix_cache() {
  for (Block& block : blocks_) {
    block.hash = {};
    block.announced = block.offload = false;
  }
  table_.assign(table_.size(), kNoBlock);
  num_published_ = 0;
}

void BlockPool::forget(BlockId id) {
  uint64_t hole = blocks_[id].hash.lo & table_mask_;
  while (table_[hole] != id) hole = (hole + 1) & table_mask_;
  // Backward shift: an entry further on moves into the hole unless its home lies after the hole.
  for (uint64_t i = (hole + 1) & table_mask_; table_[i] != kNoBlock; i = (i + 1) & table_mask_) {
    const uint64_t home = blocks_[table_[i]].hash.lo & table_mask_;
    if (((i - home) & table_mask_) >= ((i - hole) & table_mask_)) {
      table_[hole] = table_[i];
      hole = i;
    }
  }
  table_[hole] = kNoBlock;
  blocks_[id].hash = {};
  blocks_[id].announced = blocks_[id].offload = false;
  --num_published_;
}

// At the end of the list if it can be found, else at its front.
void BlockPool::link_free(BlockId id) {
  Block& block = blocks_[id];
  const BlockId sentinel = num_blocks();
  const BlockId prev = block.hash ? blocks_[sentinel].prev_free : sentinel;
  const BlockId next = blocks_[prev].next_free;
  block.prev_free = prev;
  block.next_free = next;
  blocks_[prev].next_free = id;
  blocks_[next].prev_free = id;
  ++num_free_;
}

void BlockPool::unlink_free(BlockId id) {
  Block& block = blocks_[id];
  blocks_[block.prev_free].next_free = block.next_free;
  blocks_[block.next_free].prev_free = block.prev_free;
  block.prev_free = block.next_free = kNoBlock;
  --num_free_;
}

void BlockPool::check_integrity() const {
  const BlockId sentinel = num_blocks();
  int32_t num_listed = 0;
  for (BlockId id = sentinel; num_listed <= num_blocks(); ++num_listed) {
    const BlockId next = blocks_[id].next_free;
    require(next >= 0 && next <= sentinel, "next_free out of range", id);
    require(blocks_[next].prev_free == id, "prev_free does not lead back", next);
    if (next == sentinel) break;
    require(blocks_[next].ref_count == 0, "on the free list, yet held", next);
    id = next;
  }
  int32_t num_unheld = 0;
  int32_t num_published = 0;
  for (BlockId id = 0; id < sentinel; ++id) {
    const Block& block = blocks_[id];
    require(block.ref_count >= 0, "negative ref_count", id);
    num_unheld += block.ref_count == 0;
    if (!block.hash) {
      require(!block.announced && !block.offload, "marked for a prefix cache that lacks it", id);
      continue;
    }
    ++num_published;
    require(find(block.hash) == id, "published, yet not found by its hash", id);
  }
  int32_t num_entries = 0;
  for (const BlockId id : table_) num_entries += id != kNoBlock;
  if (num_listed != num_free_ || num_unheld != num_free_) {
    throw Error("free blocks: " + std::to_string(num_free_) + " counted, " +
                std::to_string(num_listed) + " listed, " + std::to_string(num_unheld) +
                " without a holder");
  }
  if (num_entries != num_published || num_published != num_published_) {
    throw Error("prefix cache: " + std::to_string(num_entries) + " entries for " +
                std::to_string(num_published) + " published blocks, " +
                std::to_string(num_published_) + " counted");
  }
}

}  // namespace fastpage
