// Attention of the rows of one item (one sequence, one KV head) to one KV tile.
//
// Per row: scores of the tile, their maximum, probabilities relative to it, their sum and the
// weighted values; then this partial result is folded into the row's state (the online softmax of
// Milakov & Gimelshein 2018). A tile's partial result depends on nothing but the row and the tile,
// so tiles may be computed anywhere as long as they are folded in order.
//
// A single row tile reads the cache as it is; several share a copy widened to fp32. Where bf16 is
// multiplied as it is (attention_bf16_impl.h), all read the cache.

// How the cache lies in memory. A step of the scores reads kRowsTogether rows of head_dim, a cache
// line of a granule: load_k(p, r) is row r of it for the kLanes positions at p, kPositionStride
// elements apart from each other. load_v(p, c) is vector c of a position's values; where
// kPairedValues, vectors 2i and 2i + 1 hold the even and the odd ones of their range.
struct CacheF32 {
  using Element = float;
  static constexpr int kRowsTogether = 1;
  static constexpr int kPositionStride = 1;
  static constexpr bool kPairedValues = false;
  static constexpr bool kScaled = false;
  static constexpr bool kRoundsProbabilities = false;
  static inline float value(float x) { return x; }
  static inline V load(const float* p) { return vload(p); }
  static inline V load_k(const float* p, int) { return load(p); }
  static inline V load_v(const float* p, int c) { return load(p + c * kLanes); }
};
struct CacheBf16 {
  using Element = uint16_t;
  static constexpr int kRowsTogether = 2;
  static constexpr int kPositionStride = 2;
  static constexpr bool kPairedValues = true;
  static constexpr bool kScaled = false;
  static constexpr bool kRoundsProbabilities = false;
  static inline float value(uint16_t x) { return f32_from_bf16(x); }
  static inline V load(const uint16_t* p) { return vload_bf16(p); }
  static inline V load_half(const uint16_t* p, int odd) {
    V even_half, odd_half;
    vload_bf16_pair(p, &even_half, &odd_half);
    return odd ? odd_half : even_half;
  }
  static inline V load_k(const uint16_t* p, int r) { return load_half(p, r); }
  static inline V load_v(const uint16_t* p, int c) {
    return load_half(p + c / 2 * 2 * kLanes, c % 2);
  }
};
struct CacheF16 {
  using Element = uint16_t;
  static constexpr int kRowsTogether = 2;
  static constexpr int kPositionStride = 1;
  static constexpr bool kPairedValues = false;
  static constexpr bool kScaled = false;
  static constexpr bool kRoundsProbabilities = false;
  static inline float value(uint16_t x) { return f32_from_f16(x); }
  static inline V load(const uint16_t* p) { return vload_f16(p); }
  static inline V load_k(const uint16_t* p, int r) { return load(p + r * kGranule); }
  static inline V load_v(const uint16_t* p, int c) { return load(p + c * kLanes); }
};

// Integers; behind a granule's stand its 16 positions' scales, fp32.
struct CacheI8 {
  using Element = int8_t;
  static constexpr int kRowsTogether = 4;
  static constexpr int kPositionStride = 1;
  static constexpr bool kPairedValues = false;
  static constexpr bool kScaled = true;
  static constexpr bool kRoundsProbabilities = false;
  static inline float value(int8_t x) { return static_cast<float>(x); }
  static inline V load(const int8_t* p) { return vload_i8(p); }
  static inline V load_k(const int8_t* p, int r) { return load(p + r * kGranule); }
  static inline V load_v(const int8_t* p, int c) { return load(p + c * kLanes); }
};

static inline int padded_head_dim(int d) { return (d + kPanel - 1) / kPanel * kPanel; }

// Vectors of columns that M rows take at once: more of them keep the multipliers busy where few
// rows do not, as long as the sums stay in registers.
constexpr int kVectorRegisters = kLanes == 16 ? 32 : 16;
constexpr int wide_columns(int m) { return 4 * m + 5 <= kVectorRegisters ? 4 : 2; }

// scores[m][0, C * kLanes) for one row tile. q: [head_dim][M]; k, prefetch: per vector of columns.
template <int M, int C, typename Cache>
void score_columns(const float* q, int head_dim, const void* const* k, const char* const* prefetch,
                   float* scores) {
  using Element = typename Cache::Element;
  constexpr int kStep = kGranule * Cache::kRowsTogether;
  V acc[M][C];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[m][c] = vzero();
  }
  const Element* column[C];
  const char* ahead[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    column[c] = static_cast<const Element*>(k[c]);
    ahead[c] = prefetch[c];
  }
  const int64_t end = static_cast<int64_t>(head_dim) * kGranule;
  for (int64_t at = 0; at < end; at += kStep) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      // Half granules lie in the same cache lines.
      if (c * kLanes % kGranule == 0) __builtin_prefetch(ahead[c] + at * sizeof(Element));
    }
