// Paged attention: how a ragged batch becomes items (a sequence, a KV head, a run of query tokens)
// and how these are shared between threads.
//
// The items stand in a row, each cut into KV tiles, and every thread takes an equal share of the
// cost, wherever that cuts an item: a cut item's tiles are computed apart and folded in order at
// the end. Folding is the same whether it happens at once or then, so the split leaves no trace in
// the result.
#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "fastpage/ops.h"
#include "ops/kernels.h"
#include "ops/scratch.h"

namespace fastpage::ops {

namespace {

using cpu::kGranule;
using cpu::kKvTile;
using cpu::kTileGranules;

// Query rows (tokens times query heads of the group) that share one pass over the KV tiles.
constexpr int kQueryRows = 96;
// What reading a KV tile costs, in rows of arithmetic on it.
constexpr int64_t kTileCost = 8;

struct Item {
  int32_t seq;
  int32_t kv_head;
  int32_t token_begin;  // within the sequence's new tokens
  int32_t token_end;
  int32_t tile_begin;  // absolute KV tiles
  int32_t tile_end;
  int64_t tile_cost;
  int64_t cost_begin;  // of all items before
  int64_t partials;    // where its tiles' results lie, in floats; -1 if one thread does it all

  int64_t cost() const { return tile_cost * (tile_end - tile_begin); }
};

struct Cut {
  int32_t item;
  int32_t tile;  // absolute, within the item
};

// The result of some tiles for the rows of an item.
struct State {
  float* out;  // [rows][padded head_dim]
  float* max;  // [rows]
  float* sum;  // [rows]

  static int64_t floats(int64_t rows, int64_t padded) {
    return (rows * (padded + 2) + 15) / 16 * 16;
  }
  static State at(float* p, int64_t rows, int64_t padded) {
    return {p, p + rows * padded, p + rows * (padded + 1)};
  }
  void clear(int64_t rows, int64_t padded) const {
    std::fill(out, out + rows * padded, 0.0f);
    std::fill(max, max + rows, -std::numeric_limits<float>::infinity());
    std::fill(sum, sum + rows, 0.0f);
  }
};

// Kept from call to call, so that a steady step allocates nothing.
struct AttentionPlan {
  std::vector<Item> items;
  std::vector<Cut> cuts;           // thread t computes what lies between cuts t and t + 1
  std::vector<int32_t> cut_items;  // items with a cut inside
  Scratch partials;
};

class PagedAttention {
 public:
  PagedAttention(const Matrix<const float>& q, const KvCacheView& cache,
                 const AttentionBatch& batch, const AttentionParams& params,
                 const Matrix<float>& out, AttentionPlan& plan)
      : q_(q),
        cache_(cache),
        batch_(batch),
        params_(params),
        out_(out),
        type_(element_type(cache.dtype, "kv cache")),
        element_size_(static_cast<int64_t>(dtype_size(cache.dtype))),
        group_(params.num_heads / cache.num_kv_heads),
        padded_((cache.head_dim + kernels().panel_width - 1) / kernels().panel_width *
                kernels().panel_width),
        plan_(plan) {}

  void run(ThreadPool& pool) {
    plan_items();
    if (plan_.items.empty()) return;
    plan_cuts(pool.num_threads());
    partials_ = plan_.partials.floats(static_cast<size_t>(partial_floats_));
    const auto part = [&](int t) { compute(plan_.cuts[t], plan_.cuts[t + 1]); };
    if (plan_.cuts.size() == 2) {
      part(0);
    } else {
      pool.run(part);
    }
    pool.parallel_for(static_cast<int64_t>(plan_.cut_items.size()), 1,
                      [&](int64_t begin, int64_t end, int) {
                        for (int64_t i = begin; i < end; ++i)
                          fold_partials(plan_.items[plan_.cut_items[i]]);
                      });
  }

 private:
  int64_t rows(const Item& item) const {
    return static_cast<int64_t>(item.token_end - item.token_begin) * group_;
  }

  void plan_items() {
    plan_.items.clear();
    total_cost_ = 0;
    const int32_t tokens_per_item = std::max(1, kQueryRows / group_);
    for (int32_t s = 0; s < batch_.num_seqs; ++s) {
      const int32_t tokens = batch_.query_start_loc[s + 1] - batch_.query_start_loc[s];
      const int32_t start = batch_.seq_lens[s] - tokens;
      for (int32_t h = 0; h < cache_.num_kv_heads; ++h) {
        for (int32_t begin = 0; begin < tokens; begin += tokens_per_item) {
          Item item{};
          item.seq = s;
          item.kv_head = h;
          item.token_begin = begin;
          item.token_end = std::min(tokens, begin + tokens_per_item);
          const int32_t oldest =
              params_.sliding_window > 0 ? start + begin - params_.sliding_window + 1 : 0;
          item.tile_begin = std::max(0, oldest) / kKvTile;
          item.tile_end = (start + item.token_end - 1) / kKvTile + 1;
          item.tile_cost = kTileCost + rows(item);
          item.cost_begin = total_cost_;
          item.partials = -1;
          total_cost_ += item.cost();
          plan_.items.push_back(item);
        }
      }
    }
  }

