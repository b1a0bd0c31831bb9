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
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }  // b if a is NaN

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

// exp(x) for x <= 0: 2^n * exp(r) with |r| <= ln(2) / 2, and for exp(r) its Taylor polynomial of
// degree 7, whose error there is below 1e-8.
inline Vec exp_of_negative(Vec x) {
  const IntVec representable = x >= -87.0f;
  x = keep_if(representable, x);
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = x * 1.44269504f + kRound;
  const Vec n = shifted - kRound;
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln(2) in two parts
  Vec p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const IntVec exponent = reinterpret_cast<IntVec>(shifted) - 0x4B400000;  // the bits of kRound
  const IntVec scaled = reinterpret_cast<IntVec>(p) + (exponent << 23);
  return reinterpret_cast<Vec>(scaled & representable);
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

template <typename Better>
inline float best_of(const Vec (&parts)[kParts], Better better) {
  float best = parts[0][0];
  for (int p = 0; p < kParts; ++p) {
    for (int i = 0; i < kWidth; ++i) {
      if (better(parts[p][i], best)) best = parts[p][i];
    }
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
  return best_of(total, [](float a, float b) { return a > b; });
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

int64_t gather_kernel(const float* values, int64_t n, float low, float high, float* out_values,
                      int32_t* out_indices) {
  int64_t count = 0;
  for_each_group(values, 0, n, [&](const float* group, int64_t offset) {
    for (uint32_t bits = group_bits(group, low, high); bits; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      if (out_values) out_values[count] = group[lane];
      if (out_indices) out_indices[count] = static_cast<int32_t>(offset + lane);
      ++count;
    }
  });
  return count;
}

void weigh_kernel(const float* values, int64_t n, float max, float scale, float* weights,
                  float* sums) {
  for (int64_t c = 0; c < num_chunks(n); ++c) {
    Vec sum[kParts];
    fill(sum, 0.0f);
    for_each_group(values, c * kChunk, chunk_end(c, n), [&](const float* group, int64_t offset) {
      Vec w[kParts];
      for (int p = 0; p < kParts; ++p) {
        w[p] = exp_of_negative((load(group + p * kWidth) - max) * scale);
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
  Split result{0.0, 0, kInfinity, -kInfinity};
  Vec least[kParts], next_less[kParts];
  fill(least, kInfinity);
  fill(next_less, -kInfinity);
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
        least[p] = min(above ? v : splat(kInfinity), least[p]);
        next_less[p] = max(v < pivot ? v : splat(-kInfinity), next_less[p]);
      }
    });
    result.mass += sum_of(mass);
    for (int i = 0; i < kWidth; ++i) result.count += count[i];
  }
  result.least = best_of(least, [](float a, float b) { return a < b; });
  result.next_less = best_of(next_less, [](float a, float b) { return a > b; });
  return result;
}

constexpr Kernels kKernels = {maxima_kernel, find_kernel, gather_kernel,
                              weigh_kernel,  sum_kernel,  split_kernel};

}  // namespace
}  // namespace fastpage::sampling