#pragma GCC unroll 4
    for (int r = 0; r < Cache::kRowsTogether; ++r) {
      V b[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) b[c] = Cache::load_k(column[c] + at, r);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const V x = vset(q[m]);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[m][c] = vfma(x, b[c], acc[m][c]);
      }
      q += M;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) vstore(scores + m * kKvTile + c * kLanes, acc[m][c]);
  }
}

struct ValueRange {
  const void* const* v;         // granules
  const void* const* prefetch;  // granules, or null entries
  int begin;                    // columns of the tile: first and past the last
  int end;
  int stride;           // elements between positions of v
  int head_dim_column;  // first of the C * kLanes columns of v
};

// out[m][0, C * kLanes) = out * old_weight[m] + (probabilities . v) * new_weight[m]
template <int M, int C, typename Cache>
void value_columns(const float* probabilities, const ValueRange& r, const float* old_weight,
                   const float* new_weight, float* out, int64_t out_stride) {
  using Element = typename Cache::Element;
  constexpr int kRowBytes = C * kLanes * static_cast<int>(sizeof(Element));
  V acc[M][C];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[m][c] = vzero();
  }
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
#pragma GCC unroll 4
      for (int byte = 0; byte < kRowBytes; byte += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(prefetch) + byte);
      }
      V b[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) b[c] = Cache::load_v(v, c);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const V p = vset(probabilities[m * kKvTile + n]);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[m][c] = vfma(p, b[c], acc[m][c]);
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
#pragma GCC unroll 4
    for (int c = 0; c < C; c += 2) {
      if (Cache::kPairedValues) vinterleave(&acc[m][c], &acc[m][c + 1]);
#pragma GCC unroll 2
      for (int i = c; i < c + 2; ++i) {
        vstore(o + i * kLanes, vfma(acc[m][i], now, vmul(vload(o + i * kLanes), before)));
      }
    }
  }
}

// Rows whose maxima are folded at once, each a lane of a vector.
constexpr int kFoldRows = kLanes;
static_assert(kRowTile <= kFoldRows, "");

// How states (maxima `max`) and partial results (maxima `other`) are weighted when they are folded:
// one of the two by 1, the other by e^-|max - other|. All have kFoldRows. Returns the larger
// maxima.
static inline V fold_weights(V max, V other, float* weight, float* other_weight) {
  const V larger = vmax(max, other);
  // Minus infinity, where nothing was visible yet: both weights become 0.
  const V reference = vmax(larger, vset(-__FLT_MAX__));
  vstore(weight, vexp_bounded(vsub(max, reference)));
  vstore(other_weight, vexp_bounded(vsub(other, reference)));
  return larger;
}

// Columns of the tile.
struct Columns {
  int first;
  int last;  // past the last
};

// The largest score in [begin, end), multiples of kPanel, of which only `seen` count.
static inline float row_maximum(float* s, int begin, int end, Columns seen) {
  const float none = -__builtin_inff();
  for (int n = begin; n < seen.first; ++n) s[n] = none;
  for (int n = seen.last > begin ? seen.last : begin; n < end; ++n) s[n] = none;
  V highest[2] = {vset(none), vset(none)};
  for (int n = begin; n < end; n += 2 * kLanes) {
    highest[0] = vmax(vload(s + n), highest[0]);
    highest[1] = vmax(vload(s + n + kLanes), highest[1]);
  }
  return vreduce_max(vmax(highest[0], highest[1]));
}

// Turns the scores into probabilities relative to their maximum; returns their sum.
static inline float exponentiate(float* s, int begin, int end, float maximum) {
  const V reference = vset(maximum == -__builtin_inff() ? 0.0f : maximum);
  V total = vzero();
#pragma GCC unroll 4
  for (int n = begin; n < end; n += kLanes) {
    const V p = vexp_bounded(vsub(vload(s + n), reference));
    vstore(s + n, p);
    total = vadd(total, p);
  }
  return vreduce_add(total);
}

// The scales of a scaled granule: behind its integers.
static inline const float* scales_of(const void* granule, int head_dim) {
  const void* behind = static_cast<const char*>(granule) + kGranule * head_dim;
  return static_cast<const float*>(behind);
}

