// What the kernels with and without AVX-VNNI share.
using VI = int32_t __attribute__((vector_size(32)));

constexpr int kQuantRowTile = 4;

static inline V vfrom_int(VI a) { return _mm256_cvtepi32_ps((__m256i)a); }
static inline VI vround_int(V a) { return (VI)_mm256_cvtps_epi32(a); }
static inline VI vmax_int(VI a, VI b) { return (VI)_mm256_max_epi32((__m256i)a, (__m256i)b); }
static inline int32_t vreduce_max_int(VI a) {
  __m128i x =
      _mm_max_epi32(_mm256_castsi256_si128((__m256i)a), _mm256_extracti128_si256((__m256i)a, 1));
  x = _mm_max_epi32(x, _mm_unpackhi_epi64(x, x));
  return _mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32(x, 1)));
}
static inline int32_t vreduce_add_int(VI a) {
  __m128i x =
      _mm_add_epi32(_mm256_castsi256_si128((__m256i)a), _mm256_extracti128_si256((__m256i)a, 1));
  x = _mm_add_epi32(x, _mm_unpackhi_epi64(x, x));
  return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 1)));
}
static inline void vstore_int8(int8_t* p, VI a) {
  const __m256i words = _mm256_packs_epi32((__m256i)a, (__m256i)a);
  const __m256i bytes = _mm256_packs_epi16(words, words);
  const int32_t low = _mm256_extract_epi32(bytes, 0);
  const int32_t high = _mm256_extract_epi32(bytes, 4);
  __builtin_memcpy(p, &low, 4);
  __builtin_memcpy(p + 4, &high, 4);
}
