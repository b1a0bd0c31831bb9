// Linear layers over quantized weights (quant_format.h): the register tile of integer dot products
// with activations quantized to int8, the register tile of widened weights with fp32 activations,
// and the quantizers. Integer sums are exact; the fp32 sums run over the groups in order.

// ---- activations

// One group: quants, and its scale; zeros for what is not there (n < kGroup). A group that holds
// NaN or infinity gets a scale that makes every result of the row so.
static inline float quantize_group(const float* x, int64_t n, int8_t* q, int32_t* sum) {
  float padded[kGroup] = {};
  if (n < kGroup) {
    __builtin_memcpy(padded, x, static_cast<size_t>(n) * sizeof(float));
    x = padded;
  }
  VI highest = VI{};  // of bit patterns: NaN is above infinity, above all numbers
  for (int i = 0; i < kGroup; i += kLanes) highest = vmax_int((VI)vabs(vload(x + i)), highest);
  const float max = bits_float(static_cast<uint32_t>(vreduce_max_int(highest)));
  // Below this the quotient would overflow.
  const V inverse = vset(max > 1e-30f ? 127.0f / max : 0.0f);
  VI total = VI{};
  for (int i = 0; i < kGroup; i += kLanes) {
    const VI rounded = vround_int(vmul(vload(x + i), inverse));
    vstore_int8(q + i, rounded);
    total += rounded;
  }
  *sum = vreduce_add_int(total);
  return max * (1.0f / 127.0f);
}

void quantize_rows(const float* const* rows, int m, int64_t k, int zero, void* out) {
  auto* words = static_cast<int32_t*>(out);
  for (int64_t k0 = 0; k0 < k; k0 += kGroup) {
    float* const scales = reinterpret_cast<float*>(words + 8 * m);
    int32_t* const begins = words + 10 * m;
    for (int r = 0; r < m; ++r) {
      int32_t sum;
      const float scale = quantize_group(rows[r] + k0, k - k0 < kGroup ? k - k0 : kGroup,
                                         reinterpret_cast<int8_t*>(words + 8 * r), &sum);
      scales[r] = scale;
      scales[m + r] = scale * static_cast<float>(sum);
      begins[r] = -zero * sum;
    }
    words += kActivationGroupBytes / 4 * m;
  }
}

// ---- tiles

static inline VI vload_words(const char* p) {
  VI v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <QuantFormat F>
struct Quantized {
  using Dot = DotInt8;
};
template <>
struct Quantized<kQ4_0> {
  using Dot = DotInt4;
};
template <>
struct Quantized<kQ4_1> {
  using Dot = DotInt4;
};

// Integer sums of one group, for each row and both halves of the panel.
template <int M, QuantFormat F>
static inline void dot_group(const char* words, const int32_t* a, VI (*sums)[2]) {
  using Dot = typename Quantized<F>::Dot;
  const int32_t* begins = a + 10 * M;
  typename Dot::Acc acc[M][2];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = Dot::begin(begins[m]);
  const auto step = [&](VI b0, VI b1, const int32_t* x) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      acc[m][0] = Dot::step(acc[m][0], b0, VI{} + x[8 * m]);
      acc[m][1] = Dot::step(acc[m][1], b1, VI{} + x[8 * m]);
    }
  };
  constexpr int kWords = words_per_group(F);
#pragma GCC unroll 8
  for (int i = 0; i < kWords; ++i) {
    const VI b0 = vload_words(words + i * kPanel * 4);
    const VI b1 = vload_words(words + i * kPanel * 4 + sizeof(VI));
    if (has_4_bits(F)) {
      step(b0 & 0x0f0f0f0f, b1 & 0x0f0f0f0f, a + i);
      step((b0 >> 4) & 0x0f0f0f0f, (b1 >> 4) & 0x0f0f0f0f, a + i + 4);
    } else {
      step(b0, b1, a + i);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    sums[m][0] = Dot::end(acc[m][0], begins[m]);
    sums[m][1] = Dot::end(acc[m][1], begins[m]);
  }
}

