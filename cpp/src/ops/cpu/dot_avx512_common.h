// What the kernels with and without VNNI share.
using VI = int32_t __attribute__((vector_size(64)));

static inline V vfrom_int(VI a) { return _mm512_cvtepi32_ps((__m512i)a); }
static inline VI vround_int(V a) { return (VI)_mm512_cvtps_epi32(a); }
static inline VI vmax_int(VI a, VI b) { return (VI)_mm512_max_epi32((__m512i)a, (__m512i)b); }
static inline int32_t vreduce_max_int(VI a) { return _mm512_reduce_max_epi32((__m512i)a); }
static inline int32_t vreduce_add_int(VI a) { return _mm512_reduce_add_epi32((__m512i)a); }
static inline void vstore_int8(int8_t* p, VI a) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8((__m512i)a));
}
