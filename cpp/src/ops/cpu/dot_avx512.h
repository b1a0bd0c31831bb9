// Integer dot products with AVX-512BW: as with AVX2, on twice the width.
#include "ops/cpu/dot_avx512_common.h"

constexpr int kInt8Zero = 0;
constexpr int kQuantRowTile = 6;

struct DotInt8 {
  using Acc = VI;
  static inline Acc begin(int32_t) { return VI{}; }
  static inline Acc step(Acc acc, VI w, VI a) {
    const __m512i magnitude = _mm512_abs_epi8((__m512i)w);
    const __m512i with_sign = _mm512_mask_sub_epi8((__m512i)a, _mm512_movepi8_mask((__m512i)w),
                                                   _mm512_setzero_si512(), (__m512i)a);
    const __m512i pairs = _mm512_maddubs_epi16(magnitude, with_sign);
    return acc + (VI)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
  }
  static inline VI end(Acc acc, int32_t init) { return acc + init; }
};

// Weights of 0 to 15: 16 products, as many as a group gives, add up to less than 2^15.
struct DotInt4 {
  using Acc = __m512i;
  static inline Acc begin(int32_t) { return _mm512_setzero_si512(); }
  static inline Acc step(Acc acc, VI w, VI a) {
    return _mm512_add_epi16(acc, _mm512_maddubs_epi16((__m512i)w, (__m512i)a));
  }
  static inline VI end(Acc acc, int32_t init) {
    return (VI)_mm512_madd_epi16(acc, _mm512_set1_epi16(1)) + init;
  }
};