  void plan_cuts(int threads) {
    plan_.cuts.clear();
    plan_.cut_items.clear();
    partial_floats_ = 0;
    const int32_t num_items = static_cast<int32_t>(plan_.items.size());
    if (total_cost_ * cache_.head_dim * kKvTile < kSerialElements * 8) threads = 1;
    plan_.cuts.push_back({0, plan_.items[0].tile_begin});
    for (int t = 1; t < threads; ++t) plan_.cuts.push_back(cut_at(total_cost_ * t / threads));
    plan_.cuts.push_back({num_items, 0});
  }

  // The tile boundary nearest to the given cost; if it lies within an item, the item's partial
  // results get their place.
  Cut cut_at(int64_t cost) {
    const auto after = std::upper_bound(plan_.items.begin(), plan_.items.end(), cost,
                                        [](int64_t c, const Item& i) { return c < i.cost_begin; });
    const int32_t index = static_cast<int32_t>(after - plan_.items.begin()) - 1;
    Item& item = plan_.items[index];
    const int32_t tiles = item.tile_end - item.tile_begin;
    const int32_t tile =
        static_cast<int32_t>((cost - item.cost_begin + item.tile_cost / 2) / item.tile_cost);
    if (tile >= tiles) {
      return {index + 1, index + 1 < static_cast<int32_t>(plan_.items.size())
                             ? plan_.items[index + 1].tile_begin
                             : 0};
    }
    if (tile > 0 && item.partials < 0) {
      item.partials = partial_floats_;
      partial_floats_ += tiles * State::floats(rows(item), padded_);
      plan_.cut_items.push_back(index);
    }
    return {index, item.tile_begin + tile};
  }

  void compute(const Cut& from, const Cut& to) const {
    for (int32_t i = from.item; i <= to.item && i < static_cast<int32_t>(plan_.items.size()); ++i) {
      const Item& item = plan_.items[i];
      const int32_t begin = i == from.item ? from.tile : item.tile_begin;
      const int32_t end = i == to.item ? to.tile : item.tile_end;
      if (begin >= end) continue;
      const bool last = i + 1 >= static_cast<int32_t>(plan_.items.size()) || i == to.item;
      compute_item(item, begin, end, last ? nullptr : &plan_.items[i + 1]);
    }
  }

  void compute_item(const Item& item, int32_t tile_begin, int32_t tile_end,
                    const Item* next_item) const {
    const cpu::KernelTable& table = kernels();
    const int64_t n = rows(item);
    const int64_t head_dim = cache_.head_dim;
    thread_local Scratch scratch;
    const int64_t packed_floats = (n * head_dim + 15) / 16 * 16;
    float* memory = scratch.floats(static_cast<size_t>(packed_floats) +
                                   static_cast<size_t>(State::floats(n, padded_)) +
                                   table.attention_scratch(cache_.head_dim));
    State state = State::at(memory + packed_floats, n, padded_);
    cpu::AttentionTile tile{};
    tile.q = pack_queries(item, memory);
    tile.rows = static_cast<int>(n);
    tile.group = group_;
    tile.head_dim = cache_.head_dim;
    tile.first_position = first_position(item);
    tile.sliding_window = params_.sliding_window;
    tile.soft_cap = params_.soft_cap;
    tile.scratch = memory + packed_floats + State::floats(n, padded_);
    if (item.partials < 0) state.clear(n, padded_);
    find_granules(item, tile_begin, cache_.k, tile.next_k);
    for (int32_t j = tile_begin; j < tile_end; ++j) {
      std::copy(tile.next_k, tile.next_k + kTileGranules, tile.k);
      find_granules(item, j, cache_.v, tile.v);
      if (j + 1 < tile_end) {
        find_granules(item, j + 1, cache_.k, tile.next_k);
      } else if (next_item != nullptr) {
        find_granules(*next_item, next_item->tile_begin, cache_.k, tile.next_k);
      }
      tile.tile_position = static_cast<int64_t>(j) * kKvTile;
      if (item.partials >= 0) {
        state = partial(item, j);
        state.clear(n, padded_);
      }
      tile.out = state.out;
      tile.row_max = state.max;
      tile.row_sum = state.sum;
      table.attention_tile[type_](tile);
    }
    if (item.partials < 0) write_out(item, state);
  }

  int32_t first_position(const Item& item) const {
    const int32_t tokens = batch_.query_start_loc[item.seq + 1] - batch_.query_start_loc[item.seq];
    return batch_.seq_lens[item.seq] - tokens + item.token_begin;
  }

