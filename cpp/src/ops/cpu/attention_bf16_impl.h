// Attention over a bf16 cache by vdpbf16ps (bf16_impl.h): queries and probabilities are rounded to
// bf16, and each sum takes its products two by two, in order: a score those of two neighbours along
// head_dim, as keys lie, a value those of two neighbouring positions, of which the first is even.
// So a row's result depends on no other row, and the cache is read as it is for any number of them.

struct CacheBf16Pairs : CacheBf16 {
  static constexpr bool kRoundsProbabilities = true;

  // [begin, end) of a row, multiples of kPanel, to bf16 in place: pair i of positions is word i.
  static inline void round_probabilities(float* p, int begin, int end) {
    for (int n = begin; n < end; n += kPanel) {
      const __m512bh both = _mm512_cvtne2ps_pbh(vload(p + n + kLanes), vload(p + n));
      __builtin_memcpy(p + n / 2, &both, sizeof(both));
    }
  }
};
static_assert(kLanes == kGranule && kPanel == 2 * kLanes, "");

static inline __m512bh broadcast_pair(const float* pair) {
  int32_t bits;
  __builtin_memcpy(&bits, pair, sizeof(bits));
  return (__m512bh)_mm512_set1_epi32(bits);
}

// Keeps the compiler from loading it once more for each row.
static inline __m512bh in_register(__m512i pairs) {
  __asm__("" : "+v"(pairs));
  return (__m512bh)pairs;
}

template <int M, int C>
static inline void add_pairs(const float* x, int stride, const __m512bh* y, V (*sum)[C]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    const __m512bh pair = broadcast_pair(x + m * stride);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[m][c] = _mm512_dpbf16_ps(sum[m][c], pair, y[c]);
  }
}

// score_columns() with the queries of pair_queries().
template <int M, int C>
void score_pairs(const float* q, int head_dim, const void* const* k, const char* const* prefetch,
                 float* scores) {
  constexpr int64_t kRowBytes = 2 * kGranule * sizeof(uint16_t);
  V sum[M][C];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[m][c] = vzero();
  }
  const char* column[C];
  const char* ahead[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    column[c] = static_cast<const char*>(k[c]);
    ahead[c] = prefetch[c];
  }
  __m512bh keys[C];
  const int64_t end = head_dim / 2 * kRowBytes;
  for (int64_t at = 0; at < end; at += kRowBytes) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      keys[c] = in_register(_mm512_loadu_si512(column[c] + at));
    }
    add_pairs<M, C>(q, 1, keys, sum);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) __builtin_prefetch(ahead[c] + at);
    q += M;
  }
  if (head_dim % 2 != 0) {  // the last row lies alone
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const __m256i row = _mm256_loadu_si256((const __m256i*)(column[c] + end));
      keys[c] = (__m512bh)_mm512_cvtepu16_epi32(row);
    }
    add_pairs<M, C>(q, 1, keys, sum);
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) vstore(scores + m * kKvTile + c * kLanes, sum[m][c]);
  }
}

// Sums of the low and of the high halves of interleaved rows: in order again.
static inline void order_halves(V* low, V* high) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  const V lanes = _mm512_permutex2var_ps(*low, first, *high);
  *high = _mm512_permutex2var_ps(*low, second, *high);
  *low = lanes;
}

// The first n of kPanel values, the others zero. A masked load that misses the caches holds up more
// than itself, and most vectors are whole.
static inline __m512i load_values(const uint16_t* p, int n) {
  if (__builtin_expect(n >= kPanel, 1)) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi16((1u << n) - 1, p);
}

// value_columns() with the probabilities of round_probabilities(). Of a pair only one of whose
// positions is in the range, the other's values count as zero: they may be anything.
template <int M, int C>
void value_pairs(const float* probabilities, const ValueRange& r, const float* old_weight,
                 const float* new_weight, float* out, int64_t out_stride) {
  constexpr int kVectors = C / 2;  // of bf16
  V sum[M][C];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[m][c] = vzero();
  }
  int columns[kVectors];