template <int M, QuantFormat F>
void quant_tile(const LinearTile& t) {
  if (t.n < kPanel) return linear_edge_tile<M, kPanel>(quant_tile<M, F>, t);
  V sum[M][2];
  begin_sums<M>(t, sum);
  const auto* a = static_cast<const int32_t*>(t.a);
  const char* b = static_cast<const char*>(t.panel);
  const char* prefetch = t.prefetch;
  for (int64_t g = t.k; g > 0; --g) {
    for (int64_t i = 0; i < t.prefetch_step; i += 64) __builtin_prefetch(prefetch + i);
    VI dot[M][2];
    dot_group<M, F>(b + group_header_bytes(F, kPanel), a, dot);
    const auto* scales = reinterpret_cast<const float*>(a + 8 * M);
    const auto* header = reinterpret_cast<const uint16_t*>(b);
    const V d0 = has_group_scales(F) ? vload_f16(header) : vzero();
    const V d1 = has_group_scales(F) ? vload_f16(header + kLanes) : vzero();
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      V y0 = vfrom_int(dot[m][0]);
      V y1 = vfrom_int(dot[m][1]);
      if (has_group_scales(F)) {
        y0 = vmul(y0, d0);
        y1 = vmul(y1, d1);
      }
      const V scale = vset(scales[m]);
      sum[m][0] = vfma(y0, scale, sum[m][0]);
      sum[m][1] = vfma(y1, scale, sum[m][1]);
    }
    if (has_minimums(F)) {
      const V min0 = vload_f16(header + kPanel);
      const V min1 = vload_f16(header + kPanel + kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const V scaled_sum = vset(scales[M + m]);
        sum[m][0] = vfma(min0, scaled_sum, sum[m][0]);
        sum[m][1] = vfma(min1, scaled_sum, sum[m][1]);
      }
    }
    a += kActivationGroupBytes / 4 * M;
    b += group_bytes(F, kPanel);
    prefetch += t.prefetch_step;
  }
  end_sums<M>(t, sum);
}

// Byte `byte` of each word of int8 weights (or of 4-bit weights already spread to bytes), widened.
template <QuantFormat F>
static inline V widen_byte(VI words, int byte, V d, V min) {
  const V q = vfrom_int((words << (24 - 8 * byte)) >> 24);
  if (F == kQ4_0) return vmul(vsub(q, vset(8.0f)), d);
  if (F == kQ4_1) return vadd(vmul(q, d), min);
  return has_group_scales(F) ? vmul(q, d) : q;
}

template <int M, QuantFormat F>
static inline void widened_words(VI b0, VI b1, const V* d, const V* min, const float* a,
                                 V (*sum)[2]) {
#pragma GCC unroll 4
  for (int byte = 0; byte < 4; ++byte) {
    const V w0 = widen_byte<F>(b0, byte, d[0], min[0]);
    const V w1 = widen_byte<F>(b1, byte, d[1], min[1]);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const V x = vset(a[byte * M + m]);
      sum[m][0] = vfma(x, w0, sum[m][0]);
      sum[m][1] = vfma(x, w1, sum[m][1]);
    }
  }
}

