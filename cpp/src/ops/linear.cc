// Linear layers: how the work is cut into register tiles and shared between threads. Nothing here
// changes the order in which an output element is summed.
#include <algorithm>
#include <string>

#include "ops/packed_weight.h"

namespace fastpage::ops {

namespace {

// Per pass, as in_features: the part of a panel that all row tiles share stays in the L1/L2 caches.
constexpr int64_t kDepthBlock = 1024;
// How far ahead of the arithmetic weights are fetched, in bytes.
constexpr int64_t kLookahead = 8192;
// Rows per pass over the panels: their packed copy stays in the caches.
constexpr int64_t kRowBlock = 192;

// How x is packed and met by the panels of a weight. A step is an in_feature, or a group of them.
struct Method {
  void (*const* tile)(const cpu::LinearTile&);  // per height
  int row_tile;
  bool is_integer;         // activations are quantized, or else fp32
  int64_t in_step;         // in_features of a step
  int64_t row_step_bytes;  // of one row of activations
};

Method choose_method(const PackedWeight::Impl& w, Activations activations) {
  const cpu::KernelTable& table = kernels();
  if (!w.is_quantized) return {table.linear_tile[w.type], table.row_tile, false, 1, sizeof(float)};
  if (activations == Activations::kInt8) {
    return {table.quant.tile[w.quant], table.quant.row_tile, true, cpu::kGroup,
            cpu::kActivationGroupBytes};
  }
  return {table.quant.widened_tile[w.quant], table.quant.row_tile, false, cpu::kGroup,
          cpu::kGroup * sizeof(float)};
}

// The rows of x, cut into tiles of nearly equal height; tile i is height(i) rows, step by step.
struct RowTiles {
  int64_t rows = 0;
  int64_t count = 0;
  const char* data = nullptr;
  int64_t row_bytes = 0;

  int64_t first(int64_t i) const { return rows * i / count; }
  int height(int64_t i) const { return static_cast<int>(first(i + 1) - first(i)); }
  const char* tile(int64_t i) const { return data + first(i) * row_bytes; }
};

// What is added to the stored weights, per unit of the scale: sums of activations undo it.
int zero_of(cpu::QuantFormat format) {
  if (format == cpu::kQ4_0) return 8;
  return cpu::has_4_bits(format) ? 0 : kernels().quant.int8_zero;
}

void pack_tile(const PackedWeight::Impl& w, const Method& method, const float* const* rows, int m,
               char* out) {
  if (method.is_integer) {
    kernels().quant.quantize_rows(rows, m, w.in_features, zero_of(w.quant), out);
    return;
  }
  auto* floats = reinterpret_cast<float*>(out);
  kernels().pack_rows(rows, m, w.in_features, 1.0f, floats);
  std::fill(floats + m * w.in_features, floats + m * w.num_steps * method.in_step, 0.0f);
}

RowTiles pack_rows(ThreadPool& pool, const Matrix<const float>& x, const PackedWeight::Impl& w,
                   const Method& method) {
  RowTiles tiles;
  tiles.rows = x.rows;
  tiles.count = (x.rows + method.row_tile - 1) / method.row_tile;
  tiles.row_bytes = w.num_steps * method.row_step_bytes;
  if (x.rows == 1 && !method.is_integer && x.cols == w.num_steps * method.in_step) {
    tiles.data = reinterpret_cast<const char*>(x.data);
    return tiles;
  }
  thread_local Scratch scratch;
  const int64_t bytes = x.rows * tiles.row_bytes;
  char* packed = reinterpret_cast<char*>(scratch.floats(static_cast<size_t>(bytes / 4)));
  tiles.data = packed;
  const int64_t grain = x.rows * x.cols < kSerialElements ? tiles.count : 1;
  pool.parallel_for(tiles.count, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const float* rows[cpu::kMaxRowTile];
      for (int r = 0; r < tiles.height(i); ++r) rows[r] = x.row(tiles.first(i) + r);
      pack_tile(w, method, rows, tiles.height(i), packed + tiles.first(i) * tiles.row_bytes);
    }
  });
  return tiles;
}

