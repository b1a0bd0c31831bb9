// Paged attention: the items of an AttentionPlan, tile by tile through the kernels.
#include <algorithm>
#include <limits>
#include <string>

#include "fastpage/ops.h"
#include "ops/attention_plan.h"
#include "ops/kernels.h"
#include "ops/scratch.h"

namespace fastpage::ops {

namespace {

using cpu::kGranule;
using cpu::kKvTile;
using cpu::kTileGranules;

using Item = AttentionItem;
using Cut = AttentionPlan::Cut;

// The result of some tiles for some rows.
struct State {
  float* out;  // [rows][padded head_dim]
  float* max;  // [rows]
  float* sum;  // [rows]

  static State at(float* p, int64_t rows, int64_t padded) {
    return {p, p + rows * padded, p + rows * (padded + 1)};
  }
  void clear(int64_t rows, int64_t padded) const {
    std::fill(out, out + rows * padded, 0.0f);
    std::fill(max, max + rows, -std::numeric_limits<float>::infinity());
    std::fill(sum, sum + rows, 0.0f);
  }
  State from_row(int64_t row, int64_t padded) const {
    return {out + row * padded, max + row, sum + row};
  }
  void copy_to(const State& to, int64_t rows, int64_t padded) const {
    std::copy(out, out + rows * padded, to.out);
    std::copy(max, max + rows, to.max);
    std::copy(sum, sum + rows, to.sum);
  }
};

// Where a tile's granules lie, in bytes from the cache's start; -1 if nothing there is visible.
struct TilePlace {
  int64_t granules[kTileGranules];

  void go_on(int64_t bytes) {
    for (int64_t& granule : granules) granule += granule < 0 ? 0 : bytes;
  }
  void add_to(const void* half, const void** pointers) const {
    for (int g = 0; g < kTileGranules; ++g) {
      pointers[g] = granules[g] < 0 ? nullptr : static_cast<const char*>(half) + granules[g];
    }
  }
};

// Kept from call to call, so that a steady step allocates nothing.
struct Workspace {
  AttentionPlan plan;
  Scratch partials;
  Scratch states;
};

class PagedAttention {
 public:
  PagedAttention(const Matrix<const float>& q, const KvCacheView& cache,
                 const AttentionBatch& batch, const AttentionParams& params,
                 const Matrix<float>& out, Workspace& workspace)
      : q_(q),
        cache_(cache),
        batch_(batch),
        params_(params),
        out_(out),
        type_(cache_type(cache.dtype)),
        multiplies_bf16_(type_ == cpu::kCacheBf16 &&
                         params.activations == Activations::kQuantized &&
                         kernels().bf16.attention_tile != nullptr),
        group_(params.num_heads / cache.num_kv_heads),
        padded_((cache.head_dim + kernels().panel_width - 1) / kernels().panel_width *
                kernels().panel_width),
        granule_bytes_(cache.granule_bytes()),
        head_bytes_(cache.block_size / kGranule * granule_bytes_),
        workspace_(workspace),
        plan_(workspace.plan) {}

  void run(ThreadPool& pool) {
    plan_.begin(batch_, {cache_.num_kv_heads, group_, cache_.block_size, params_.sliding_window,
                         pool.num_threads(), padded_ + 2});
    while (plan_.next_phase()) run_phase(pool);
  }

 private:
  void run_phase(ThreadPool& pool) {
    partials_ = workspace_.partials.floats(static_cast<size_t>(plan_.partial_floats()));
    // All of them belong to the first phase that has any: later ones only go on with them.
    states_ = workspace_.states.floats(static_cast<size_t>(
        plan_.num_state_slots() * cache_.num_kv_heads * plan_.state_floats(group_)));
    const auto items_between = [&](int part) {
      const Cut& from = plan_.cuts()[part];
      const Cut& to = plan_.cuts()[part + 1];
      const auto num_items = static_cast<int32_t>(plan_.items().size());
      return std::min(to.item + 1, num_items) - from.item;
    };
    if (plan_.cuts().size() == 2) {
      for (int i = 0; i < items_between(0); ++i) compute(0, i, true);
    } else {
      pool.share(items_between, [&](ThreadPool::Pieces& pieces) {
        do {
          compute(pieces.part(), static_cast<int32_t>(pieces.index()), pieces.in_order());
        } while (pieces.next());
      });
    }
    pool.parallel_for(static_cast<int64_t>(plan_.cut_items().size()), 1,
                      [&](int64_t begin, int64_t end, int) {
                        for (int64_t i = begin; i < end; ++i)
                          fold_partials(plan_.items()[plan_.cut_items()[i]]);
                      });
  }

