// How a ragged batch of attention becomes items of work, and how these are shared between threads.
//
// An item is some query tokens, one KV head or all of them, and a run of KV tiles. The items of a
// phase stand in a row, and every thread takes an equal share of the cost, wherever that cuts an
// item: behind its first cut an item's tiles are computed apart and folded in order at the end.
// Folding is the same whether it happens at once or then, so the split leaves no trace in the
// result.
//
// Sequences of few query tokens whose block tables begin alike attend to what they share together,
// in a phase of its own: each block is read once for all of them. What the phase leaves of a query
// token is the state that it would have had on its own after these tiles, and the later phases go
// on from there.
#pragma once

#include <cstdint>
#include <vector>

#include "fastpage/ops.h"
#include "ops/cpu/kernel_table.h"

namespace fastpage::ops {

struct AttentionItem {
  int32_t seq;          // whose block table is read
  int32_t kv_head;      // the first one
  int32_t num_heads;    // KV heads
  int32_t entry_begin;  // of AttentionPlan::tokens()
  int32_t entry_end;
  int32_t tile_begin;  // absolute KV tiles
  int32_t tile_end;
  int32_t direct_end;  // tiles from here on are computed apart
  bool is_fresh;       // no state of an earlier phase to go on from
  bool is_last;        // the result is complete
  int64_t tile_cost;
  int64_t cost_begin;  // of all items before
  int64_t partials;    // where the parts' results lie, in floats; -1 if one thread does it all

  int64_t cost() const { return tile_cost * (tile_end - tile_begin); }
};

class AttentionPlan {
 public:
  struct Shape {
    int32_t num_kv_heads;
    int32_t group;  // query heads of a KV head
    int32_t block_size;
    int32_t sliding_window;
    int32_t num_threads;
    int64_t floats_per_row;  // of a state
  };
  struct Cut {
    int32_t item;
    int32_t tile;  // absolute, within the item
  };

  void begin(const AttentionBatch& batch, const Shape& shape);
  // Makes the items of the next phase. False if all have been run.
  bool next_phase();

  const std::vector<AttentionItem>& items() const { return items_; }
  const std::vector<Cut>& cuts() const { return cuts_; }  // thread t works between t and t + 1
  const std::vector<int32_t>& cut_items() const { return cut_items_; }  // with a cut inside
  int64_t partial_floats() const { return partial_floats_; }
  // Rows of q, and their positions.
  int32_t token(int32_t entry) const { return tokens_[entry]; }
  int32_t position(int32_t entry) const { return positions_[tokens_[entry]]; }
  // Where a query token's state is kept between phases.
  int32_t state_slot(int32_t entry) const { return state_slots_[tokens_[entry]]; }
  int32_t num_state_slots() const { return num_state_slots_; }

  // Query rows, per KV head.
  int64_t rows(const AttentionItem& item) const {
    return static_cast<int64_t>(item.entry_end - item.entry_begin) * shape_.group;
  }
  // Floats of the state of so many rows, a multiple of 16.
  int64_t state_floats(int64_t rows) const { return (rows * shape_.floats_per_row + 15) / 16 * 16; }
  const BlockId* block_table(int32_t seq) const {
    const int64_t row = batch_.block_table_rows == nullptr ? seq : batch_.block_table_rows[seq];
    return batch_.block_tables + row * batch_.block_table_stride;
  }

 private:
  int32_t num_tokens(int32_t seq) const {
    return batch_.query_start_loc[seq + 1] - batch_.query_start_loc[seq];
  }
  int32_t tile_end(int32_t seq) const { return (batch_.seq_lens[seq] - 1) / cpu::kKvTile + 1; }
  // The first tile that the token at this position sees.
  int32_t first_tile(int32_t position) const;
  // Blocks that a tile lies in: index of the first and past the last.
  int64_t block_begin(int32_t tile) const {
    return int64_t{tile} * cpu::kKvTile / shape_.block_size;
  }
  int64_t block_end(int32_t tile) const {
    return ((int64_t{tile} + 1) * cpu::kKvTile - 1) / shape_.block_size + 1;
  }

  bool plan_shared();
  void find_groups();
  void add_group(int32_t leader);
  void plan_rest();
  void add_items(AttentionItem item, int32_t entry_begin, int32_t entry_end);
  void plan_cuts();
  Cut cut_at(int64_t cost);
  bool same_tile(int32_t a, int32_t b) const;
  uint32_t tile_hash(int32_t seq) const;
  int32_t common_tiles(int32_t a, int32_t b) const;

  AttentionBatch batch_;
  Shape shape_{};
  bool is_done_ = false;
  bool are_heads_together_ = false;
  int32_t levels_ = 0;
  std::vector<int32_t> tokens_;  // all, in order; then those of groups
  std::vector<int32_t> positions_;
  std::vector<int32_t> state_slots_;
  int32_t num_state_slots_ = 0;
  std::vector<int32_t> next_tiles_;  // per sequence: up to there, earlier phases did it all
  std::vector<int32_t> candidates_;  // sequences that may share
  std::vector<int32_t> next_candidates_;
  std::vector<int32_t> hashed_;      // open-addressed: sequences by the blocks of their next tile
  std::vector<int32_t> next_alike_;  // per sequence: another one with the same next tile
  std::vector<int32_t> leaders_;

  std::vector<AttentionItem> items_;
  std::vector<Cut> cuts_;
  std::vector<int32_t> cut_items_;
  int64_t total_cost_ = 0;
  int64_t partial_floats_ = 0;
};

}  // namespace fastpage::ops
