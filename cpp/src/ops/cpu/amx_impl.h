// Linear layers by AMX, over Tiles: the instructions (amx_tiles.h) or their emulation. Panels and
// activations lie as for AVX-512: 32 in_features of a panel's half are one tile of it, and of up to
// 16 rows another.

constexpr int kTilePanel = 32;  // out_features of a panel
constexpr int kTileRows = 16;
constexpr int kTileLanes = 16;  // out_features of a tile

// ---- bf16: two tiles of rows times two of out_features, summed in tiles 0 to 3. To each sum an
// instruction adds the products of 32 in_features: the even ones and the odd ones are summed apart.

constexpr void set_shape(TileConfig* config, int tile, int rows, int bytes_per_row) {
  config->rows[tile] = static_cast<uint8_t>(rows);
  config->bytes_per_row[tile] = static_cast<uint16_t>(rows > 0 ? bytes_per_row : 0);
}

template <int M>
constexpr TileConfig bf16_config() {
  constexpr int kLow = M < kTileRows ? M : kTileRows;
  TileConfig c = {};
  c.palette = 1;
  for (int i = 0; i < 2; ++i) {
    set_shape(&c, i, kLow, 4 * kTileLanes);
    set_shape(&c, 2 + i, M - kLow, 4 * kTileLanes);
    set_shape(&c, 4 + i, i == 0 ? kLow : M - kLow, 2 * kGroup);
    set_shape(&c, 6 + i, kGroup / 2, 4 * kTileLanes);
  }
  return c;
}

template <typename Tiles, int C>
static inline void begin_tile(bool accumulate, const float* y, int64_t stride) {
  if (accumulate) {
    Tiles::template load<C>(y, stride);
  } else {
    Tiles::template zero<C>();
  }
}

// The products of one group.
template <int M, typename Tiles>
static inline void multiply_group(const char* a, const char* b) {
  constexpr int64_t kRowBytes = 4 * kTilePanel;
  Tiles::template load<6>(b, kRowBytes);
  Tiles::template load<7>(b + kRowBytes / 2, kRowBytes);
  Tiles::template load<4>(a, kBf16GroupBytes);
  Tiles::template multiply_bf16<0, 4, 6>();
  Tiles::template multiply_bf16<1, 4, 7>();
  if (M <= kTileRows) return;
  Tiles::template load<5>(a + kTileRows * kBf16GroupBytes, kBf16GroupBytes);
  Tiles::template multiply_bf16<2, 5, 6>();
  Tiles::template multiply_bf16<3, 5, 7>();
}

template <int M, typename Tiles>
void amx_bf16_tile(const LinearTile& t) {
  if (t.n < kTilePanel) return linear_edge_tile<M, kTilePanel>(amx_bf16_tile<M, Tiles>, t);
  static constexpr TileConfig kConfig = bf16_config<M>();
  const int64_t stride = t.y_stride * static_cast<int64_t>(sizeof(float));
  float* const high = t.y + kTileRows * t.y_stride;
  Tiles::configure(kConfig);
  begin_tile<Tiles, 0>(t.accumulate, t.y, stride);
  begin_tile<Tiles, 1>(t.accumulate, t.y + kTileLanes, stride);
  if (M > kTileRows) {
    begin_tile<Tiles, 2>(t.accumulate, high, stride);
    begin_tile<Tiles, 3>(t.accumulate, high + kTileLanes, stride);
  }
  const auto* a = static_cast<const char*>(t.a);
  const auto* b = static_cast<const char*>(t.panel);
  constexpr int64_t kBytes = int64_t{2} * kGroup * kTilePanel;
  const char* prefetch = t.prefetch;
  for (int64_t g = t.k; g > 0; --g) {
    for (int64_t i = 0; i < t.prefetch_step; i += 64) __builtin_prefetch(prefetch + i);
    multiply_group<M, Tiles>(a, b);
    a += M * kBf16GroupBytes;
    b += kBytes;
    prefetch += t.prefetch_step;
  }
  Tiles::template store<0>(t.y, stride);
  Tiles::template store<1>(t.y + kTileLanes, stride);
  if (M > kTileRows) {
    Tiles::template store<2>(high, stride);
    Tiles::template store<3>(high + kTileLanes, stride);
  }
  Tiles::release();
  if (t.bias == nullptr) return;
  for (int m = 0; m < M; ++m) {
    float* const y = t.y + m * t.y_stride;
    for (int c = 0; c < kTilePanel; c += kLanes)
      vstore(y + c, vadd(vload(y + c), vload(t.bias + c)));
  }
}