  // What lies between two cuts of the index-th item there. in_order: the next one follows.
  void compute(int part, int32_t index, bool in_order) const {
    const Cut& from = plan_.cuts()[part];
    const Cut& to = plan_.cuts()[part + 1];
    const int32_t i = from.item + index;
    const Item& item = plan_.items()[i];
    const int32_t begin = i == from.item ? from.tile : item.tile_begin;
    const int32_t end = i == to.item ? to.tile : item.tile_end;
    if (begin >= end) return;
    const bool is_end = i + 1 >= static_cast<int32_t>(plan_.items().size()) || i == to.item;
    compute_item(item, begin, end, is_end || !in_order ? nullptr : &plan_.items()[i + 1]);
  }

  void compute_item(const Item& item, int32_t tile_begin, int32_t tile_end,
                    const Item* next_item) const {
    const cpu::KernelTable& table = kernels();
    const auto attend = multiplies_bf16_ ? table.bf16.attention_tile : table.attention_tile[type_];
    const int64_t n = plan_.rows(item);
    const int64_t all = all_rows(item);
    const auto whole_lines = [](int64_t floats) { return (floats + 15) / 16 * 16; };
    thread_local Scratch scratch;
    const int64_t packed_floats = whole_lines(all * cache_.head_dim);
    const int64_t state_floats = plan_.state_floats(all);
    float* memory =
        scratch.floats(static_cast<size_t>(packed_floats + state_floats + 2 * whole_lines(all)) +
                       table.attention_scratch(cache_.head_dim));
    State state = State::at(memory + packed_floats, all, padded_);
    auto* positions = reinterpret_cast<int32_t*>(memory + packed_floats + state_floats);
    float* slopes = memory + packed_floats + state_floats + whole_lines(all);
    pack_queries(item, memory);
    describe_rows(item, positions, slopes);

    cpu::AttentionTile tile{};
    tile.rows = static_cast<int>(n);
    tile.head_dim = cache_.head_dim;
    tile.positions = positions;
    tile.sliding_window = params_.sliding_window;
    tile.soft_cap = params_.soft_cap;
    tile.scratch = slopes + whole_lines(all);

    const bool is_first = tile_begin == item.tile_begin;
    if (is_first) start(item, state);
    TilePlace here = place(item, tile_begin);
    for (int32_t j = tile_begin; j < tile_end; ++j) {
      tile.tile_position = static_cast<int64_t>(j) * kKvTile;
      if (!is_first) {
        state = partial(item, 1 + j - item.direct_end);
        state.clear(all, padded_);
      }
      for (int32_t h = 0; h < item.num_heads; ++h) {
        TilePlace next = here;
        if (h + 1 < item.num_heads) {
          next.go_on(head_bytes_);
        } else if (j + 1 < tile_end) {
          next = place(item, j + 1);
        } else if (next_item != nullptr) {
          next = place(*next_item, next_item->tile_begin);
        }
        here.add_to(cache_.k, tile.granules);
        here.add_to(cache_.v, tile.granules + kTileGranules);
        next.add_to(cache_.k, tile.granules + 2 * kTileGranules);
        here = next;
        const State rows = state.from_row(h * n, padded_);
        tile.q = memory + h * n * cache_.head_dim;
        tile.slopes = params_.alibi_slopes == nullptr ? nullptr : slopes + h * n;
        tile.out = rows.out;
        tile.row_max = rows.max;
        tile.row_sum = rows.sum;
        attend(tile);
      }
    }
    if (!is_first) return;
    if (item.partials < 0) {
      finish(item, state);
    } else {
      state.copy_to(partial(item, 0), all, padded_);
    }
  }

  // Rows of all its heads, those of one head after those of another.
  int64_t all_rows(const Item& item) const { return item.num_heads * plan_.rows(item); }

  // positions: of one head's rows; slopes: of all rows.
  void describe_rows(const Item& item, int32_t* positions, float* slopes) const {
    for (int32_t e = item.entry_begin; e < item.entry_end; ++e) {
      for (int32_t h = 0; h < group_; ++h) *positions++ = plan_.position(e);
    }
    if (params_.alibi_slopes == nullptr) return;
    for (int64_t r = 0; r < all_rows(item); ++r) slopes[r] = params_.alibi_slopes[head(item, r)];
  }

