// Linear layers: packing, and the register tile of kRowTile rows times one panel.
//
// A panel holds kPanel = 2 * kLanes consecutive out_features, [in_features][kPanel]. bf16 panels
// interleave the two halves of a row (lane i of the first beside lane i of the second), so that a
// shift and a mask widen one register to two.

constexpr int kPanel = 2 * kLanes;

// Reads one panel row.
struct PanelF32 {
  using Element = float;
  static inline void load(const float* p, V* b0, V* b1) {
    *b0 = vload(p);
    *b1 = vload(p + kLanes);
  }
};
struct PanelBf16 {
  using Element = uint16_t;
  static inline void load(const uint16_t* p, V* b0, V* b1) { vload_bf16_pair(p, b0, b1); }
};
struct PanelF16 {
  using Element = uint16_t;
  static inline void load(const uint16_t* p, V* b0, V* b1) {
    *b0 = vload_f16(p);
    *b1 = vload_f16(p + kLanes);
  }
};

// The last panel may be wider than y: it is computed beside y, and what exists is copied.
static void linear_edge_tile(void (*linear_tile)(const LinearTile&), int m, const LinearTile& t) {
  float y[kRowTile * kPanel] = {};
  float bias[kPanel] = {};
  const size_t bytes = static_cast<size_t>(t.n) * sizeof(float);
  LinearTile whole = t;
  whole.n = kPanel;
  whole.y = y;
  whole.y_stride = kPanel;
  if (t.bias != nullptr) {
    __builtin_memcpy(bias, t.bias, bytes);
    whole.bias = bias;
  }
  if (t.accumulate) {
    for (int i = 0; i < m; ++i) __builtin_memcpy(y + i * kPanel, t.y + i * t.y_stride, bytes);
  }
  linear_tile(whole);
  for (int i = 0; i < m; ++i) __builtin_memcpy(t.y + i * t.y_stride, y + i * kPanel, bytes);
}

template <int M, typename Panel>
void linear_tile(const LinearTile& t) {
  if (t.n < kPanel) return linear_edge_tile(linear_tile<M, Panel>, M, t);
  V acc[M][2];
  if (t.accumulate) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      acc[m][0] = vload(t.y + m * t.y_stride);
      acc[m][1] = vload(t.y + m * t.y_stride + kLanes);
    }
  } else {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = vzero();
  }

  const auto* a = static_cast<const float*>(t.a);
  const auto* b = static_cast<const typename Panel::Element*>(t.panel);
  const char* prefetch = t.prefetch;
  const int64_t prefetch_step = t.prefetch_step;
#pragma GCC unroll 4
  for (int64_t k = t.k; k > 0; --k) {
    V b0, b1;
    Panel::load(b, &b0, &b1);
    __builtin_prefetch(prefetch);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const V x = vset(a[m]);
      acc[m][0] = vfma(x, b0, acc[m][0]);
      acc[m][1] = vfma(x, b1, acc[m][1]);
    }
    a += M;
    b += kPanel;
    prefetch += prefetch_step;
  }

  if (t.bias != nullptr) {
    const V c0 = vload(t.bias);
    const V c1 = vload(t.bias + kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      acc[m][0] = vadd(acc[m][0], c0);
      acc[m][1] = vadd(acc[m][1], c1);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    vstore(t.y + m * t.y_stride, acc[m][0]);
    vstore(t.y + m * t.y_stride + kLanes, acc[m][1]);
  }
}

void pack_rows(const float* const* rows, int m, int64_t k, float scale, float* out) {
  using Quad = float __attribute__((vector_size(16)));
  const int quads = m / 4 * 4;
  int64_t i = 0;
  for (; i + 4 <= k; i += 4) {
    for (int r = 0; r < quads; r += 4) {  // four by four, transposed in registers
      Quad x[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        __builtin_memcpy(&x[j], rows[r + j] + i, sizeof(Quad));
        x[j] *= scale;
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Quad y = {x[0][j], x[1][j], x[2][j], x[3][j]};
        __builtin_memcpy(out + (i + j) * m + r, &y, sizeof(Quad));
      }
    }
    for (int r = quads; r < m; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) out[(i + j) * m + r] = rows[r][i + j] * scale;
    }
  }
  for (; i < k; ++i) {
    for (int r = 0; r < m; ++r) out[i * m + r] = rows[r][i] * scale;
  }
}

// Where out_feature `column` of a panel lies within a row of it.
static inline int panel_slot(ElementType stored, int column) {
  if (stored != kBf16) return column;
  return column < kLanes ? 2 * column : 2 * (column - kLanes) + 1;
}

void pack_panel(ElementType source, const void* weight, int64_t stride, int n, int64_t k,
                ElementType stored, void* panel) {
  constexpr int64_t kBlock = 64;  // rows of the panel at a time: they stay in the L1 cache
  const int64_t source_size = source == kF32 ? 4 : 2;
  float wide[kBlock];
  uint16_t narrow[kBlock];
  for (int64_t k0 = 0; k0 < k; k0 += kBlock) {
    const int64_t count = k - k0 < kBlock ? k - k0 : kBlock;
    for (int c = 0; c < kPanel; ++c) {
      const int slot = panel_slot(stored, c);
      if (c >= n) {
        for (int64_t i = 0; i < count; ++i) wide[i] = 0.0f;
      } else {
        const char* row = static_cast<const char*>(weight) + (c * stride + k0) * source_size;
        convert_to_f32(source, row, count, wide);
      }
      if (stored == kF32) {
        float* out = static_cast<float*>(panel) + k0 * kPanel + slot;
        for (int64_t i = 0; i < count; ++i) out[i * kPanel] = wide[i];
      } else {
        convert_from_f32(stored, wide, count, narrow);
        uint16_t* out = static_cast<uint16_t*>(panel) + k0 * kPanel + slot;
        for (int64_t i = 0; i < count; ++i) out[i * kPanel] = narrow[i];
      }
    }
  }
}

void unpack_row(ElementType stored, const void* panel, int column, int64_t k, float* out) {
  const int slot = panel_slot(stored, column);
  if (stored == kF32) {
    const float* p = static_cast<const float*>(panel) + slot;
    for (int64_t i = 0; i < k; ++i) out[i] = p[i * kPanel];
    return;
  }
  constexpr int64_t kBlock = 64;
  uint16_t narrow[kBlock];
  const uint16_t* p = static_cast<const uint16_t*>(panel) + slot;
  for (int64_t k0 = 0; k0 < k; k0 += kBlock) {
    const int64_t count = k - k0 < kBlock ? k - k0 : kBlock;
    for (int64_t i = 0; i < count; ++i) narrow[i] = p[(k0 + i) * kPanel];
    convert_to_f32(stored, narrow, count, out + k0);
  }
}