  // Row tiles as the kernels cut them, each [head_dim][height], scaled.
  const float* pack_queries(const Item& item, float* packed) const {
    const cpu::KernelTable& table = kernels();
    const int64_t n = rows(item);
    const int64_t tiles = (n + table.row_tile - 1) / table.row_tile;
    const int64_t first_token = batch_.query_start_loc[item.seq] + item.token_begin;
    const int64_t first_column = static_cast<int64_t>(item.kv_head) * group_ * cache_.head_dim;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t begin = n * i / tiles;
      const int m = static_cast<int>(n * (i + 1) / tiles - begin);
      const float* heads[cpu::kMaxRowTile];
      for (int r = 0; r < m; ++r) {
        const int64_t row = begin + r;
        heads[r] =
            q_.row(first_token + row / group_) + first_column + row % group_ * cache_.head_dim;
      }
      table.pack_rows(heads, m, cache_.head_dim, params_.scale, packed + begin * cache_.head_dim);
    }
    return packed;
  }

  void find_granules(const Item& item, int32_t tile, const void* half,
                     const void** granules) const {
    const int64_t table_row =
        batch_.block_table_rows == nullptr ? item.seq : batch_.block_table_rows[item.seq];
    const BlockId* block_table = batch_.block_tables + table_row * batch_.block_table_stride;
    const int64_t granule_bytes = int64_t{kGranule} * cache_.head_dim * element_size_;
    const int64_t granules_per_block = cache_.block_size / kGranule;
    const int64_t first = static_cast<int64_t>(tile) * kTileGranules;
    const int64_t end = (batch_.seq_lens[item.seq] + kGranule - 1) / kGranule;
    for (int64_t g = 0; g < kTileGranules; ++g) {
      const int64_t granule = first + g;
      const BlockId block = granule < end ? block_table[granule / granules_per_block] : kNoBlock;
      granules[g] = block < 0
                        ? nullptr
                        : static_cast<const char*>(half) +
                              ((static_cast<int64_t>(block) * cache_.num_kv_heads + item.kv_head) *
                                   granules_per_block +
                               granule % granules_per_block) *
                                  granule_bytes;
    }
  }

  State partial(const Item& item, int32_t tile) const {
    const int64_t n = rows(item);
    return State::at(
        partials_ + item.partials + (tile - item.tile_begin) * State::floats(n, padded_), n,
        padded_);
  }

  void fold_partials(const Item& item) const {
    thread_local Scratch scratch;
    const int64_t n = rows(item);
    const State state =
        State::at(scratch.floats(static_cast<size_t>(State::floats(n, padded_))), n, padded_);
    state.clear(n, padded_);
    for (int32_t j = item.tile_begin; j < item.tile_end; ++j) {
      const State part = partial(item, j);
      for (int64_t r = 0; r < n; ++r) {
        kernels().attention_merge(state.out + r * padded_, state.max + r, state.sum + r,
                                  part.out + r * padded_, part.max[r], part.sum[r],
                                  static_cast<int>(padded_));
      }
    }
    write_out(item, state);
  }

  void write_out(const Item& item, const State& state) const {
    const int64_t first_token = batch_.query_start_loc[item.seq] + item.token_begin;
    const int64_t first_column = static_cast<int64_t>(item.kv_head) * group_ * cache_.head_dim;
    for (int64_t r = 0; r < rows(item); ++r) {
      float* to = out_.row(first_token + r / group_) + first_column + r % group_ * cache_.head_dim;
      kernels().scale(state.out + r * padded_, 1.0f / state.sum[r], cache_.head_dim, to);
    }
  }

  const Matrix<const float> q_;
  const KvCacheView& cache_;
  const AttentionBatch& batch_;
  const AttentionParams& params_;
  const Matrix<float> out_;
  const cpu::ElementType type_;
  const int64_t element_size_;
  const int32_t group_;
  const int64_t padded_;

  AttentionPlan& plan_;
  int64_t total_cost_ = 0;
  int64_t partial_floats_ = 0;
  float* partials_ = nullptr;
};

}  // namespace

void paged_attention(ThreadPool& pool, Matrix<const float> q, const KvCacheView& cache,
                     const AttentionBatch& batch, const AttentionParams& params,
                     Matrix<float> out) {
  if (cache.num_kv_heads <= 0 || params.num_heads <= 0 ||
      params.num_heads % cache.num_kv_heads != 0 || cache.block_size <= 0 ||
      cache.block_size % kGranule != 0) {
    throw InvalidArgument("paged_attention: " + std::to_string(params.num_heads) + " heads over " +
                          std::to_string(cache.num_kv_heads) + " KV heads in blocks of " +
                          std::to_string(cache.block_size) +
                          ": heads must be a multiple of KV heads, blocks a multiple of 16");
  }
  const int64_t cols = static_cast<int64_t>(params.num_heads) * cache.head_dim;
  if (q.cols != cols || out.cols != cols || q.rows != out.rows) {
    throw InvalidArgument("paged_attention: q is " + std::to_string(q.rows) + " x " +
                          std::to_string(q.cols) + " and out " + std::to_string(out.rows) + " x " +
                          std::to_string(out.cols) + "; heads times head_dim is " +
                          std::to_string(cols));
  }
  thread_local AttentionPlan plan;
  PagedAttention(q, cache, batch, params, out, plan).run(pool);
}

}  // namespace fastpage::ops