  // Per KV head, row tiles as the kernels cut them, each [head_dim][height], scaled.
  void pack_queries(const Item& item, float* packed) const {
    const cpu::KernelTable& table = kernels();
    const int64_t n = plan_.rows(item);
    const int64_t tiles = (n + table.row_tile - 1) / table.row_tile;
    for (int64_t first = 0; first < all_rows(item); first += n) {
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t begin = n * i / tiles;
        const int m = static_cast<int>(n * (i + 1) / tiles - begin);
        const float* heads[cpu::kMaxRowTile];
        for (int r = 0; r < m; ++r) {
          const int64_t row = first + begin + r;
          heads[r] = q_.row(token(item, row)) + head(item, row) * cache_.head_dim;
        }
        float* tile = packed + (first + begin) * cache_.head_dim;
        table.pack_rows(heads, m, cache_.head_dim, params_.scale, tile);
        if (multiplies_bf16_) table.bf16.pair_queries(tile, m, cache_.head_dim);
      }
    }
  }

  // The row of q and out, and the query head, of a row of an item.
  int64_t token(const Item& item, int64_t row) const {
    return plan_.token(item.entry_begin + static_cast<int32_t>(row % plan_.rows(item) / group_));
  }
  int64_t head(const Item& item, int64_t row) const {
    return (item.kv_head + row / plan_.rows(item)) * group_ + row % group_;
  }

  // Of the item's first KV head.
  TilePlace place(const Item& item, int32_t tile) const {
    const BlockId* block_table = plan_.block_table(item.seq);
    const int64_t granules_per_block = cache_.block_size / kGranule;
    const int64_t first = static_cast<int64_t>(tile) * kTileGranules;
    const int64_t seen = (batch_.seq_lens[item.seq] + kGranule - 1) / kGranule - first;
    int64_t index = first / granules_per_block;
    int64_t within = first % granules_per_block;
    TilePlace place;
    for (int64_t g = 0; g < kTileGranules; ++g) {
      const BlockId block = g < seen ? block_table[index] : kNoBlock;
      const int64_t granule =
          (static_cast<int64_t>(block) * cache_.num_kv_heads + item.kv_head) * granules_per_block +
          within;
      place.granules[g] = block < 0 ? -1 : granule * granule_bytes_;
      if (++within == granules_per_block) {
        within = 0;
        ++index;
      }
    }
    return place;
  }

  // Part 0 of a cut item is what comes before its first cut, the others are the tiles behind it.
  State partial(const Item& item, int32_t part) const {
    const int64_t all = all_rows(item);
    return State::at(partials_ + item.partials + part * plan_.state_floats(all), all, padded_);
  }

  void fold_partials(const Item& item) const {
    const State state = partial(item, 0);
    for (int32_t j = item.direct_end; j < item.tile_end; ++j) {
      const State part = partial(item, 1 + j - item.direct_end);
      kernels().attention_merge(static_cast<int>(all_rows(item)), static_cast<int>(padded_),
                                state.out, state.max, state.sum, part.out, part.max, part.sum);
    }
    finish(item, state);
  }

  // Calls visit(the state kept between phases, the same rows of `state`) for each query token and
  // KV head of an item.
  template <typename Visit>
  void for_each_kept(const Item& item, const State& state, const Visit& visit) const {
    int64_t row = 0;
    for (int32_t h = item.kv_head; h < item.kv_head + item.num_heads; ++h) {
      for (int32_t e = item.entry_begin; e < item.entry_end; ++e, row += group_) {
        const int64_t slot = int64_t{plan_.state_slot(e)} * cache_.num_kv_heads + h;
        visit(State::at(states_ + slot * plan_.state_floats(group_), group_, padded_),
              state.from_row(row, padded_));
      }
    }
  }

  void start(const Item& item, const State& state) const {
    if (item.is_fresh) return state.clear(all_rows(item), padded_);
    for_each_kept(item, state, [&](const State& kept, const State& rows) {
      kept.copy_to(rows, group_, padded_);
    });
  }

  void finish(const Item& item, const State& state) const {
    if (!item.is_last) {
      for_each_kept(item, state, [&](const State& kept, const State& rows) {
        rows.copy_to(kept, group_, padded_);
      });
      return;
    }
    for (int64_t r = 0; r < all_rows(item); ++r) {
      kernels().scale(state.out + r * padded_, 1.0f / state.sum[r], cache_.head_dim,
                      out_.row(token(item, r)) + head(item, r) * cache_.head_dim);
    }
  }

  const Matrix<const float> q_;
  const KvCacheView& cache_;
  const AttentionBatch& batch_;
  const AttentionParams& params_;
  const Matrix<float> out_;
  const cpu::CacheType type_;
  const bool multiplies_bf16_;
  const int32_t group_;
  const int64_t padded_;
  const int64_t granule_bytes_;
  const int64_t head_bytes_;  // of a block, from one KV head to the next

  Workspace& workspace_;
  AttentionPlan& plan_;
  float* partials_ = nullptr;
  float* states_ = nullptr;
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
  thread_local Workspace workspace;
  PagedAttention(q, cache, batch, params, out, workspace).run(pool);
}

}  // namespace fastpage::ops
