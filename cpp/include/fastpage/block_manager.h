// Block tables: which blocks hold the KV of each sequence, in one matrix that kernels read as it
// is. Behind them a host tier, to which evicted blocks can go and come back from.
#pragma once

#include <vector>

#include "fastpage/block_pool.h"
#include "fastpage/kv_events.h"
#include "fastpage/types.h"

namespace fastpage {

struct BlockManagerConfig {
  int32_t num_blocks = 0;
  int32_t num_host_blocks = 0;  // 0 = no host tier
  int32_t block_size = 16;
  int32_t max_num_seqs = 256;    // rows
  int32_t max_model_len = 2048;  // tokens a row can hold
  bool enable_kv_events = false;
};

// Where a cached block was found: on the device, or else in the host tier.
struct CachedBlock {
  BlockId device = kNoBlock;
  BlockId host = kNoBlock;
};

struct CachedPrefix {
  Span<const CachedBlock> blocks;
  // Of them held by some row: the others take one block of the free list each.
  int32_t num_held = 0;
  int32_t num_on_host = 0;
};

// What becomes of a row's published blocks once nobody holds them. Of several holders the last one
// decides between kForget and the others; kOffload is what any of them asked for since the block
// was last taken from the free list: who was preempted comes back for it, whoever else is done
// with it.
enum class Keep : uint8_t {
  kForget,   // nothing: they cannot be found any more
  kCache,    // findable until they are evicted
  kOffload,  // findable; when evicted they go to the host tier, if there is one
};

struct BlockManagerStats {
  int64_t num_swapped_out = 0;  // blocks in transfers since the start, like all
  int64_t num_swapped_in = 0;
  int64_t num_copied = 0;
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

  // From here on the transfers that the calls below ask for are added to `transfers`, until the
  // next begin_step(). Before the first one nothing is offloaded, and nothing may be copied. The
  // host blocks of a step's swaps are pinned until then (what is evicted while all of them are
  // pinned is lost). Targets of a step's swap_outs are distinct, and so are those of its swap_ins.
  void begin_step(BlockTransfers* transfers);
  // The step's transfers never happened: its swapped out blocks are not in the host tier after all.
  // (The rows that were to be filled by copies or swap_ins are the caller's to free, with
  // Keep::kForget where nothing is published.)
  void discard_step(const BlockTransfers& transfers);

  // The longest run of leading `hashes` that is cached, on the device or on the host. The result
  // is valid until the next call, and its blocks are the caller's to take only until the next
  // call that takes or frees blocks.
  CachedPrefix find_cached(Span<const BlockHash> hashes);
  // Puts them into an empty row, which becomes one more holder of each; what is on the host is
  // swapped in, to a new block that is not published yet. The pool must have the blocks that this
  // takes. Returns the index of the first such block, or blocks.size().
  int32_t take_cached(int32_t row, Span<const CachedBlock> blocks);
  // Grows the row to hold `num_tokens`. All or nothing: false, and nothing changed, if blocks are
  // short.
  bool grow(int32_t row, int32_t num_tokens) {
    return num_tokens <= num_blocks_[row] * config_.block_size || allocate(row, num_tokens);
  }
  // Copy-on-write: if others hold that block of the row too, the row gets a copy of its own. False,
  // and nothing changed, if no block is free. Not for a block that this step swaps in, whose
  // contents come after the copies.
  bool make_writable(int32_t row, int32_t index);
  // Makes the empty row `to` one more holder of the first blocks of `from`.
  void fork(int32_t from, int32_t to, int32_t num_blocks);
  // Publishes the row's blocks [first, end): they are full and computed. hashes[i], tokens + i *
  // block_size: those of block i of the row, from 0 on. `announce`: tell the KV events (which is
  // done anyhow if the contents are announced on the host).
  void publish(int32_t row, int32_t first, int32_t end, const BlockHash* hashes,
               const TokenId* tokens, bool announce);
  // Releases the blocks of the row from `num_kept` on, last block first, so that a prefix outlives
  // its tail in the cache.
  void free(int32_t row, Keep keep, int32_t num_kept = 0);

  // Forgets every hash in both tiers (blocks in use keep their contents and holders).
  void reset_prefix_cache();
  // Moves the events since the last call to `events` (cleared first). Nothing without
  // enable_kv_events.
  void take_kv_events(std::vector<KvEvent>* events);

  const BlockPool& pool() const { return pool_; }
  const BlockPool& host_pool() const { return host_pool_; }
  const BlockManagerConfig& config() const { return config_; }
  const BlockManagerStats& stats() const { return stats_; }
  // Invariants 1: every ref_count equals the number of tables that hold the block, and the pool's
  // own.
  void check_integrity() const;

 private:
  BlockId* row_of(int32_t row) { return &tables_[static_cast<int64_t>(row) * stride_]; }
  bool allocate(int32_t row, int32_t num_tokens);
  BlockId take_block();
  void offload(BlockId id);
  void cancel_swap_in(BlockId id);
  void unpublish_host(BlockId host);
  void announce_removed(KvTier tier, BlockHash hash);

  BlockManagerConfig config_;
  BlockPool pool_;
  BlockPool host_pool_;
  int32_t stride_;
  std::vector<BlockId> tables_;
  std::vector<int32_t> num_blocks_;
  std::vector<CachedBlock> found_;  // find_cached()'s result
  BlockTransfers* transfers_ = nullptr;
  // What pins host blocks until the next begin_step(): swap_ins (`device` is the block to be
  // filled), swap_outs (kNoBlock).
  std::vector<BlockSwap> pins_;
  std::vector<KvEvent> events_;
  BlockManagerStats stats_;
};

}  // namespace fastpage
