// Integer dot products with AVX-512 VNNI: vpdpbusd multiplies unsigned weights by signed
// activations and adds fours of products in 32 bits.
#include "ops/cpu/dot_avx512_common.h"

constexpr int kInt8Zero = 128;
constexpr int kQuantRowTile = 6;

struct DotInt8 {
  using Acc = VI;
  static inline Acc begin(int32_t init) { return (VI)_mm512_set1_epi32(init); }
  static inline Acc step(Acc acc, VI w, VI a) {
    return (VI)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)a);
  }
  static inline VI end(Acc acc, int32_t) { return acc; }
};
using DotInt4 = DotInt8;
