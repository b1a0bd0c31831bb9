// Linear layers over bf16 weights and bf16 activations, by vdpbf16ps: to each fp32 sum it adds the
// product of the odd in_feature of a pair, then that of the even one, each by a fused multiply-add
// that rounds to nearest even and takes and gives zero for denormals (Intel SDM).

// [k / kGroup][m][kGroup] bf16, rounded to nearest even, filled up with zeros.
void round_rows(const float* const* rows, int m, int64_t k, void* out) {
  auto* group = static_cast<char*>(out);
  for (int64_t k0 = 0; k0 < k; k0 += kGroup) {
    const int left = k - k0 < kGroup ? static_cast<int>(k - k0) : kGroup;
    for (int r = 0; r < m; ++r, group += kBf16GroupBytes) {
      const V low = vload_partial(rows[r] + k0, left);
      const V high = vload_partial(rows[r] + k0 + kLanes, left - kLanes);
      const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
      __builtin_memcpy(group, &both, sizeof(both));
    }
  }
}

static inline __m512bh load_pairs(const char* p) {
  __m512bh v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <int M, typename>
void bf16_tile(const LinearTile& t) {
  if (t.n < kPanel) return linear_edge_tile<M, kPanel>(bf16_tile<M, void>, t);
  constexpr int64_t kRowBytes = 4 * kPanel;  // of a pair of in_features
  V acc[M][2];
  begin_sums<M>(t, acc);
  const auto* a = static_cast<const int32_t*>(t.a);
  const auto* b = static_cast<const char*>(t.panel);
  const char* prefetch = t.prefetch;
  const int64_t prefetch_step = (t.prefetch_step + kGroup - 1) / kGroup;
  for (int64_t g = t.k; g > 0; --g) {
#pragma GCC unroll 4
    for (int i = 0; i < kGroup / 2; ++i) {
      const __m512bh b0 = load_pairs(b);
      const __m512bh b1 = load_pairs(b + kRowBytes / 2);
      __builtin_prefetch(prefetch);
      __builtin_prefetch(prefetch + prefetch_step);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const auto x = (__m512bh)_mm512_set1_epi32(a[m * (kGroup / 2) + i]);
        acc[m][0] = _mm512_dpbf16_ps(acc[m][0], x, b0);
        acc[m][1] = _mm512_dpbf16_ps(acc[m][1], x, b1);
      }
      b += kRowBytes;
      prefetch += 2 * prefetch_step;
    }
    a += M * (kGroup / 2);
  }
  end_sums<M>(t, acc);
}