// The same with fp32 activations, [in_features][m]: only the weights are rounded.
template <int M, QuantFormat F>
void widened_tile(const LinearTile& t) {
  if (t.n < kPanel) return linear_edge_tile<M, kPanel>(widened_tile<M, F>, t);
  constexpr uint32_t kFlip = has_4_bits(F) ? 0 : static_cast<uint32_t>(kInt8Zero) * 0x01010101u;
  V sum[M][2];
  begin_sums<M>(t, sum);
  const auto* a = static_cast<const float*>(t.a);
  const char* b = static_cast<const char*>(t.panel);
  const char* prefetch = t.prefetch;
  for (int64_t g = t.k; g > 0; --g) {
    for (int64_t i = 0; i < t.prefetch_step; i += 64) __builtin_prefetch(prefetch + i);
    const auto* header = reinterpret_cast<const uint16_t*>(b);
    V d[2] = {vzero(), vzero()};
    V min[2] = {vzero(), vzero()};
    for (int h = 0; h < 2; ++h) {
      if (has_group_scales(F)) d[h] = vload_f16(header + h * kLanes);
      if (has_minimums(F)) min[h] = vload_f16(header + kPanel + h * kLanes);
    }
    const char* words = b + group_header_bytes(F, kPanel);
    for (int i = 0; i < 8; ++i) {
      const int64_t at = static_cast<int64_t>(i % words_per_group(F)) * kPanel * 4;
      VI b0 = vload_words(words + at) ^ static_cast<int32_t>(kFlip);
      VI b1 = vload_words(words + at + sizeof(VI)) ^ static_cast<int32_t>(kFlip);
      if (has_4_bits(F)) {
        b0 = (i < 4 ? b0 : b0 >> 4) & 0x0f0f0f0f;
        b1 = (i < 4 ? b1 : b1 >> 4) & 0x0f0f0f0f;
      }
      widened_words<M, F>(b0, b1, d, min, a + 4 * i * M, sum);
    }
    a += kGroup * M;
    b += group_bytes(F, kPanel);
    prefetch += t.prefetch_step;
  }
  end_sums<M>(t, sum);
}

// ---- weights

// The largest magnitude; the bits of NaN or infinity if there is such a value.
static inline float max_magnitude(const float* x, int64_t n) {
  VI highest = VI{};
  for (int64_t i = 0; i < n; i += kLanes) {
    highest = vmax_int((VI)vabs(load_first(x + i, n - i)), highest);
  }
  return bits_float(static_cast<uint32_t>(vreduce_max_int(highest)));
}

// q = round(x / scale), scale = largest magnitude / 127. Returns the scale.
float quantize_int8(const float* x, int64_t n, int8_t* q) {
  const float max = max_magnitude(x, n);
  const V inverse = vset(max > 1e-30f ? 127.0f / max : 0.0f);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    vstore_int8(q + i, vround_int(vmul(vload(x + i), inverse)));
  }
  if (i < n) {
    int8_t last[kLanes];
    vstore_int8(last, vround_int(vmul(load_first(x + i, n - i), inverse)));
    __builtin_memcpy(q + i, last, static_cast<size_t>(n - i));
  }
  return max * (1.0f / 127.0f);
}

static inline V vclamp(V x, float low, float high) {
  const V above = vmax(x, vset(low));
  return vless(above, vset(high), above, vset(high));
}

// Sums over one group of the quants that (x - min) * inverse rounds to.
struct QuantSums {
  float q, q2, qx;
};
static inline QuantSums quant_sums(const float* x, float min, float inverse) {
  V q = vzero(), q2 = vzero(), qx = vzero();
  for (int i = 0; i < kGroup; i += kLanes) {
    const V v = vload(x + i);
    const V n = vclamp(vround(vmul(vsub(v, vset(min)), vset(inverse))), 0.0f, 15.0f);
    q = vadd(q, n);
    q2 = vfma(n, n, q2);
    qx = vfma(n, v, qx);
  }
  return {vreduce_add(q), vreduce_add(q2), vreduce_add(qx)};
}

struct Line {
  float scale, min;
};
// The scale and minimum for one group of x, of which the least squares fit is best: x is cut into
// 15 steps between its extremes, and into somewhat fewer and more, and each time the line is fitted
// to the quants that come out.
static inline Line fit_group(const float* x) {
  V low = vload(x), high = low, total = vzero();
  for (int i = 0; i < kGroup; i += kLanes) {
    const V v = vload(x + i);
    high = vmax(v, high);
    low = vless(v, low, v, low);
    total = vadd(total, v);
  }
  const float max = vreduce_max(high);
  const float min = -vreduce_max(vsub(vzero(), low));
  const float sum = vreduce_add(total);
  const float range = max - min;
  if (range < 1e-30f) return {0.0f, min};
  Line best = {range / 15.0f, min};
  float best_gain = -__builtin_inff();  // of squared error, against a line of zeros
  for (int step = 0; step < 9; ++step) {
    const float inverse = (14.2f + 0.2f * static_cast<float>(step)) / range;
    const QuantSums s = quant_sums(x, min, inverse);
    const float determinant = kGroup * s.q2 - s.q * s.q;
    if (determinant <= 0.0f) continue;
    const float scale = (kGroup * s.qx - s.q * sum) / determinant;
    const float offset = (s.q2 * sum - s.q * s.qx) / determinant;
    const float gain = scale * s.qx + offset * sum;
    if (scale > 0.0f && gain > best_gain) {
      best_gain = gain;
      best = {scale, offset};
    }
  }
  return best;
}

