// What the register tiles of linear layers share: a row tile times one panel of kPanel
// out_features, two vectors wide.

constexpr int kPanel = 2 * kLanes;

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

// The last panel may be wider than y: it is computed beside y, and what exists is copied.
template <int M, int Width>
static inline void linear_edge_tile(void (*linear_tile)(const LinearTile&), const LinearTile& t) {
  float y[M * Width] = {};
  float bias[Width] = {};
  const size_t bytes = static_cast<size_t>(t.n) * sizeof(float);
  LinearTile whole = t;
  whole.n = Width;
  whole.y = y;
  whole.y_stride = Width;
  if (t.bias != nullptr) {
    __builtin_memcpy(bias, t.bias, bytes);
    whole.bias = bias;
  }
  if (t.accumulate) {
    for (int i = 0; i < M; ++i) __builtin_memcpy(y + i * Width, t.y + i * t.y_stride, bytes);
  }
  linear_tile(whole);
  for (int i = 0; i < M; ++i) __builtin_memcpy(t.y + i * t.y_stride, y + i * Width, bytes);
}

// Begins a tile's sums: zero, or what y holds.
template <int M>
static inline void begin_sums(const LinearTile& t, V (*sum)[2]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    sum[m][0] = t.accumulate ? vload(t.y + m * t.y_stride) : vzero();
    sum[m][1] = t.accumulate ? vload(t.y + m * t.y_stride + kLanes) : vzero();
  }
}

// Ends them: scaled, the bias added, into y.
template <int M>
static inline void end_sums(const LinearTile& t, V (*sum)[2]) {
  const V one = vset(1.0f);
  const V s0 = t.scale != nullptr ? vload(t.scale) : one;
  const V s1 = t.scale != nullptr ? vload(t.scale + kLanes) : one;
  const V c0 = t.bias != nullptr ? vload(t.bias) : vzero();
  const V c1 = t.bias != nullptr ? vload(t.bias + kLanes) : vzero();
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    V y0 = sum[m][0];
    V y1 = sum[m][1];
    if (t.scale != nullptr) {
      y0 = vmul(y0, s0);
      y1 = vmul(y1, s1);
    }
    if (t.bias != nullptr) {
      y0 = vadd(y0, c0);
      y1 = vadd(y1, c1);
    }
    vstore(t.y + m * t.y_stride, y0);
    vstore(t.y + m * t.y_stride + kLanes, y1);
  }
}