static inline void scale_columns(float* s, int begin, int end, const void* const* granules,
                                 int head_dim) {
  for (int n = begin; n < end; n += kLanes) {
    const void* granule = granules[n / kGranule];
    if (granule == nullptr) continue;
    const V scale = vload(scales_of(granule, head_dim) + n % kGranule);
    vstore(s + n, vmul(vload(s + n), scale));
  }
}

static inline void cap_scores(float* s, int begin, int end, float soft_cap) {
  const V cap = vset(soft_cap);
  const V inverse = vset(1.0f / soft_cap);
  for (int n = begin; n < end; n += kLanes) {
    vstore(s + n, vmul(cap, vtanh(vmul(vload(s + n), inverse))));
  }
}

// ALiBi: slope times how far back a position is. `first`: of column 0, relative to the row's own.
static inline void add_bias(float* s, int begin, int end, float slope, int first) {
  static constexpr float kCount[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  static_assert(kLanes <= 16, "");
  const V lanes = vload(kCount);
  for (int n = begin; n < end; n += kLanes) {
    const V distance = vadd(vset(static_cast<float>(first + n)), lanes);
    vstore(s + n, vfma(vset(slope), distance, vload(s + n)));
  }
}

struct RowTileKernels {
  using Score = void (*)(const float*, int, const void* const*, const char* const*, float*);
  using Value = void (*)(const float*, const ValueRange&, const float*, const float*, float*,
                         int64_t);
  int columns;  // vectors of them that the wide ones take; the others take two
  Score score_wide;
  Score score;
  Value value_wide;
  Value value;
};

template <int M, typename Cache>
constexpr RowTileKernels kRowTileKernels = {
    wide_columns(M), score_columns<M, wide_columns(M), Cache>, score_columns<M, 2, Cache>,
    value_columns<M, wide_columns(M), Cache>, value_columns<M, 2, Cache>};

template <typename Cache>
constexpr RowTileKernels kKernelsByRows[] = FASTPAGE_ROW_TILES(kRowTileKernels, Cache);

// The columns of the tile that a row sees.
static inline Columns visible_columns(const AttentionTile& t, int row) {
  const int64_t last = int64_t{t.positions[row]} + 1 - t.tile_position;
  const int64_t first = t.sliding_window > 0 ? last - t.sliding_window : 0;
  const auto clamp = [](int64_t x) {
    return x < 0 ? 0 : x > kKvTile ? kKvTile : static_cast<int>(x);
  };
  return {clamp(first), clamp(last)};
}

// A tile's granules as the row tiles read them, which may be a widened copy, and what is fetched
// while each of them is read. (Pointers into AttentionTile where they can be: what is copied in one
// go right after it was written piece by piece waits until all before it is done.)
struct Granules {
  const void* const* k;
  const void* const* v;
  const void* const* with_k;
  const void* const* with_v;
  int v_stride;
};

// Scores of rows [row, row + m) to probabilities relative to each row's maximum in the tile.
// Returns in *_weight how the rows' states and the tile's results are to be folded.
template <bool kScaled>
void attend_softmax(const AttentionTile& t, int row, int m, int begin, int end, float* scores,
                    float* old_weight, float* new_weight) {
  float maximum[kFoldRows];
  // Lane by lane: loaded from memory as a whole they would have to wait for the stores to get
  // there.
  V maxima = vzero();
  V state_maxima = vzero();
  for (int i = 0; i < m; ++i) {
    float* s = scores + i * kKvTile;
    const Columns seen = visible_columns(t, row + i);
    if (kScaled) scale_columns(s, begin, end, t.granules, t.head_dim);
    if (t.soft_cap > 0.0f) cap_scores(s, begin, end, t.soft_cap);
    if (t.slopes != nullptr) {
      add_bias(s, begin, end, t.slopes[row + i],
               static_cast<int>(t.tile_position - t.positions[row + i]));
    }
    maximum[i] = end - begin == kKvTile ? row_maximum(s, 0, kKvTile, seen)
                                        : row_maximum(s, begin, end, seen);
    maxima = vset_lane(maxima, i, maximum[i]);
    state_maxima = vset_lane(state_maxima, i, t.row_max[row + i]);
  }
  float state_maximum[kFoldRows];
  vstore(state_maximum, fold_weights(state_maxima, maxima, old_weight, new_weight));
  for (int i = 0; i < m; ++i) {
    float* s = scores + i * kKvTile;
    const float sum = end - begin == kKvTile ? exponentiate(s, 0, kKvTile, maximum[i])
                                             : exponentiate(s, begin, end, maximum[i]);
    t.row_max[row + i] = state_maximum[i];
    t.row_sum[row + i] = t.row_sum[row + i] * old_weight[i] + sum * new_weight[i];
    if (kScaled) scale_columns(s, begin, end, t.granules + kTileGranules, t.head_dim);
  }
}

template <typename Cache, bool kScaled>
void attend_row_tile(const AttentionTile& t, const Granules& g, int row, int m, float* scores) {
  using Element = typename Cache::Element;
  Columns seen = visible_columns(t, row);
  for (int i = 1; i < m; ++i) {
    const Columns other = visible_columns(t, row + i);
    if (other.first < seen.first) seen.first = other.first;
    if (other.last > seen.last) seen.last = other.last;
  }
  if (seen.first >= seen.last) return;
  const int begin = seen.first / kPanel * kPanel;
  const int end = (seen.last + kPanel - 1) / kPanel * kPanel;
  const RowTileKernels& kernels = kKernelsByRows<Cache>[m - 1];

  const float* q = t.q + static_cast<int64_t>(row) * t.head_dim;
  for (int n = begin, columns; n < end; n += columns * kLanes) {
    columns = end - n >= kernels.columns * kLanes ? kernels.columns : 2;
    const void* from[4];
    const char* ahead[4];
    for (int c = 0; c < columns; ++c) {
      const int granule = (n + c * kLanes) / kGranule;
      const int64_t offset = static_cast<int64_t>((n + c * kLanes) % kGranule) *
                             Cache::kPositionStride * static_cast<int64_t>(sizeof(Element));
      // A granule that is not there has no visible column: whatever stands in for it is masked
      // below.
      const void* there = g.k[granule] != nullptr ? g.k[granule] : g.k[seen.first / kGranule];
      from[c] = static_cast<const char*>(there) + offset;
      const void* next = g.with_k[granule] != nullptr ? g.with_k[granule] : there;
      ahead[c] = static_cast<const char*>(next) + offset;
    }
    (columns > 2 ? kernels.score_wide : kernels.score)(q, t.head_dim, from, ahead, scores + n);
  }

  float old_weight[kFoldRows];
  float new_weight[kFoldRows];
  attend_softmax<kScaled>(t, row, m, begin, end, scores, old_weight, new_weight);
  if constexpr (Cache::kRoundsProbabilities) {
    for (int i = 0; i < m; ++i) Cache::round_probabilities(scores + i * kKvTile, begin, end);
  }

  const int padded = padded_head_dim(t.head_dim);
  ValueRange range{g.v, g.with_v, seen.first, seen.last, g.v_stride, 0};
  float* out = t.out + static_cast<int64_t>(row) * padded;
  for (int columns; range.head_dim_column < padded; range.head_dim_column += columns * kLanes) {
    columns = padded - range.head_dim_column >= kernels.columns * kLanes ? kernels.columns : 2;
    (columns > 2 ? kernels.value_wide : kernels.value)(scores, range, old_weight, new_weight,
                                                       out + range.head_dim_column, padded);
  }
}

static inline size_t attention_scratch(int head_dim) {
  const size_t tile = static_cast<size_t>(kKvTile) * kRowTile;
  return tile + static_cast<size_t>(kKvTile) * (head_dim + padded_head_dim(head_dim));
}

// One granule of keys to [head_dim][16] fp32.
template <typename Cache>
void widen_keys(const typename Cache::Element* from, int head_dim, float* wide) {
  constexpr int kRows = Cache::kRowsTogether;
  int d = 0;
  for (; d + kRows <= head_dim; d += kRows) {
    for (int r = 0; r < kRows; ++r) {
      for (int n = 0; n < kGranule; n += kLanes) {
        vstore(wide + r * kGranule + n, Cache::load_k(from + n * Cache::kPositionStride, r));
      }
    }
    from += kRows * kGranule;
    wide += kRows * kGranule;
  }
  for (; d < head_dim; ++d) {  // a last row without its pair lies as it would alone
    for (int n = 0; n < kGranule; n += kLanes) vstore(wide + n, Cache::load(from + n));
    from += kGranule;
    wide += kGranule;
  }
}

// One granule of values to [16][padded] fp32.
template <typename Cache>
void widen_values(const typename Cache::Element* from, int head_dim, int padded, float* wide) {
  for (int n = 0; n < kGranule; ++n) {
    int d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) vstore(wide + d, Cache::load(from + d));
    for (; d < head_dim; ++d) wide[d] = Cache::value(from[d]);
    for (; d < padded; ++d) wide[d] = 0.0f;
    from += head_dim;
    wide += padded;
  }
}

