// Attention of the rows of one item (one sequence, one KV head) to one KV tile.
//
// Per row: scores of the tile, their maximum, probabilities relative to it, their sum and the
// weighted values; then this partial result is folded into the row's state (the online softmax of
// Milakov & Gimelshein 2018). A tile's partial result depends on nothing but the row and the tile,
// so tiles may be computed anywhere as long as they are folded in order.
//
// A single row tile reads the cache as it is; several share a copy widened to fp32.

struct CacheF32 {
  static constexpr ElementType kType = kF32;
  using Element = float;
  static inline V load(const float* p) { return vload(p); }
};
struct CacheBf16 {
  static constexpr ElementType kType = kBf16;
  using Element = uint16_t;
  static inline V load(const uint16_t* p) { return vload_bf16(p); }
};
struct CacheF16 {
  static constexpr ElementType kType = kF16;
  using Element = uint16_t;
  static inline V load(const uint16_t* p) { return vload_f16(p); }
};

static inline int padded_head_dim(int d) { return (d + kPanel - 1) / kPanel * kPanel; }

// scores[m][column, column + kPanel) for one row tile. q: [head_dim][M].
template <int M, typename Cache>
void score_columns(const float* q, int head_dim, const typename Cache::Element* k0,
                   const typename Cache::Element* k1, const char* prefetch0, const char* prefetch1,
                   float* scores) {
  V acc[M][2];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = vzero();
#pragma GCC unroll 2
  for (int d = 0; d < head_dim; ++d) {
    const V b0 = Cache::load(k0);
    const V b1 = Cache::load(k1);
    __builtin_prefetch(prefetch0);
    __builtin_prefetch(prefetch1);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const V x = vset(q[m]);
      acc[m][0] = vfma(x, b0, acc[m][0]);
      acc[m][1] = vfma(x, b1, acc[m][1]);
    }
    q += M;
    k0 += kGranule;
    k1 += kGranule;
    prefetch0 += kGranule * sizeof(*k0);
    prefetch1 += kGranule * sizeof(*k1);
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    vstore(scores + m * kKvTile, acc[m][0]);
    vstore(scores + m * kKvTile + kLanes, acc[m][1]);
  }
}

struct ValueRange {
  const void* const* v;         // granules
  const void* const* prefetch;  // granules, or null entries
  int begin;                    // columns of the tile: first and past the last
  int end;
  int stride;           // elements between positions of v
  int head_dim_column;  // first of the kPanel columns of v
};

// out[m][0, kPanel) = out * old_weight[m] + (probabilities . v) * new_weight[m]
template <int M, typename Cache>
void value_columns(const float* probabilities, const ValueRange& r, const float* old_weight,
                   const float* new_weight, float* out, int64_t out_stride) {
  using Element = typename Cache::Element;
  V acc[M][2];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = vzero();
  int n = r.begin;
  while (n < r.end) {
    const int granule = n / kGranule;
    const int granule_end = (granule + 1) * kGranule;
    const int end = r.end < granule_end ? r.end : granule_end;
    const int64_t offset = static_cast<int64_t>(n % kGranule) * r.stride + r.head_dim_column;
    const Element* v = static_cast<const Element*>(r.v[granule]) + offset;
    const Element* prefetch = static_cast<const Element*>(r.prefetch[granule]);
    prefetch = prefetch == nullptr ? v : prefetch + offset;
#pragma GCC unroll 2
    for (; n < end; ++n) {
      const V b0 = Cache::load(v);
      const V b1 = Cache::load(v + kLanes);
      __builtin_prefetch(prefetch);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const V p = vset(probabilities[m * kKvTile + n]);
        acc[m][0] = vfma(p, b0, acc[m][0]);
        acc[m][1] = vfma(p, b1, acc[m][1]);
      }
      v += r.stride;
      prefetch += r.stride;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    const V before = vset(old_weight[m]);
    const V now = vset(new_weight[m]);
    float* o = out + m * out_stride;
    vstore(o, vfma(acc[m][0], now, vmul(vload(o), before)));
    vstore(o + kLanes, vfma(acc[m][1], now, vmul(vload(o + kLanes), before)));
  }
}

// How a state (maximum `a`) and a partial result (maximum `b`) are weighted when they are folded.
struct FoldWeights {
  float max;
  float a;
  float b;
};
static inline FoldWeights fold_weights(float a, float b) {
  const float max = a > b ? a : b;
  const float none = -__builtin_inff();
  if (max == none) return {max, 1.0f, 0.0f};
  // One of the two is exactly 1, the other e^-|a - b|.
  const float decay = vreduce_max(vexp_bounded(vset(a > b ? b - a : a - b)));
  return a > b ? FoldWeights{max, 1.0f, decay} : FoldWeights{max, decay, 1.0f};
}

