// Linear layers: how the work is cut into register tiles and shared between threads. Nothing here
// changes the order in which an output element is summed.
#include <algorithm>
#include <string>

#include "ops/linear_part.h"
#include "ops/packed_weight.h"

namespace fastpage::ops {

namespace {

// Per pass, as in_features: the part of a panel that all row tiles share stays in the L1/L2 caches.
constexpr int64_t kDepthBlock = 1024;
// How far ahead of the arithmetic weights are fetched, in bytes, where each is read once.
constexpr int64_t kLookahead = 8192;
// Rows per pass over the panels: their packed copy stays in the caches.
constexpr int64_t kRowBlock = 192;

// How x is packed and met by the panels of a weight. A step is an in_feature, or a group of them.
struct Method {
  enum class Packing { kFloat32, kBf16, kInt8 };
  void (*const* tile)(const cpu::LinearTile&);  // per height
  int row_tile;
  Packing packing;         // of activations
  int64_t in_step;         // in_features of a step
  int64_t row_step_bytes;  // of one row of activations
};

Method choose_method(const PackedWeight::Impl& w, Activations activations) {
  using Packing = Method::Packing;
  const cpu::KernelTable& table = kernels();
  const bool quantizes = activations == Activations::kQuantized;
  constexpr int64_t kWideGroupBytes = cpu::kGroup * sizeof(float);
  if (w.is_quantized && quantizes) {
    return {table.quant.tile[w.quant], table.quant.row_tile[w.quant], Packing::kInt8, cpu::kGroup,
            cpu::kActivationGroupBytes};
  }
  if (w.is_quantized) {
    return {table.quant.widened_tile[w.quant], table.quant.widened_row_tile, Packing::kFloat32,
            cpu::kGroup, kWideGroupBytes};
  }
  if (w.type != cpu::kBf16) {
    return {table.linear_tile[w.type], table.row_tile, Packing::kFloat32, 1, sizeof(float)};
  }
  if (quantizes && table.bf16.round_rows != nullptr) {
    return {table.bf16.tile, table.bf16.row_tile, Packing::kBf16, cpu::kGroup,
            cpu::kBf16GroupBytes};
  }
  return {table.linear_tile[w.type], table.row_tile, Packing::kFloat32, cpu::kGroup,
          kWideGroupBytes};
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
  if (method.packing == Method::Packing::kInt8) {
    return kernels().quant.quantize_rows(rows, m, w.in_features, zero_of(w.quant), out);
  }
  if (method.packing == Method::Packing::kBf16) {
    return kernels().bf16.round_rows(rows, m, w.in_features, out);
  }
  auto* floats = reinterpret_cast<float*>(out);
  kernels().pack_rows(rows, m, w.in_features, 1.0f, floats);
  std::fill(floats + m * w.in_features, floats + m * w.num_steps * method.in_step, 0.0f);
}

// A linear layer in the making.
struct Layer {
  const Matrix<const float>& x;
  const PackedWeight::Impl& w;
  const float* bias;
  const LinearFusion& fusion;
  const Method& method;
};

RowTiles cut_rows(const Layer& layer) {
  RowTiles tiles;
  tiles.rows = layer.x.rows;
  tiles.count = (tiles.rows + layer.method.row_tile - 1) / layer.method.row_tile;
  tiles.row_bytes = layer.w.num_steps * layer.method.row_step_bytes;
  return tiles;
}

// Row i of x, normed if need be, in `room`.
const float* source_row(const Layer& layer, int64_t i, float* room) {
  if (layer.fusion.norm_weight == nullptr) return layer.x.row(i);
  kernels().rms_norm(layer.x.row(i), layer.fusion.norm_weight, layer.fusion.norm_eps, layer.x.cols,
                     room);
  return room;
}

void pack_tiles(const Layer& layer, const RowTiles& tiles, int64_t begin, int64_t end,
                char* packed) {
  thread_local Scratch scratch;
  const int64_t cols = layer.x.cols;
  float* room = layer.fusion.norm_weight == nullptr
                    ? nullptr
                    : scratch.floats(static_cast<size_t>(layer.method.row_tile * cols));
  for (int64_t i = begin; i < end; ++i) {
    const float* rows[cpu::kMaxRowTile];
    for (int r = 0; r < tiles.height(i); ++r) {
      rows[r] = source_row(layer, tiles.first(i) + r, room == nullptr ? room : room + r * cols);
    }
    pack_tile(layer.w, layer.method, rows, tiles.height(i),
              packed + tiles.first(i) * tiles.row_bytes);
  }
}

char* room_for(const RowTiles& tiles, Scratch* scratch) {
  const int64_t bytes = tiles.rows * tiles.row_bytes;
  return reinterpret_cast<char*>(scratch->floats(static_cast<size_t>(bytes / 4)));
}

// All rows, by the threads together.
void pack_shared(ThreadPool& pool, const Layer& layer, RowTiles* tiles) {
  thread_local Scratch scratch;
  char* packed = room_for(*tiles, &scratch);
  pool.parallel_for(tiles->count, 1, [&](int64_t begin, int64_t end, int) {
    pack_tiles(layer, *tiles, begin, end, packed);
  });
  tiles->data = packed;
}

// All rows, by this thread for itself.
void pack_alone(const Layer& layer, RowTiles* tiles) {
  thread_local Scratch scratch;
  if (tiles->rows == 1 && layer.method.packing == Method::Packing::kFloat32 &&
      layer.x.cols == layer.w.num_steps * layer.method.in_step) {
    float* room = scratch.floats(static_cast<size_t>(layer.x.cols));
    tiles->data = reinterpret_cast<const char*>(source_row(layer, 0, room));
    return;
  }
  char* packed = room_for(*tiles, &scratch);
  pack_tiles(layer, *tiles, 0, tiles->count, packed);
  tiles->data = packed;
}

// A share of the output: row tiles times panels. Of a gated activation the panels are those of
// the left half. Its pieces are kRowBlock rows of a panel, panel after panel.
struct Share {
  int64_t tile_begin, tile_end;
  int64_t panel_begin, panel_end;