static inline void fetch_ahead(const void* memory, size_t bytes) {
  if (memory == nullptr) return;
  for (size_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(static_cast<const char*>(memory) + i);
  }
}

// Of the values, and of the keys that will be read next.
static inline void fetch_scales(const AttentionTile& t) {
  for (int i = kTileGranules; i < 3 * kTileGranules; ++i) {
    if (t.granules[i] != nullptr) __builtin_prefetch(scales_of(t.granules[i], t.head_dim));
  }
}

// A row tile reads the cache as it is, and has fetched what is `ahead` granules further on.
static inline Granules granules_in_place(const AttentionTile& t, int ahead) {
  const void* const* k = t.granules;
  const void* const* v = t.granules + kTileGranules;
  return {k, v, k + ahead, v + ahead, t.head_dim};
}

template <typename Cache>
void attention_tile(const AttentionTile& t) {
  using Element = typename Cache::Element;
  const int tiles = (t.rows + kRowTile - 1) / kRowTile;
  const int padded = padded_head_dim(t.head_dim);
  float* scores = t.scratch;
  if (Cache::kScaled) fetch_scales(t);
  if (tiles == 1 && padded == t.head_dim) {
    const Granules g = granules_in_place(t, kTileGranules);
    attend_row_tile<Cache, Cache::kScaled>(t, g, 0, t.rows, scores);
    return;
  }
  float* wide_k = scores + kKvTile * kRowTile;
  float* wide_v = wide_k + kKvTile * t.head_dim;
  const void* k[kTileGranules] = {};
  const void* v[kTileGranules] = {};
  for (int i = 0; i < kTileGranules; ++i) {
    const void* from_k = t.granules[i];
    const void* from_v = t.granules[kTileGranules + i];
    if (from_k == nullptr) continue;
    const size_t bytes = static_cast<size_t>(kGranule) * t.head_dim * sizeof(Element);
    fetch_ahead(from_v, bytes);
    widen_keys<Cache>(static_cast<const Element*>(from_k), t.head_dim, wide_k);
    fetch_ahead(t.granules[2 * kTileGranules + i], bytes);
    widen_values<Cache>(static_cast<const Element*>(from_v), t.head_dim, padded, wide_v);
    k[i] = wide_k;
    v[i] = wide_v;
    wide_k += kGranule * t.head_dim;
    wide_v += kGranule * padded;
  }
  const Granules g = {k, v, v, k, padded};
  for (int i = 0; i < tiles; ++i) {
    const int row = static_cast<int>(static_cast<int64_t>(t.rows) * i / tiles);
    const int next = static_cast<int>(static_cast<int64_t>(t.rows) * (i + 1) / tiles);
    attend_row_tile<CacheF32, Cache::kScaled>(t, g, row, next - row, scores);
  }
}

