#include "ops/attention_plan.h"

#include <algorithm>

#include "ops/kernels.h"

namespace fastpage::ops {

namespace {

using cpu::kKvTile;

// Query rows (tokens times query heads of the group) that share one pass over the KV tiles.
constexpr int kQueryRows = 96;
// A sequence with more of them has work enough for every block that it reads.
constexpr int kMaxSharingRows = 16;
// Shared prefixes within which some sequences share more: so many times over.
constexpr int kMaxLevels = 4;
// A sequence with few rows goes through its tiles with all heads at once, so that a block is read
// in one go: where there are so many sequences for each thread that cutting between tiles will do.
constexpr int kSeqsPerThread = 2;
// What reading a KV tile costs, in rows of arithmetic on it.
constexpr int64_t kTileCost = 8;

}  // namespace

void AttentionPlan::begin(const AttentionBatch& batch, const Shape& shape) {
  batch_ = batch;
  shape_ = shape;
  is_done_ = false;
  are_heads_together_ = batch.num_seqs >= kSeqsPerThread * shape.num_threads;
  levels_ = 0;
  num_state_slots_ = 0;
  const auto total =
      static_cast<size_t>(batch.num_seqs == 0 ? 0 : batch.query_start_loc[batch.num_seqs]);
  tokens_.resize(total);
  positions_.resize(total);
  state_slots_.assign(total, -1);
  next_tiles_.resize(static_cast<size_t>(batch.num_seqs));
  next_alike_.resize(static_cast<size_t>(batch.num_seqs));
  candidates_.clear();
  for (int32_t s = 0; s < batch.num_seqs; ++s) {
    const int32_t tokens = num_tokens(s);
    const int32_t start = batch.seq_lens[s] - tokens;
    for (int32_t i = 0; i < tokens; ++i) {
      const int32_t token = batch.query_start_loc[s] + i;
      tokens_[token] = token;
      positions_[token] = start + i;
    }
    next_tiles_[s] = first_tile(start);
    if (tokens > 0 && tokens * shape.group <= kMaxSharingRows && tile_end(s) - next_tiles_[s] > 1) {
      candidates_.push_back(s);
    }
  }
}

bool AttentionPlan::next_phase() {
  if (is_done_) return false;
  items_.clear();
  total_cost_ = 0;
  if (!plan_shared()) {
    plan_rest();
    is_done_ = true;
  }
  if (!items_.empty()) plan_cuts();
  return !items_.empty();
}

int32_t AttentionPlan::first_tile(int32_t position) const {
  if (shape_.sliding_window == 0) return 0;
  return std::max(0, position - shape_.sliding_window + 1) / kKvTile;
}

bool AttentionPlan::plan_shared() {
  if (candidates_.size() < 2 || levels_ == kMaxLevels) return false;
  ++levels_;
  find_groups();
  next_candidates_.clear();
  for (const int32_t leader : leaders_) {
    if (next_alike_[leader] >= 0) add_group(leader);
  }
  candidates_.swap(next_candidates_);
  return !items_.empty();
}

// Chains the candidates whose next tiles are the same blocks.
void AttentionPlan::find_groups() {
  leaders_.clear();
  size_t places = 4;
  while (places < 2 * candidates_.size()) places *= 2;
  hashed_.assign(places, -1);
  for (const int32_t s : candidates_) {
    next_alike_[s] = -1;
    size_t place = tile_hash(s) & (places - 1);
    while (hashed_[place] >= 0 && !same_tile(hashed_[place], s)) place = (place + 1) & (places - 1);
    const int32_t leader = hashed_[place];
    if (leader < 0) {
      hashed_[place] = s;
      leaders_.push_back(s);
    } else {
      next_alike_[s] = next_alike_[leader];
      next_alike_[leader] = s;
    }
  }
}

void AttentionPlan::add_group(int32_t leader) {
  int32_t tiles = common_tiles(leader, next_alike_[leader]);
  for (int32_t s = next_alike_[leader]; s >= 0; s = next_alike_[s]) {
    tiles = std::min(tiles, common_tiles(leader, s));
  }
  const auto entry_begin = static_cast<int32_t>(tokens_.size());
  AttentionItem item{};
  item.seq = leader;
  item.tile_begin = next_tiles_[leader];
  item.tile_end = item.tile_begin + tiles;
  item.is_fresh = levels_ == 1;
  for (int32_t s = leader; s >= 0; s = next_alike_[s]) {
    next_tiles_[s] += tiles;
    if (tile_end(s) - next_tiles_[s] > 1) next_candidates_.push_back(s);
    for (int32_t t = batch_.query_start_loc[s]; t < batch_.query_start_loc[s + 1]; ++t) {
      tokens_.push_back(t);
      if (state_slots_[t] < 0) state_slots_[t] = num_state_slots_++;
    }
  }
  add_items(item, entry_begin, static_cast<int32_t>(tokens_.size()));
}

void AttentionPlan::plan_rest() {
  for (int32_t s = 0; s < batch_.num_seqs; ++s) {
    AttentionItem item{};
    item.seq = s;
    item.is_last = true;
    item.is_fresh = num_tokens(s) > 0 && state_slots_[batch_.query_start_loc[s]] < 0;
    add_items(item, batch_.query_start_loc[s], batch_.query_start_loc[s + 1]);
  }
}

// One item per KV head, or for all of them, and run of tokens. The tiles of a last item follow from
// its tokens.
void AttentionPlan::add_items(AttentionItem item, int32_t entry_begin, int32_t entry_end) {
  const int32_t tokens_per_item = std::max(1, kQueryRows / shape_.group);
  const bool is_small = (entry_end - entry_begin) * shape_.group <= kMaxSharingRows;
  item.num_heads = is_small && are_heads_together_ ? shape_.num_kv_heads : 1;
  for (item.kv_head = 0; item.kv_head < shape_.num_kv_heads; item.kv_head += item.num_heads) {
    for (int32_t begin = entry_begin; begin < entry_end; begin += tokens_per_item) {
      item.entry_begin = begin;
      item.entry_end = std::min(entry_end, begin + tokens_per_item);
      if (item.is_last) {
        item.tile_begin = std::max(first_tile(position(begin)), next_tiles_[item.seq]);
        item.tile_end = position(item.entry_end - 1) / kKvTile + 1;
      }
      item.direct_end = item.tile_end;
      item.tile_cost = item.num_heads * (kTileCost + rows(item));
      item.cost_begin = total_cost_;
      item.partials = -1;
      total_cost_ += item.cost();
      items_.push_back(item);
    }
  }
}

void AttentionPlan::plan_cuts() {
  cuts_.clear();
  cut_items_.clear();
  partial_floats_ = 0;
  cuts_.push_back({0, items_[0].tile_begin});
  const bool is_small = total_cost_ * kKvTile * shape_.floats_per_row < kSerialElements * 8;
  for (int t = 1; t < shape_.num_threads && !is_small; ++t) {
    cuts_.push_back(cut_at(total_cost_ * t / shape_.num_threads));
  }
  cuts_.push_back({static_cast<int32_t>(items_.size()), 0});
}

// The tile boundary nearest to the given cost; if it lies within an item, the results of the
// item's parts get their place.
AttentionPlan::Cut AttentionPlan::cut_at(int64_t cost) {
  const auto after =
      std::upper_bound(items_.begin(), items_.end(), cost,
                       [](int64_t c, const AttentionItem& i) { return c < i.cost_begin; });
  const int32_t index = static_cast<int32_t>(after - items_.begin()) - 1;
  AttentionItem& item = items_[index];
  const int32_t tiles = item.tile_end - item.tile_begin;
  const int32_t tile =
      static_cast<int32_t>((cost - item.cost_begin + item.tile_cost / 2) / item.tile_cost);
  if (tile >= tiles) {
    const bool is_end = index + 1 == static_cast<int32_t>(items_.size());
    return {index + 1, is_end ? 0 : items_[index + 1].tile_begin};
  }
  if (tile > 0 && item.partials < 0) {
    item.partials = partial_floats_;
    item.direct_end = item.tile_begin + tile;
    partial_floats_ += (1 + tiles - tile) * state_floats(item.num_heads * rows(item));
    cut_items_.push_back(index);
  }
  return {index, item.tile_begin + tile};
}

bool AttentionPlan::same_tile(int32_t a, int32_t b) const {
  const int32_t tile = next_tiles_[a];
  return tile == next_tiles_[b] &&
         std::equal(block_table(a) + block_begin(tile), block_table(a) + block_end(tile),
                    block_table(b) + block_begin(tile));
}

uint32_t AttentionPlan::tile_hash(int32_t seq) const {
  const int32_t tile = next_tiles_[seq];
  const BlockId* table = block_table(seq);
  uint32_t hash = 0;
  for (int64_t b = block_begin(tile); b < block_end(tile); ++b) {
    hash = (hash ^ static_cast<uint32_t>(table[b])) * 0x9E3779B1u;
    hash ^= hash >> 15;
  }
  return hash;
}

// Whole tiles, from the next one on, that lie in the same blocks; each sequence keeps one at least
// to itself.
int32_t AttentionPlan::common_tiles(int32_t a, int32_t b) const {
  const int32_t tile = next_tiles_[a];
  const int32_t end = std::min(tile_end(a), tile_end(b)) - 1;
  const BlockId* x = block_table(a);
  const BlockId* y = block_table(b);
  const int64_t last = block_end(end - 1);
  const int64_t alike =
      std::mismatch(x + block_begin(tile), x + last, y + block_begin(tile)).first - x;
  return std::min<int32_t>(end, static_cast<int32_t>(alike * shape_.block_size / kKvTile)) - tile;
}

}  // namespace fastpage::ops