// A share of the output: row tiles times panels.
struct Share {
  int64_t tile_begin, tile_end;
  int64_t panel_begin, panel_end;
};

void compute_share(const RowTiles& tiles, const PackedWeight::Impl& w, const Method& method,
                   const float* bias, const Matrix<float>& y, const Share& share) {
  const int64_t width = kernels().panel_width;
  const int64_t tiles_per_block = std::max<int64_t>(1, kRowBlock / method.row_tile);
  const int64_t block_steps = kDepthBlock / method.in_step;
  const int64_t depth_blocks = std::max<int64_t>(1, (w.num_steps + block_steps - 1) / block_steps);
  const char* const end_of_weights = w.panel(w.num_panels);
  for (int64_t t0 = share.tile_begin; t0 < share.tile_end; t0 += tiles_per_block) {
    const int64_t t1 = std::min(share.tile_end, t0 + tiles_per_block);
    for (int64_t p = share.panel_begin; p < share.panel_end; ++p) {
      const int64_t column = p * width;
      cpu::LinearTile tile;
      tile.n = static_cast<int>(std::min<int64_t>(width, w.out_features - column));
      tile.y_stride = y.stride;
      for (int64_t d = 0; d < depth_blocks; ++d) {
        const int64_t s0 = w.num_steps * d / depth_blocks;
        const int64_t s1 = w.num_steps * (d + 1) / depth_blocks;
        const bool is_last = d + 1 == depth_blocks;
        const char* block = w.panel(p) + s0 * w.step_bytes;
        tile.panel = block;
        tile.k = s1 - s0;
        tile.accumulate = d > 0;
        tile.scale = is_last && w.format == WeightFormat::kInt8 ? w.scales(p) : nullptr;
        tile.bias = is_last && bias != nullptr ? bias + column : nullptr;
        for (int64_t t = t0; t < t1; ++t) {
          const int m = tiles.height(t);
          // The first pass brings the block from memory, the others find it in a cache.
          tile.prefetch = t == t0 ? std::min(block + kLookahead, end_of_weights - 64) : block;
          tile.prefetch_step = t == t0 ? w.step_bytes : 0;
          tile.a = tiles.tile(t) + s0 * m * method.row_step_bytes;
          tile.y = y.row(tiles.first(t)) + column;
          method.tile[m - 1](tile);
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

Activations activations_from_name(const std::string& name) {
  if (name == "int8") return Activations::kInt8;
  if (name == "float32") return Activations::kFloat32;
  throw InvalidArgument("activations are '" + name + "': int8 or float32");
}

void linear(ThreadPool& pool, Matrix<const float> x, const PackedWeight& weight, const float* bias,
            Matrix<float> y, Activations activations) {
  const PackedWeight::Impl& w = weight.impl();
  if (x.cols != w.in_features || y.cols != w.out_features || x.rows != y.rows) {
    throw InvalidArgument(
        "linear: x is " + std::to_string(x.rows) + " x " + std::to_string(x.cols) + " and y " +
        std::to_string(y.rows) + " x " + std::to_string(y.cols) + ", the weight takes " +
        std::to_string(w.in_features) + " columns and gives " + std::to_string(w.out_features));
  }
  if (x.rows == 0 || w.num_panels == 0) return;
  const Method method = choose_method(w, activations);
  const RowTiles tiles = pack_rows(pool, x, w, method);
  const int64_t rows_split = row_parts(tiles.count, w.num_panels, pool.num_threads());
  const int64_t panels_split = pool.num_threads() / rows_split;
  const auto part = [&](int t) {
    if (t >= rows_split * panels_split) return;
    const int64_t r = t / panels_split;
    const int64_t p = t % panels_split;
    compute_share(tiles, w, method, bias, y,
                  {tiles.count * r / rows_split, tiles.count * (r + 1) / rows_split,
                   w.num_panels * p / panels_split, w.num_panels * (p + 1) / panels_split});
  };
  if (x.rows * w.in_features * w.out_features < kSerialElements) {
    compute_share(tiles, w, method, bias, y, {0, tiles.count, 0, w.num_panels});
  } else {
    pool.run(part);
  }
}

}  // namespace fastpage::ops
