// The source of kernels.h, included by one .cc per instruction set. Everything is in an unnamed
// namespace and nothing of the standard library is inlined here: the linker must not pick up, for
// all callers, a copy that was compiled for a newer CPU.
#pragma once

#include "core/sampling/kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastpage::sampling {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kParts = static_cast<int>(kLanes) / kWidth;

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t IntVec __attribute__((vector_size(kWidth * 4)));

constexpr float kInfinity = __builtin_inff();

inline Vec load(const float* from) {
  Vec v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

inline void store(float* to, Vec v) { __builtin_memcpy(to, &v, sizeof(v)); }

inline Vec splat(float x) { return x - Vec{}; }

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }  // b if a is NaN

inline Vec keep_if(IntVec mask, Vec v) {
  return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(v) & mask);
}

inline uint32_t bits_of(IntVec mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(mask)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= (mask[i] & 1u) << i;
  return bits;
#endif
}

// 2^x for x <= 0, with x = n + f, |f| <= 1/2, and for 2^f the polynomial of degree 5 with the least
// greatest relative error (9e-8) of those that are 1 at 0. From x = -127 down, and for NaN, the
// exponent bits come out as 0: the result is 0.
inline Vec exp2_of_negative(Vec x) {
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = max(x, splat(-127.0f));
  const Vec shifted = x + kRound;
  const Vec f = x - (shifted - kRound);
  Vec p = f * 0.001326472731307149f + 0.009671512991189957f;
  p = p * f + 0.05550733581185341f;
  p = p * f + 0.24022242426872253f;
  p = p * f + 0.6931470036506653f;
  p = p * f + 1.0f;
  const IntVec exponent = reinterpret_cast<IntVec>(shifted) << 23;  // n: kRound's bits fall out
  return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(p) + exponent);
}

// The order is fixed, so that all widths give the same sum.
inline float sum_of(const Vec (&parts)[kParts]) {
  float lanes[kLanes];
  for (int p = 0; p < kParts; ++p) store(lanes + p * kWidth, parts[p]);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

inline float max_of(const Vec (&parts)[kParts]) {
  float best = -kInfinity;
  for (int p = 0; p < kParts; ++p) {
    for (int i = 0; i < kWidth; ++i) best = parts[p][i] > best ? parts[p][i] : best;
  }
  return best;
}

inline void fill(Vec (&parts)[kParts], float x) {
  for (int p = 0; p < kParts; ++p) parts[p] = splat(x);
}

// Calls body(values of the group, offset) for every kLanes values; the last group is filled up with
// NaN, which no kernel counts.
template <typename Body>
inline void for_each_group(const float* values, int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) body(values + i, i);
  if (i == end) return;
  float last[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) last[l] = i + l < end ? values[i + l] : __builtin_nanf("");
  body(last, i);
}

inline int64_t chunk_end(int64_t chunk, int64_t n) {
  const int64_t end = (chunk + 1) * kChunk;
  return end < n ? end : n;
}

float maxima_kernel(const float* values, int64_t n, float* maxima) {
  Vec total[kParts];
  fill(total, -kInfinity);
  for (int64_t c = 0; c < num_chunks(n); ++c) {
    Vec best[kParts];
    fill(best, -kInfinity);
    for_each_group(values, c * kChunk, chunk_end(c, n), [&](const float* group, int64_t) {
      for (int p = 0; p < kParts; ++p) best[p] = max(load(group + p * kWidth), best[p]);
    });
    for (int p = 0; p < kParts; ++p) {
      store(maxima + c * kLanes + p * kWidth, best[p]);
      total[p] = max(best[p], total[p]);
    }
  }
  return max_of(total);
}

inline uint32_t group_bits(const float* group, float low, float high) {
  uint32_t bits = 0;
  for (int p = 0; p < kParts; ++p) {
    const Vec v = load(group + p * kWidth);
    bits |= bits_of((v >= low) & (v <= high)) << (p * kWidth);
  }
  return bits;
}

int64_t find_kernel(const float* values, int64_t n, float bound) {
  for (int64_t i = 0; i < n; i += kLanes) {
    int64_t found = -1;
    for_each_group(values, i, i + kLanes < n ? i + kLanes : n, [&](const float* group, int64_t) {
      const uint32_t bits = group_bits(group, bound, kInfinity);
      if (bits) found = i + __builtin_ctz(bits);
    });
    if (found >= 0) return found;
  }
  return -1;
}

