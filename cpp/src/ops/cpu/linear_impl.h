// Linear layers over float weights and fp32 activations: packing, and the register tile of kRowTile
// rows times one panel.
//
// A panel holds kPanel consecutive out_features, [in_features][kPanel]. bf16 panels hold pairs of
// in_features, [in_features / 2][kPanel][2], in_features being filled up to a multiple of kGroup
// with zeros: a shift and a mask widen one register to two, and instructions that multiply pairs
// of bf16 take them as they are (bf16_impl.h).

// Reads one row of a panel, of which kTogether lie together; the i-th of them.
struct PanelF32 {
  using Element = float;
  static constexpr int kTogether = 1;
  static inline V load(const float* p, int, int half) { return vload(p + half * kLanes); }
};
struct PanelBf16 {
  using Element = uint16_t;
  static constexpr int kTogether = 2;
  static inline V load(const uint16_t* p, int i, int half) {
    V even, odd;
    vload_bf16_pair(p + half * 2 * kLanes, &even, &odd);
    return i == 0 ? even : odd;
  }
};
struct PanelF16 {
  using Element = uint16_t;
  static constexpr int kTogether = 1;
  static inline V load(const uint16_t* p, int, int half) { return vload_f16(p + half * kLanes); }
};

// Every kTogether-th row of a panel from the i-th on, `count` of them.
template <int M, typename Panel>
static inline __attribute__((always_inline)) void add_products(const float* a,
                                                               const typename Panel::Element* b,
                                                               int i, int64_t count,
                                                               const char* prefetch,
                                                               int64_t prefetch_step, V (*acc)[2]) {
  a += i * M;
#pragma GCC unroll 4
  for (; count > 0; --count) {
    const V b0 = Panel::load(b, i, 0);
    const V b1 = Panel::load(b, i, 1);
    __builtin_prefetch(prefetch);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const V x = vset(a[m]);
      acc[m][0] = vfma(x, b0, acc[m][0]);
      acc[m][1] = vfma(x, b1, acc[m][1]);
    }
    a += Panel::kTogether * M;
    b += Panel::kTogether * kPanel;
    prefetch += prefetch_step;
  }
}

// A step is an in_feature, of bf16 weights a group of them: of each the even ones come first, then
// the odd ones. (Turn by turn they would take more registers than AVX2 has.)
template <int M, typename Panel>
void linear_tile(const LinearTile& t) {
  if (t.n < kPanel) return linear_edge_tile<M, kPanel>(linear_tile<M, Panel>, t);
  V acc[M][2];
  begin_sums<M>(t, acc);
  const auto* a = static_cast<const float*>(t.a);
  const auto* b = static_cast<const typename Panel::Element*>(t.panel);
  if (Panel::kTogether == 1) {
    add_products<M, Panel>(a, b, 0, t.k, t.prefetch, t.prefetch_step, acc);
  } else {
    const char* prefetch = t.prefetch;
    const int64_t prefetch_step = (t.prefetch_step + kGroup - 1) / kGroup;
    for (int64_t g = t.k; g > 0; --g) {
      for (int i = 0; i < 2; ++i) {
        add_products<M, Panel>(a, b, i, kGroup / 2, prefetch, prefetch_step, acc);
        prefetch += prefetch_step * (kGroup / 2);
      }
      a += kGroup * M;
      b += kGroup * kPanel;
    }
  }
  end_sums<M>(t, acc);
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

// n elements to every kPanel-th place.
template <typename Element>
static inline void scatter(const Element* x, int64_t n, Element* out) {
  for (int64_t i = 0; i < n; ++i) out[i * kPanel] = x[i];
}

void pack_panel(ElementType source, const void* weight, int64_t stride, int n, int64_t k,
                ElementType stored, void* panel) {
  constexpr int64_t kBlock = 2 * kGroup;  // rows of the panel at a time: they stay in the L1 cache
  const int64_t source_size = source == kF32 ? 4 : 2;
  const int64_t rows = stored == kBf16 ? (k + kGroup - 1) / kGroup * kGroup : k;
  float wide[kBlock];
  uint16_t narrow[kBlock];
  uint32_t pairs[kBlock / 2];
  for (int64_t k0 = 0; k0 < rows; k0 += kBlock) {
    const int64_t count = rows - k0 < kBlock ? rows - k0 : kBlock;
    const int64_t there = k - k0 < count ? k - k0 : count;
    for (int c = 0; c < kPanel; ++c) {
      for (int64_t i = c < n ? there : 0; i < count; ++i) wide[i] = 0.0f;
      if (c < n) {
        const char* row = static_cast<const char*>(weight) + (c * stride + k0) * source_size;
        convert_to_f32(source, row, there, wide);
      }
      if (stored == kF32) {
        scatter(wide, count, static_cast<float*>(panel) + k0 * kPanel + c);
        continue;
      }
      convert_from_f32(stored, wide, count, narrow);
      if (stored == kF16) {
        scatter(narrow, count, static_cast<uint16_t*>(panel) + k0 * kPanel + c);
      } else {
        __builtin_memcpy(pairs, narrow, static_cast<size_t>(count) * sizeof(uint16_t));
        scatter(pairs, count / 2, static_cast<uint32_t*>(panel) + k0 / 2 * kPanel + c);
      }
    }
  }
}

void unpack_row(ElementType stored, const void* panel, int column, int64_t k, float* out) {
  if (stored == kF32) {
    const float* p = static_cast<const float*>(panel) + column;
    for (int64_t i = 0; i < k; ++i) out[i] = p[i * kPanel];
    return;
  }
  constexpr int64_t kBlock = 64;
  uint16_t narrow[kBlock];
  const uint16_t* p = static_cast<const uint16_t*>(panel);
  for (int64_t k0 = 0; k0 < k; k0 += kBlock) {
    const int64_t count = k - k0 < kBlock ? k - k0 : kBlock;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = k0 + i;
      narrow[i] =
          stored == kBf16 ? p[(at / 2 * kPanel + column) * 2 + at % 2] : p[at * kPanel + column];
    }
    convert_to_f32(stored, narrow, count, out + k0);
  }
}