// Turns the scores of columns [begin, end), multiples of kPanel, into probabilities; only
// [first, last) of them are visible. Returns their maximum in *max and their sum in *sum.
static inline void softmax_row(float* s, int begin, int end, int first, int last, float soft_cap,
                               float* max, float* sum) {
  const float none = -__builtin_inff();
  if (soft_cap > 0.0f) {
    const V cap = vset(soft_cap);
    const V inverse = vset(1.0f / soft_cap);
    for (int n = begin; n < end; n += kLanes) {
      vstore(s + n, vmul(cap, vtanh(vmul(vload(s + n), inverse))));
    }
  }
  for (int n = begin; n < first; ++n) s[n] = none;
  for (int n = last > begin ? last : begin; n < end; ++n) s[n] = none;
  V highest = vset(none);
  for (int n = begin; n < end; n += kLanes) highest = vmax(vload(s + n), highest);
  *max = vreduce_max(highest);
  const V reference = vset(*max == none ? 0.0f : *max);
  V total = vzero();
  for (int n = begin; n < end; n += kLanes) {
    const V p = vexp_bounded(vsub(vload(s + n), reference));
    vstore(s + n, p);
    total = vadd(total, p);
  }
  *sum = vreduce_add(total);
}

template <typename Cache>
struct RowTileKernels {
  using Element = typename Cache::Element;
  using Score = void (*)(const float*, int, const Element*, const Element*, const char*,
                         const char*, float*);
  using Value = void (*)(const float*, const ValueRange&, const float*, const float*, float*,
                         int64_t);
};

#define FASTPAGE_ROW_TILES_4(name, T) name<1, T>, name<2, T>, name<3, T>, name<4, T>
#define FASTPAGE_ROW_TILES_6(name, T) FASTPAGE_ROW_TILES_4(name, T), name<5, T>, name<6, T>
#define FASTPAGE_ROW_TILES_12(name, T)                                                         \
  FASTPAGE_ROW_TILES_6(name, T), name<7, T>, name<8, T>, name<9, T>, name<10, T>, name<11, T>, \
      name<12, T>
#define FASTPAGE_CONCAT_(a, b) a##b
#define FASTPAGE_CONCAT(a, b) FASTPAGE_CONCAT_(a, b)
// One instantiation per number of rows, 1 to kRowTile.
#define FASTPAGE_ROW_TILES(name, T) \
  {FASTPAGE_CONCAT(FASTPAGE_ROW_TILES_, FASTPAGE_ROW_TILE)(name, T)}

template <typename Cache>
constexpr typename RowTileKernels<Cache>::Score kScoreColumns[] =
    FASTPAGE_ROW_TILES(score_columns, Cache);
template <typename Cache>
constexpr typename RowTileKernels<Cache>::Value kValueColumns[] =
    FASTPAGE_ROW_TILES(value_columns, Cache);

// The columns of the tile that token `position` sees.
struct Visible {
  int first;
  int last;
};
static inline Visible visible_columns(const AttentionTile& t, int64_t position) {
  const int64_t last = position + 1 - t.tile_position;
  const int64_t first = t.sliding_window > 0 ? last - t.sliding_window : 0;
  const auto clamp = [](int64_t x) {
    return x < 0 ? 0 : x > kKvTile ? kKvTile : static_cast<int>(x);
  };
  return {clamp(first), clamp(last)};
}