static inline void attention_merge(int rows, int d, float* out, float* row_max, float* row_sum,
                                   const float* other, const float* other_max,
                                   const float* other_sum) {
  for (int first = 0; first < rows; first += kFoldRows) {
    const int m = rows - first < kFoldRows ? rows - first : kFoldRows;
    float max[kFoldRows];
    float weight[kFoldRows];
    float new_weight[kFoldRows];
    vstore(max, fold_weights(vload_partial(row_max + first, m), vload_partial(other_max + first, m),
                             weight, new_weight));
    for (int i = 0; i < m; ++i) {
      const int r = first + i;
      row_max[r] = max[i];
      row_sum[r] = row_sum[r] * weight[i] + other_sum[r] * new_weight[i];
      const V before = vset(weight[i]);
      const V now = vset(new_weight[i]);
      float* o = out + static_cast<int64_t>(r) * d;
      const float* p = other + static_cast<int64_t>(r) * d;
      for (int j = 0; j < d; j += kLanes) {
        vstore(o + j, vfma(vload(p + j), now, vmul(vload(o + j), before)));
      }
    }
  }
}

static inline float quantize_i8(const float* x, int64_t n, int8_t* y) {
  float largest = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    const float a = x[i] < 0.0f ? -x[i] : x[i];
    largest = a > largest ? a : largest;
  }
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the lowest bits.
  for (int64_t i = 0; i < n; ++i) {
    y[i] = static_cast<int8_t>(float_bits(x[i] * inverse + 12582912.0f));
  }
  return largest / 127.0f;
}