// ---- int8 (kInt8, kQ8_0), weights stored plus 128: what VNNI gives, to the bit.

template <int M>
constexpr TileConfig int8_config() {
  static_assert(M <= kTileRows, "");
  TileConfig c = {};
  c.palette = 1;
  set_shape(&c, 0, M, 4 * kTileLanes);
  set_shape(&c, 1, M, kGroup);
  set_shape(&c, 2, kGroup / 4, 4 * kTileLanes);
  return c;
}

// One half of the panel; y, scale and bias are that half's.
template <int M, QuantFormat F, typename Tiles>
static inline void amx_int8_half(const LinearTile& t, int half) {
  constexpr int kVectors = kTileLanes / kLanes;
  constexpr int64_t kRowBytes = 4 * kTilePanel;
  const int column = half * kTileLanes;
  V sum[M][kVectors];
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < kVectors; ++v) {
      sum[m][v] = t.accumulate ? vload(t.y + m * t.y_stride + column + v * kLanes) : vzero();
    }
  }
  const auto* a = static_cast<const int32_t*>(t.a);
  const auto* b = static_cast<const char*>(t.panel);
  const char* prefetch = t.prefetch;
  alignas(64) int32_t dots[M][kTileLanes];
  for (int64_t g = t.k; g > 0; --g) {
    if (half == 0) {
      for (int64_t i = 0; i < t.prefetch_step; i += 64) __builtin_prefetch(prefetch + i);
    }
    Tiles::template zero<0>();
    Tiles::template load<1>(a, kGroup);
    Tiles::template load<2>(b + group_header_bytes(F, kTilePanel) + 4 * column, kRowBytes);
    Tiles::template multiply_int8<0, 1, 2>();
    Tiles::template store<0>(dots, sizeof(dots[0]));
    const auto* scales = reinterpret_cast<const float*>(a + 8 * M);
    const int32_t* begins = a + 10 * M;
    for (int v = 0; v < kVectors; ++v) {
      const auto* header = reinterpret_cast<const uint16_t*>(b) + column + v * kLanes;
      const V d = has_group_scales(F) ? vload_f16(header) : vzero();
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        VI dot;
        __builtin_memcpy(&dot, &dots[m][v * kLanes], sizeof(dot));
        V y = vfrom_int(dot + begins[m]);
        if (has_group_scales(F)) y = vmul(y, d);
        sum[m][v] = vfma(y, vset(scales[m]), sum[m][v]);
      }
    }
    a += kActivationGroupBytes / 4 * M;
    b += group_bytes(F, kTilePanel);
    prefetch += t.prefetch_step;
  }
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < kVectors; ++v) {
      const int c = column + v * kLanes;
      V y = sum[m][v];
      if (t.scale != nullptr) y = vmul(y, vload(t.scale + c));
      if (t.bias != nullptr) y = vadd(y, vload(t.bias + c));
      vstore(t.y + m * t.y_stride + c, y);
    }
  }
}

template <int M, QuantFormat F, typename Tiles>
void amx_int8_tile(const LinearTile& t) {
  if (t.n < kTilePanel) return linear_edge_tile<M, kTilePanel>(amx_int8_tile<M, F, Tiles>, t);
  static constexpr TileConfig kConfig = int8_config<M>();
  Tiles::configure(kConfig);
  amx_int8_half<M, F, Tiles>(t, 0);
  amx_int8_half<M, F, Tiles>(t, 1);
  Tiles::release();
}

// ---- into the table: one function for each number of rows

template <int M>
constexpr void set_bf16_tiles(void (**tile)(const LinearTile&)) {
  if constexpr (M > 0) {
    set_bf16_tiles<M - 1>(tile);
    tile[M - 1] = amx_bf16_tile<M, KernelTiles>;
  }
}
// From kLeast rows on.
template <int M, int kLeast, QuantFormat F>
constexpr void set_int8_tiles(void (**tile)(const LinearTile&)) {
  if constexpr (M >= kLeast) {
    set_int8_tiles<M - 1, kLeast, F>(tile);
    tile[M - 1] = amx_int8_tile<M, F, KernelTiles>;
  }
}
