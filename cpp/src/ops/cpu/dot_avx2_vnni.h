// Integer dot products with AVX-VNNI: vpdpbusd on ymm registers, as with AVX-512 VNNI.
#include "ops/cpu/dot_avx2_common.h"

constexpr int kInt8Zero = 128;

struct DotInt8 {
  using Acc = VI;
  static inline Acc begin(int32_t init) { return (VI)_mm256_set1_epi32(init); }
  static inline Acc step(Acc acc, VI w, VI a) {
    return (VI)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, (__m256i)a);
  }
  static inline VI end(Acc acc, int32_t) { return acc; }
};
using DotInt4 = DotInt8;