static inline uint16_t nearest_f16(float x) {
  const float limit = 65504.0f;
  const float clamped = x > limit ? limit : x < -limit ? -limit : x;
  uint16_t h;
  convert_from_f32(kF16, &clamped, 1, &h);
  return h;
}
static inline float from_f16(uint16_t h) {
  float x;
  convert_to_f32(kF16, &h, 1, &x);
  return x;
}

float quantize_q4_1(const float* x, int64_t n, void* blocks) {
  const float max = max_magnitude(x, n);
  auto* block = static_cast<uint8_t*>(blocks);
  for (int64_t k = 0; k < n; k += kGroup, block += block_bytes(kQ4_1)) {
    float group[kGroup];
    for (int64_t i = 0; i < kGroup; ++i) group[i] = x[k + i < n ? k + i : k];
    const Line line = fit_group(group);
    const uint16_t header[2] = {nearest_f16(line.scale), nearest_f16(line.min)};
    __builtin_memcpy(block, header, 4);
    const float scale = from_f16(header[0]);
    const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    int8_t q[kGroup];
    for (int i = 0; i < kGroup; i += kLanes) {
      const V steps = vmul(vsub(vload(group + i), vset(from_f16(header[1]))), vset(inverse));
      vstore_int8(q + i, vround_int(vclamp(steps, 0.0f, 15.0f)));
    }
    for (int i = 0; i < kGroup / 2; ++i) {
      block[4 + i] = static_cast<uint8_t>(q[i] | (q[i + kGroup / 2] << 4));
    }
  }
  return max;
}

#define FASTPAGE_QUANT_TILES_4(name, F) name<1, F>, name<2, F>, name<3, F>, name<4, F>
#define FASTPAGE_QUANT_TILES_6(name, F) FASTPAGE_QUANT_TILES_4(name, F), name<5, F>, name<6, F>
// One instantiation per number of rows, 1 to kQuantRowTile.
#define FASTPAGE_QUANT_TILES(name, F) \
  {FASTPAGE_CONCAT(FASTPAGE_QUANT_TILES_, FASTPAGE_QUANT_ROW_TILE)(name, F)}

constexpr QuantKernels make_quant_kernels() {
  static_assert(kQuantRowTile == FASTPAGE_QUANT_ROW_TILE && kQuantRowTile <= kRowTile, "");
  static_assert(kGroup % kLanes == 0, "");
  QuantKernels kernels = {
      {kQuantRowTile, kQuantRowTile, kQuantRowTile, kQuantRowTile},
      kQuantRowTile,
      kInt8Zero,
      quantize_rows,
      quantize_int8,
      quantize_q4_1,
      {FASTPAGE_QUANT_TILES(quant_tile, kInt8), FASTPAGE_QUANT_TILES(quant_tile, kQ8_0),
       FASTPAGE_QUANT_TILES(quant_tile, kQ4_0), FASTPAGE_QUANT_TILES(quant_tile, kQ4_1)},
      {FASTPAGE_QUANT_TILES(widened_tile, kInt8), FASTPAGE_QUANT_TILES(widened_tile, kQ8_0),
       FASTPAGE_QUANT_TILES(widened_tile, kQ4_0), FASTPAGE_QUANT_TILES(widened_tile, kQ4_1)},
  };
  return kernels;
}