  int64_t num_panels() const { return panel_end - panel_begin; }
  int64_t num_pieces(int64_t tiles_per_block) const {
    return (tile_end - tile_begin + tiles_per_block - 1) / tiles_per_block * num_panels();
  }
};

// A panel in the order in which a thread computes them.
struct Turn {
  int64_t panel;
  int64_t next;   // the panel after it, or -1
  bool is_first;  // nobody has fetched it
};

// What tile i of `count` fetches of memory while it computes with `block`. With several tiles each
// takes a part of the block after it: the first one alone would wait for memory, the others leave
// memory idle.
void fetch_ahead(const PackedWeight::Impl& w, const char* block, const char* next_block,
                 bool is_first, int64_t i, int64_t count, cpu::LinearTile* tile) {
  if (count == 1 || (is_first && i == 0)) {
    tile->prefetch = std::min<const char*>(block + kLookahead, w.panel(w.num_panels) - 64);
    tile->prefetch_step = w.step_bytes;
  } else if (next_block != nullptr) {
    tile->prefetch_step = (w.step_bytes + count - 1) / count;
    tile->prefetch = next_block + i * tile->k * tile->prefetch_step;
  } else {
    tile->prefetch = block;
    tile->prefetch_step = 0;
  }
}

// Tiles [t0, t1) times a panel, to `out` from row first(t0) on.
void compute_panel(const Layer& layer, const RowTiles& tiles, int64_t t0, int64_t t1,
                   const Turn& turn, const Matrix<float>& out) {
  const PackedWeight::Impl& w = layer.w;
  const Method& method = layer.method;
  const int64_t block_steps = kDepthBlock / method.in_step;
  const int64_t depth_blocks = std::max<int64_t>(1, (w.num_steps + block_steps - 1) / block_steps);
  const int64_t p = turn.panel;
  cpu::LinearTile tile;
  tile.n = static_cast<int>(out.cols);
  tile.y_stride = out.stride;
  for (int64_t d = 0; d < depth_blocks; ++d) {
    const int64_t s0 = w.num_steps * d / depth_blocks;
    const int64_t s1 = w.num_steps * (d + 1) / depth_blocks;
    const bool is_last = d + 1 == depth_blocks;
    const char* block = w.panel(p) + s0 * w.step_bytes;
    tile.panel = block;
    tile.k = s1 - s0;
    tile.accumulate = d > 0;
    tile.scale = is_last && w.format == WeightFormat::kInt8 ? w.scales(p) : nullptr;
    tile.bias = is_last && layer.bias != nullptr ? layer.bias + p * kernels().panel_width : nullptr;
    const char* next_block = block + tile.k * w.step_bytes;
    if (is_last) next_block = turn.next < 0 ? nullptr : w.panel(turn.next);
    for (int64_t t = t0; t < t1; ++t) {
      const int m = tiles.height(t);
      fetch_ahead(w, block, next_block, turn.is_first && d == 0, t - t0, t1 - t0, &tile);
      tile.a = tiles.tile(t) + s0 * m * method.row_step_bytes;
      tile.y = out.row(tiles.first(t) - tiles.first(t0));
      method.tile[m - 1](tile);
    }
  }
}

// The same of a panel of the left half and its fellow in the right one, and what becomes of both.
void compute_gated_panel(const Layer& layer, const RowTiles& tiles, int64_t t0, int64_t t1,
                         const Turn& turn, const Matrix<float>& out) {
  thread_local Scratch scratch;
  float* room = scratch.floats(static_cast<size_t>(2 * out.rows * out.cols));
  const Matrix<float> gate(room, out.rows, out.cols);
  const Matrix<float> up(room + out.rows * out.cols, out.rows, out.cols);
  const int64_t fellow = turn.panel + layer.w.num_panels / 2;
  compute_panel(layer, tiles, t0, t1, {turn.panel, fellow, turn.is_first}, gate);
  compute_panel(layer, tiles, t0, t1, {fellow, turn.next, false}, up);
  const auto activate = activation_kernel(layer.fusion.activation.kind);
  for (int64_t i = 0; i < out.rows; ++i) {
    activate(gate.row(i), up.row(i), out.cols, out.row(i));
  }
}

int64_t tiles_per_block(const Method& method) {
  return std::max<int64_t>(1, kRowBlock / method.row_tile);
}

// in_order: the thread that computes it has computed the piece before it, and will the next.
void compute_piece(const Layer& layer, const RowTiles& tiles, const Matrix<float>& y,
                   const Share& share, int64_t index, bool in_order) {
  const Activation& activation = layer.fusion.activation;
  const Matrix<const float>& residual = layer.fusion.residual;
  const int64_t width = kernels().panel_width;
  const int64_t block = tiles_per_block(layer.method);
  const int64_t t0 = share.tile_begin + index / share.num_panels() * block;
  const int64_t t1 = std::min(share.tile_end, t0 + block);
  const int64_t p = share.panel_begin + index % share.num_panels();
  const int64_t first = tiles.first(t0);
  const int64_t column = p * width;
  const Matrix<float> out(y.row(first) + column, tiles.first(t1) - first,
                          std::min(width, y.cols - column), y.stride);
  const int64_t next = in_order && p + 1 < share.panel_end ? p + 1 : -1;
  const auto compute = activation.is_gated ? compute_gated_panel : compute_panel;
  compute(layer, tiles, t0, t1, {p, next, !in_order || p == share.panel_begin}, out);
  if (activation.kind != ActivationKind::kNone && !activation.is_gated) {
    const auto activate = activation_kernel(activation.kind);
    for (int64_t i = 0; i < out.rows; ++i) activate(out.row(i), nullptr, out.cols, out.row(i));
  }
  if (residual.data == nullptr) return;
  for (int64_t i = 0; i < out.rows; ++i) {
    kernels().add(residual.row(first + i) + column, out.row(i), out.cols, out.row(i));
  }
}

void compute_share(const Layer& layer, const RowTiles& tiles, const Matrix<float>& y,
                   const Share& share) {
  const int64_t count = share.num_pieces(tiles_per_block(layer.method));
  for (int64_t i = 0; i < count; ++i) compute_piece(layer, tiles, y, share, i, true);
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
  if (name == "quantized") return Activations::kQuantized;
  if (name == "float32") return Activations::kFloat32;
  throw InvalidArgument("activations are '" + name + "': quantized or float32");
}

namespace {

std::string shape(int64_t rows, int64_t cols) {
  return std::to_string(rows) + " x " + std::to_string(cols);
}

void check_shapes(const Matrix<const float>& x, const PackedWeight::Impl& w,
                  const LinearFusion& fusion, const Matrix<float>& y) {
  const int64_t out = fusion.activation.is_gated ? w.out_features / 2 : w.out_features;
  if (x.cols != w.in_features || y.cols != out || x.rows != y.rows ||
      (fusion.activation.is_gated && w.out_features % 2 != 0)) {
    throw InvalidArgument("linear: x is " + shape(x.rows, x.cols) + " and y " +
                          shape(y.rows, y.cols) + ", the weight takes " +
                          std::to_string(w.in_features) + " columns and gives " +
                          std::to_string(w.out_features) +
                          (fusion.activation.is_gated ? ", of which a gate makes half" : ""));
  }
  const Matrix<const float>& residual = fusion.residual;
  if (residual.data != nullptr && (residual.rows != y.rows || residual.cols != y.cols)) {
    throw InvalidArgument("linear: the residual is " + shape(residual.rows, residual.cols) +
                          " and y " + shape(y.rows, y.cols));
  }
}

void compute(ThreadPool& pool, const Layer& layer, const Matrix<float>& y) {
  const int64_t panels = layer.w.num_panels / (layer.fusion.activation.is_gated ? 2 : 1);
  RowTiles tiles = cut_rows(layer);
  if (layer.x.rows * layer.w.in_features * layer.w.out_features < kSerialElements) {
    pack_alone(layer, &tiles);
    return compute_share(layer, tiles, y, {0, tiles.count, 0, panels});
  }
  // To pack a few rows over again in every thread takes less than to wait for the one who does.
  const bool packs_alone = layer.x.rows * layer.x.cols < kSerialElements / 4;
  if (!packs_alone) pack_shared(pool, layer, &tiles);
  const int64_t rows_split = row_parts(tiles.count, panels, pool.num_threads());
  const int64_t panels_split = pool.num_threads() / rows_split;
  const auto share = [&](int part) -> Share {
    if (part >= rows_split * panels_split) return {0, 0, 0, 0};
    const int64_t r = part / panels_split;
    const int64_t p = part % panels_split;
    return {tiles.count * r / rows_split, tiles.count * (r + 1) / rows_split,
            panels * p / panels_split, panels * (p + 1) / panels_split};
  };
  const auto count = [&](int part) {
    return share(part).num_pieces(tiles_per_block(layer.method));
  };
  pool.share(count, [&](ThreadPool::Pieces& pieces) {
    RowTiles mine = tiles;
    if (packs_alone) pack_alone(layer, &mine);
    do {
      compute_piece(layer, mine, y, share(pieces.part()), pieces.index(), pieces.in_order());
    } while (pieces.next());
  });
}

}  // namespace

bool can_fuse_activation(const PackedWeight& weight) {
  return weight.out_features() % (2 * kernels().panel_width) == 0;
}

LinearSplit linear_split(const PackedWeight& weight, const LinearFusion& fusion) {
  return {weight.impl().num_panels / (fusion.activation.is_gated ? 2 : 1), kernels().panel_width};
}

void linear_part(Matrix<const float> x, const PackedWeight& weight, Activations activations,
                 const LinearFusion& fusion, int64_t begin, int64_t end, Matrix<float> y) {
  const Method method = choose_method(weight.impl(), activations);
  const Layer layer{x, weight.impl(), nullptr, fusion, method};
  RowTiles tiles = cut_rows(layer);
  pack_alone(layer, &tiles);
  compute_share(layer, tiles, y, {0, tiles.count, begin, end});
}

void linear(ThreadPool& pool, Matrix<const float> x, const PackedWeight& weight, const float* bias,
            Matrix<float> y, Activations activations, const LinearFusion& fusion) {
  const PackedWeight::Impl& w = weight.impl();
  check_shapes(x, w, fusion, y);
  if (x.rows == 0 || w.num_panels == 0) return;
  const Method method = choose_method(w, activations);
  if (!fusion.activation.is_gated || can_fuse_activation(weight)) {
    return compute(pool, {x, w, bias, fusion, method}, y);
  }
  // The halves meet within a panel: both go the long way.
  thread_local Scratch scratch;
  float* room = scratch.floats(static_cast<size_t>(x.rows * w.out_features));
  const Matrix<float> both(room, x.rows, w.out_features);
  LinearFusion first;
  first.norm_weight = fusion.norm_weight;
  first.norm_eps = fusion.norm_eps;
  compute(pool, {x, w, bias, first, method}, both);
  activate(pool, both, fusion.activation, y);
  if (fusion.residual.data != nullptr) add(pool, fusion.residual, y, y);
}

}  // namespace fastpage::ops
