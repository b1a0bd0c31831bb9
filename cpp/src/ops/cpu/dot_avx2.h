// Integer dot products with AVX2: vpmaddubsw multiplies unsigned by signed bytes and adds pairs in
// 16 bits, which holds 2 * 128 * 127.
#include "ops/cpu/dot_avx2_common.h"

constexpr int kInt8Zero = 0;

struct DotInt8 {
  using Acc = VI;
  static inline Acc begin(int32_t) { return VI{}; }
  static inline Acc step(Acc acc, VI w, VI a) {
    const __m256i magnitude = _mm256_abs_epi8((__m256i)w);
    const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8((__m256i)a, (__m256i)w));
    return acc + (VI)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
  static inline VI end(Acc acc, int32_t init) { return acc + init; }
};

// Weights of 0 to 15: 16 products, as many as a group gives, add up to less than 2^15.
struct DotInt4 {
  using Acc = __m256i;
  static inline Acc begin(int32_t) { return _mm256_setzero_si256(); }
  static inline Acc step(Acc acc, VI w, VI a) {
    return _mm256_add_epi16(acc, _mm256_maddubs_epi16((__m256i)w, (__m256i)a));
  }
  static inline VI end(Acc acc, int32_t init) {
    return (VI)_mm256_madd_epi16(acc, _mm256_set1_epi16(1)) + init;
  }
};
