// Linear layers: how the work is cut into register tiles and shared between threads. Nothing here
// changes the order in which an output element is summed.
#include <algorithm>
#include <string>

#include "ops/packed_weight.h"

namespace fastpage::ops {

namespace {

// In features per pass: the part of a panel that all row tiles share stays in the L1/L2 caches.
constexpr int64_t kDepthBlock = 1024;
// How far ahead of the arithmetic weights are fetched, in bytes.
constexpr int64_t kLookahead = 8192;
// Rows per pass over the panels: their packed copy stays in the caches.
constexpr int64_t kRowBlock = 192;

// The rows of x, cut into tiles of nearly equal height; tile i is [in_features][height(i)].
struct RowTiles {
  int64_t rows = 0;
  int64_t count = 0;
  const float* data = nullptr;
  int64_t depth = 0;

  int64_t first(int64_t i) const { return rows * i / count; }
  int height(int64_t i) const { return static_cast<int>(first(i + 1) - first(i)); }
  const float* tile(int64_t i) const { return data + first(i) * depth; }
};

RowTiles pack_rows(ThreadPool& pool, const Matrix<const float>& x) {
  const cpu::KernelTable& table = kernels();
  RowTiles tiles;
  tiles.rows = x.rows;
  tiles.count = (x.rows + table.row_tile - 1) / table.row_tile;
  tiles.depth = x.cols;
  if (x.rows == 1) {
    tiles.data = x.data;
    return tiles;
  }
  thread_local Scratch scratch;
  float* packed = scratch.floats(static_cast<size_t>(x.rows * x.cols));
  tiles.data = packed;
  const int64_t grain = x.rows * x.cols < kSerialElements ? tiles.count : 1;
  pool.parallel_for(tiles.count, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const float* rows[cpu::kMaxRowTile];
      for (int r = 0; r < tiles.height(i); ++r) rows[r] = x.row(tiles.first(i) + r);
      table.pack_rows(rows, tiles.height(i), x.cols, 1.0f, packed + tiles.first(i) * x.cols);
    }
  });
  return tiles;
}

// A share of the output: row tiles times panels.
struct Share {
  int64_t tile_begin, tile_end;
  int64_t panel_begin, panel_end;
};

void compute_share(const RowTiles& tiles, const PackedWeight::Impl& w, const float* bias,
                   const Matrix<float>& y, const Share& share) {
  const cpu::KernelTable& table = kernels();
  const int64_t row_bytes = table.panel_width * static_cast<int64_t>(dtype_size(w.dtype));
  const int64_t tiles_per_block = std::max<int64_t>(1, kRowBlock / table.row_tile);
  const int64_t depth_blocks = std::max<int64_t>(1, (tiles.depth + kDepthBlock - 1) / kDepthBlock);
  const char* const end_of_weights = w.panel(w.num_panels);
  for (int64_t t0 = share.tile_begin; t0 < share.tile_end; t0 += tiles_per_block) {
    const int64_t t1 = std::min(share.tile_end, t0 + tiles_per_block);
    for (int64_t p = share.panel_begin; p < share.panel_end; ++p) {
      const int64_t column = p * table.panel_width;
      cpu::LinearTile tile;
      tile.n = static_cast<int>(std::min<int64_t>(table.panel_width, w.out_features - column));
      tile.y_stride = y.stride;
      for (int64_t d = 0; d < depth_blocks; ++d) {
        const int64_t k0 = tiles.depth * d / depth_blocks;
        const int64_t k1 = tiles.depth * (d + 1) / depth_blocks;
        const char* block = w.panel(p) + k0 * row_bytes;
        tile.panel = block;
        tile.k = k1 - k0;
        tile.accumulate = d > 0;
        tile.bias = bias != nullptr && d + 1 == depth_blocks ? bias + column : nullptr;
        for (int64_t t = t0; t < t1; ++t) {
          const int m = tiles.height(t);
          // The first pass brings the block from memory, the others find it in a cache.
          tile.prefetch = t == t0 ? std::min(block + kLookahead, end_of_weights - 64) : block;
          tile.prefetch_step = t == t0 ? row_bytes : 0;
          tile.a = tiles.tile(t) + k0 * m;
          tile.y = y.row(tiles.first(t)) + column;
          table.linear_tile[w.type][m - 1](tile);
        }
      }
    }
  }
}

// How many parts the rows are cut into, the panels being cut into num_threads / parts: whatever
// makes the largest share smallest.
int64_t row_parts(int64_t tiles, int64_t panels, int64_t threads) {
  int64_t best = 1;
  int64_t best_cost = INT64_MAX;
  for (int64_t parts = 1; parts <= std::min(threads, tiles); ++parts) {
    const int64_t panel_parts = threads / parts;
    const int64_t cost = ((tiles + parts - 1) / parts) * ((panels + panel_parts - 1) / panel_parts);
    if (cost < best_cost) {
      best_cost = cost;
      best = parts;
    }
  }
  return best;
}

}  // namespace

void linear(ThreadPool& pool, Matrix<const float> x, const PackedWeight& weight, const float* bias,
            Matrix<float> y) {
  const PackedWeight::Impl& w = weight.impl();
  if (x.cols != w.in_features || y.cols != w.out_features || x.rows != y.rows) {
    throw InvalidArgument(
        "linear: x is " + std::to_string(x.rows) + " x " + std::to_string(x.cols) + " and y " +
        std::to_string(y.rows) + " x " + std::to_string(y.cols) + ", the weight takes " +
        std::to_string(w.in_features) + " columns and gives " + std::to_string(w.out_features));
  }
  if (x.rows == 0 || w.num_panels == 0) return;
  const RowTiles tiles = pack_rows(pool, x);
  const int64_t rows_split = row_parts(tiles.count, w.num_panels, pool.num_threads());
  const int64_t panels_split = pool.num_threads() / rows_split;
  const auto part = [&](int t) {
    if (t >= rows_split * panels_split) return;
    const int64_t r = t / panels_split;
    const int64_t p = t % panels_split;
    compute_share(tiles, w, bias, y,
                  {tiles.count * r / rows_split, tiles.count * (r + 1) / rows_split,
                   w.num_panels * p / panels_split, w.num_panels * (p + 1) / panels_split});
  };
  if (x.rows * w.in_features * w.out_features < kSerialElements) {
    compute_share(tiles, w, bias, y, {0, tiles.count, 0, w.num_panels});
  } else {
    pool.run(part);
  }
}

}  // namespace fastpage::ops