#pragma GCC unroll 2
  for (int c = 0; c < kVectors; ++c) columns[c] = r.stride - r.head_dim_column - c * kPanel;
  int n = r.begin / 2 * 2;
  while (n < r.end) {
    const int granule = n / kGranule;
    const int granule_end = (granule + 1) * kGranule;
    const int end = r.end < granule_end ? r.end : granule_end;
    const int64_t offset = static_cast<int64_t>(n % kGranule) * r.stride + r.head_dim_column;
    const uint16_t* v = static_cast<const uint16_t*>(r.v[granule]) + offset;
    const uint16_t* prefetch = static_cast<const uint16_t*>(r.prefetch[granule]);
    prefetch = prefetch == nullptr ? v : prefetch + offset;
    const bool is_whole = n >= r.begin && end % 2 == 0 && columns[kVectors - 1] >= kPanel;
    for (; n < end; n += 2) {
      __m512bh pairs[C];
#pragma GCC unroll 2
      for (int c = 0; c < kVectors; ++c) {
        const uint16_t* p = v + c * kPanel;
        __m512i even, odd;
        if (__builtin_expect(is_whole, 1)) {
          even = _mm512_loadu_si512(p);
          odd = _mm512_loadu_si512(p + r.stride);
        } else {
          even = load_values(p, n >= r.begin ? columns[c] : 0);
          odd = load_values(p + r.stride, n + 1 < r.end ? columns[c] : 0);
        }
        pairs[2 * c] = (__m512bh)_mm512_unpacklo_epi16(even, odd);
        pairs[2 * c + 1] = (__m512bh)_mm512_unpackhi_epi16(even, odd);
      }
      add_pairs<M, C>(probabilities + n / 2, kKvTile, pairs, sum);
#pragma GCC unroll 2
      for (int c = 0; c < kVectors; ++c) {
        __builtin_prefetch(prefetch + c * kPanel);
        __builtin_prefetch(prefetch + r.stride + c * kPanel);
      }
      v += 2 * r.stride;
      prefetch += 2 * r.stride;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    const V before = vset(old_weight[m]);
    const V now = vset(new_weight[m]);
    float* o = out + m * out_stride;
#pragma GCC unroll 2
    for (int c = 0; c < C; c += 2) {
      order_halves(&sum[m][c], &sum[m][c + 1]);
#pragma GCC unroll 2
      for (int i = c; i < c + 2; ++i) {
        vstore(o + i * kLanes, vfma(sum[m][i], now, vmul(vload(o + i * kLanes), before)));
      }
    }
  }
}

template <int M>
constexpr RowTileKernels kRowTileKernels<M, CacheBf16Pairs> = {
    wide_columns(M), score_pairs<M, wide_columns(M)>, score_pairs<M, 2>,
    value_pairs<M, wide_columns(M)>, value_pairs<M, 2>};

void pair_queries(float* q, int m, int head_dim) {
  for (int d = 0; d < head_dim; d += 2) {
    const V even = vload_partial(q + d * m, m);
    const V odd = d + 1 < head_dim ? vload_partial(q + (d + 1) * m, m) : vzero();
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
    const __m512i pairs = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    vstore_partial(q + d / 2 * m, _mm512_castsi512_ps(pairs), m);
  }
}
static_assert(kRowTile <= kLanes, "pair_queries takes a row tile in one vector");

// Each granule has the one so much later fetched: keys, values, then the next tile's keys. Farther
// ahead nothing is gained: the core has as many lines under way as it can.
constexpr int kGranulesAhead = 4;

void bf16_attention_tile(const AttentionTile& t) {
  const Granules last = granules_in_place(t, kGranulesAhead);
  const int tiles = (t.rows + kRowTile - 1) / kRowTile;
  if (tiles == 1) return attend_row_tile<CacheBf16Pairs, false>(t, last, 0, t.rows, t.scratch);
  // The next tile's keys must not push out what later row tiles of this one read.
  const void* values_only[kTileGranules] = {};
  for (int i = 0; i + kGranulesAhead < kTileGranules; ++i) values_only[i] = last.with_v[i];
  const Granules others = {last.k, last.v, last.with_k, values_only, last.v_stride};
  for (int i = 0; i < tiles; ++i) {
    const int row = static_cast<int>(static_cast<int64_t>(t.rows) * i / tiles);
    const int next = static_cast<int>(static_cast<int64_t>(t.rows) * (i + 1) / tiles);
    attend_row_tile<CacheBf16Pairs, false>(t, i + 1 == tiles ? last : others, row, next - row,
                                           t.scratch);
  }
}