// Appends the lanes of `from` whose bit is set, and their indices counted from `base`; how many.
inline int64_t append(const float* from, uint32_t bits, int64_t base, float* values,
                      int32_t* indices) {
#if defined(__AVX512F__)
  const int count = __builtin_popcount(bits);
  const auto lanes = static_cast<__mmask16>(bits),
             front = static_cast<__mmask16>((1u << count) - 1);
  if (values) {
    _mm512_mask_storeu_ps(values, front, _mm512_maskz_compress_ps(lanes, _mm512_loadu_ps(from)));
  }
  if (indices) {
    const __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i all = _mm512_add_epi32(iota, _mm512_set1_epi32(static_cast<int>(base)));
    _mm512_mask_storeu_epi32(indices, front, _mm512_maskz_compress_epi32(lanes, all));
  }
  return count;
#else
  int64_t count = 0;
  for (; bits; bits &= bits - 1) {
    const int lane = __builtin_ctz(bits);
    if (values) values[count] = from[lane];
    if (indices) indices[count] = static_cast<int32_t>(base + lane);
    ++count;
  }
  return count;
#endif
}

int64_t gather_kernel(const float* values, int64_t n, float low, float high, float* out_values,
                      int32_t* out_indices) {
  int64_t count = 0;
  for_each_group(values, 0, n, [&](const float* group, int64_t offset) {
    const uint32_t bits = group_bits(group, low, high);
    for (int p = 0; bits && p < kParts; ++p) {
      const uint32_t part = bits >> (p * kWidth) & static_cast<uint32_t>((1ull << kWidth) - 1);
      count += append(group + p * kWidth, part, offset + p * kWidth,
                      out_values ? out_values + count : nullptr,
                      out_indices ? out_indices + count : nullptr);
    }
  });
  return count;
}

void weigh_kernel(const float* values, int64_t n, float max, float scale, float* weights,
                  float* sums) {
  const float log2_scale = scale * 1.44269504f;
  for (int64_t c = 0; c < num_chunks(n); ++c) {
    Vec sum[kParts];
    fill(sum, 0.0f);
    for_each_group(values, c * kChunk, chunk_end(c, n), [&](const float* group, int64_t offset) {
      Vec w[kParts];
      for (int p = 0; p < kParts; ++p) {
        w[p] = exp2_of_negative((load(group + p * kWidth) - max) * log2_scale);
        sum[p] += w[p];
      }
      if (!weights) return;
      const int64_t size = n - offset < kLanes ? n - offset : kLanes;
      if (size == kLanes) {
        for (int p = 0; p < kParts; ++p) store(weights + offset + p * kWidth, w[p]);
      } else {
        __builtin_memcpy(weights + offset, w, size * sizeof(float));
      }
    });
    sums[c] = sum_of(sum);
  }
}

void sum_kernel(const float* values, int64_t n, float bound, float* sums) {
  for (int64_t c = 0; c < num_chunks(n); ++c) {
    Vec sum[kParts];
    fill(sum, 0.0f);
    for_each_group(values, c * kChunk, chunk_end(c, n), [&](const float* group, int64_t) {
      for (int p = 0; p < kParts; ++p) {
        const Vec v = load(group + p * kWidth);
        sum[p] += keep_if(v >= bound, v);
      }
    });
    sums[c] = sum_of(sum);
  }
}

Split split_kernel(const float* values, int64_t n, float pivot) {
  Split result{};
  for (int64_t c = 0; c < num_chunks(n); ++c) {
    Vec mass[kParts];
    IntVec count = {};
    fill(mass, 0.0f);
    for_each_group(values, c * kChunk, chunk_end(c, n), [&](const float* group, int64_t) {
      for (int p = 0; p < kParts; ++p) {
        const Vec v = load(group + p * kWidth);
        const IntVec above = v >= pivot;
        mass[p] += keep_if(above, v);
        count -= above;
      }
    });
    result.mass += sum_of(mass);
    for (int i = 0; i < kWidth; ++i) result.count += count[i];
  }
  return result;
}

constexpr Kernels kKernels = {maxima_kernel, find_kernel, gather_kernel,
                              weigh_kernel,  sum_kernel,  split_kernel};

}  // namespace
}  // namespace fastpage::sampling
