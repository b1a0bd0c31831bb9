// Four floats by the compiler's own vector types. No fused multiply-add: a product is rounded
// before it is added, on every machine alike.
using V = float __attribute__((vector_size(16)));
using VI = int32_t __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kRowTile = 4;

static inline V vzero() { return V{0.0f, 0.0f, 0.0f, 0.0f}; }
static inline V vset(float x) { return V{x, x, x, x}; }
static inline V vload(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
static inline void vstore(float* p, V v) { __builtin_memcpy(p, &v, sizeof(v)); }
static inline V vload_partial(const float* p, int n) {
  V v = vzero();
  for (int i = 0; i < kLanes; ++i) {
    if (i < n) v[i] = p[i];
  }
  return v;
}
static inline void vstore_partial(float* p, V v, int n) {
  for (int i = 0; i < kLanes; ++i) {
    if (i < n) p[i] = v[i];
  }
}
static inline V vset_lane(V v, int lane, float x) {
  v[lane] = x;
  return v;
}
static inline V vadd(V a, V b) { return a + b; }
static inline V vsub(V a, V b) { return a - b; }
static inline V vmul(V a, V b) { return a * b; }
static inline V vdiv(V a, V b) { return a / b; }
static inline V vfma(V a, V b, V c) { return a * b + c; }
static inline V vselect(VI mask, V a, V b) {  // mask lane set: a
  return (V)((mask & (VI)a) | (~mask & (VI)b));
}
static inline V vmax(V a, V b) { return vselect(a > b, a, b); }
static inline V vabs(V a) { return (V)((VI)a & (VI{} + 0x7fffffff)); }
static inline V vcopysign(V magnitude, V sign) {
  return (V)((VI)magnitude | ((VI)sign & (VI{} + INT32_MIN)));
}
// a < b ? x : y
static inline V vless(V a, V b, V x, V y) { return vselect(a < b, x, y); }
static inline V vround(V a) {  // |a| < 2^22
  const V magic = vset(12582912.0f);
  return (a + magic) - magic;
}
// x * 2^n for integral n in [-126, 127]
static inline V vscale2(V x, V n) { return x * (V)((__builtin_convertvector(n, VI) + 127) << 23); }
static inline float vreduce_add(V a) { return (a[0] + a[2]) + (a[1] + a[3]); }
static inline float vreduce_max(V a) {
  const float x = a[0] > a[1] ? a[0] : a[1];
  const float y = a[2] > a[3] ? a[2] : a[3];
  return x > y ? x : y;
}

static inline V vload_bf16(const uint16_t* p) {
  VI u = {p[0], p[1], p[2], p[3]};
  return (V)(u << 16);
}
static inline V vload_f16(const uint16_t* p) {
  return V{f32_from_f16(p[0]), f32_from_f16(p[1]), f32_from_f16(p[2]), f32_from_f16(p[3])};
}
static inline V vload_i8(const int8_t* p) {
  return V{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
           static_cast<float>(p[3])};
}
static inline void vload_bf16_pair(const uint16_t* p, V* even, V* odd) {
  VI u;
  __builtin_memcpy(&u, p, sizeof(u));
  *even = (V)(u << 16);
  *odd = (V)(u & (VI{} + static_cast<int32_t>(0xffff0000u)));
}
static inline void narrow_f16(const float* x, int64_t n, uint16_t* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = f16_from_f32(x[i]);
}
// Lanes of a and b by turns: the first half to *a, the second to *b.
static inline void vinterleave(V* a, V* b) {
  const V low = {(*a)[0], (*b)[0], (*a)[1], (*b)[1]};
  *b = V{(*a)[2], (*b)[2], (*a)[3], (*b)[3]};
  *a = low;
}