template <typename Cache>
void attend_row_tile(const AttentionTile& t, int row, int m, const void* const* k,
                     const void* const* v, int v_stride, const void* const* prefetch_v,
                     const void* const* prefetch_k, float* scores) {
  using Element = typename Cache::Element;
  const int64_t first_position = t.first_position + row / t.group;
  const int64_t last_position = t.first_position + (row + m - 1) / t.group;
  const int seen_first = visible_columns(t, first_position).first;
  const int seen_last = visible_columns(t, last_position).last;
  if (seen_first >= seen_last) return;
  const int begin = seen_first / kPanel * kPanel;
  const int end = (seen_last + kPanel - 1) / kPanel * kPanel;

  const float* q = t.q + static_cast<int64_t>(row) * t.head_dim;
  for (int n = begin; n < end; n += kPanel) {
    const auto column = [n](const void* const* granules, int lane) -> const Element* {
      const int c = n + lane;
      const auto* granule = static_cast<const Element*>(granules[c / kGranule]);
      return granule == nullptr ? nullptr : granule + c % kGranule;
    };
    // A granule that is not there has no visible column: whatever stands in for it is masked below.
    const auto either = [](const Element* p, const Element* stand_in) {
      return p == nullptr ? stand_in : p;
    };
    const Element* k0 = either(column(k, 0), column(k, kLanes));
    const Element* k1 = either(column(k, kLanes), k0);
    const auto* prefetch0 = reinterpret_cast<const char*>(either(column(prefetch_v, 0), k0));
    const auto* prefetch1 = reinterpret_cast<const char*>(either(column(prefetch_v, kLanes), k1));
    kScoreColumns<Cache>[m - 1](q, t.head_dim, k0, k1, prefetch0, prefetch1, scores + n);
  }

  float old_weight[kRowTile];
  float new_weight[kRowTile];
  for (int i = 0; i < m; ++i) {
    const Visible seen = visible_columns(t, t.first_position + (row + i) / t.group);
    float max, sum;
    softmax_row(scores + i * kKvTile, begin, end, seen.first, seen.last, t.soft_cap, &max, &sum);
    const FoldWeights w = fold_weights(t.row_max[row + i], max);
    t.row_max[row + i] = w.max;
    t.row_sum[row + i] = t.row_sum[row + i] * w.a + sum * w.b;
    old_weight[i] = w.a;
    new_weight[i] = w.b;
  }

  const int padded = padded_head_dim(t.head_dim);
  ValueRange range{v, prefetch_k, seen_first, seen_last, v_stride, 0};
  float* out = t.out + static_cast<int64_t>(row) * padded;
  for (; range.head_dim_column < padded; range.head_dim_column += kPanel) {
    kValueColumns<Cache>[m - 1](scores, range, old_weight, new_weight, out + range.head_dim_column,
                                padded);
  }
}

size_t attention_scratch(int head_dim) {
  const size_t tile = static_cast<size_t>(kKvTile) * kRowTile;
  return tile + static_cast<size_t>(kKvTile) * (head_dim + padded_head_dim(head_dim));
}

template <typename Cache>
void attention_tile(const AttentionTile& t) {
  using Element = typename Cache::Element;
  const int tiles = (t.rows + kRowTile - 1) / kRowTile;
  const int padded = padded_head_dim(t.head_dim);
  float* scores = t.scratch;
  if (tiles == 1 && padded == t.head_dim) {
    attend_row_tile<Cache>(t, 0, t.rows, t.k, t.v, t.head_dim, t.v, t.next_k, scores);
    return;
  }
  const void* k[kTileGranules] = {};
  const void* v[kTileGranules] = {};
  float* wide_k = scores + kKvTile * kRowTile;
  float* wide_v = wide_k + kKvTile * t.head_dim;
  for (int g = 0; g < kTileGranules; ++g) {
    if (t.k[g] == nullptr) continue;
    const auto* from_k = static_cast<const Element*>(t.k[g]);
    const auto* from_v = static_cast<const Element*>(t.v[g]);
    k[g] = wide_k;
    v[g] = wide_v;
    for (int d = 0; d < t.head_dim; ++d) {
      for (int n = 0; n < kGranule; n += kLanes) vstore(wide_k + n, Cache::load(from_k + n));
      from_k += kGranule;
      wide_k += kGranule;
    }
    for (int n = 0; n < kGranule; ++n) {
      int d = 0;
      for (; d + kLanes <= t.head_dim; d += kLanes) vstore(wide_v + d, Cache::load(from_v + d));
      for (; d < t.head_dim; ++d) convert_to_f32(Cache::kType, from_v + d, 1, wide_v + d);
      for (; d < padded; ++d) wide_v[d] = 0.0f;
      from_v += t.head_dim;
      wide_v += padded;
    }
  }
  for (int i = 0; i < tiles; ++i) {
    const int row = static_cast<int>(static_cast<int64_t>(t.rows) * i / tiles);
    const int next = static_cast<int>(static_cast<int64_t>(t.rows) * (i + 1) / tiles);
    attend_row_tile<CacheF32>(t, row, next - row, k, v, padded, v, k, scores);
  }
}

void attention_merge(float* out, float* row_max, float* row_sum, const float* other,
                     float other_max, float other_sum, int d) {
  const FoldWeights w = fold_weights(*row_max, other_max);
  const V before = vset(w.a);
  const V now = vset(w.b);
  *row_max = w.max;
  *row_sum = *row_sum * w.a + other_sum * w.b;
  for (int i = 0; i < d; i += kLanes) {
    vstore(out + i, vfma(vload(other + i), now, vmul(vload(out + i), before)));
  }
}
