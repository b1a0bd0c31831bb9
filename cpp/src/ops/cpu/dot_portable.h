// Integer dot products by the compiler's own vector types.
using VI = int32_t __attribute__((vector_size(16)));

constexpr int kInt8Zero = 0;
constexpr int kQuantRowTile = 4;

static inline V vfrom_int(VI a) { return __builtin_convertvector(a, V); }
static inline VI vround_int(V a) { return __builtin_convertvector(vround(a), VI); }
static inline VI vmax_int(VI a, VI b) {
  const VI mask = a > b;
  return (mask & a) | (~mask & b);
}
static inline int32_t vreduce_max_int(VI a) {
  int32_t m = a[0];
  for (int i = 1; i < kLanes; ++i) m = a[i] > m ? a[i] : m;
  return m;
}
static inline int32_t vreduce_add_int(VI a) { return (a[0] + a[1]) + (a[2] + a[3]); }
static inline void vstore_int8(int8_t* p, VI a) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(a[i]);
}

// Products of bytes in 16 bits, two of them added there: at most 2 * 128 * 127.
struct DotInt8 {
  using V16 = int16_t __attribute__((vector_size(16)));
  using Acc = VI;
  static inline Acc begin(int32_t) { return VI{}; }
  static inline Acc step(Acc acc, VI w, VI a) {
    const V16 w16 = (V16)w;
    const V16 a16 = (V16)a;
    const V16 even = ((V16)((VI)w16) << 8) >> 8;
    const V16 a_even = (a16 << 8) >> 8;
    const VI sums = (VI)(even * a_even + (w16 >> 8) * (a16 >> 8));
    return acc + ((sums << 16) >> 16) + (sums >> 16);
  }
  static inline VI end(Acc acc, int32_t init) { return acc + init; }
};
using DotInt4 = DotInt8;
