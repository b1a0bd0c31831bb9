// What instructions.cuh says in PTX, on the CPU: fragments are laid out as the PTX ISA draws them
// (9.7.14, "Matrix fragments for mma.m16n8k16" and "ldmatrix").
#pragma once

#include "cuda/emulation/runtime.h"

namespace fastpage::cuda {

inline uint16_t half_bits(float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7fff);
  if (magnitude >= 0x47800000) {  // 2^16
    return static_cast<uint16_t>(sign | 0x7c00);
  }
  // Below 2^-14 halves are multiples of 2^-24: the addition rounds to one.
  if (magnitude < 0x38800000) {
    const float shifted = std::fabs(x) + 0.5f;
    return static_cast<uint16_t>(sign | (__float_as_uint(shifted) - 0x3f000000));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

inline float half_value(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t exponent = bits >> 10 & 31;
  const uint32_t mantissa = bits & 0x3ff;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline uint16_t bfloat16_bits(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float bfloat16_value(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }

inline float to_float(Half x) { return half_value(x.bits); }
inline float to_float(BFloat16 x) { return bfloat16_value(x.bits); }

template <>
inline uint32_t pack<Half>(float low, float high) {
  return half_bits(low) | static_cast<uint32_t>(half_bits(high)) << 16;
}
template <>
inline uint32_t pack<BFloat16>(float low, float high) {
  return bfloat16_bits(low) | static_cast<uint32_t>(bfloat16_bits(high)) << 16;
}

inline uint32_t multiply_bfloat16x2(uint32_t a, uint32_t b) {
  const auto product = [&](int shift) {
    return bfloat16_value(static_cast<uint16_t>(a >> shift)) *
           bfloat16_value(static_cast<uint16_t>(b >> shift));
  };
  return pack<BFloat16>(product(0), product(16));
}

template <typename T>
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } mine{c, a, {b0, b1}};
  emulation::block->together("mma", &mine, [](Lane** lanes) {
    const auto element = [](uint32_t word, int i) {
      return to_float(T{static_cast<uint16_t>(word >> (16 * i))});
    };
    float a_matrix[16][16], b_matrix[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, first = lane % 4 * 2;
      for (int i = 0; i < 2; ++i) {
        for (int half = 0; half < 2; ++half) {
          const int k = first + 8 * half + i;
          a_matrix[group][k] = element(lanes[lane]->a[2 * half], i);
          a_matrix[group + 8][k] = element(lanes[lane]->a[2 * half + 1], i);
          b_matrix[k][group] = element(lanes[lane]->b[half], i);
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = lanes[lane]->c[i];
        for (int k = 0; k < 16; ++k) sum += a_matrix[row][k] * b_matrix[k][column];
        lanes[lane]->c[i] = sum;
      }
    }
  });
}

inline void load_matrices(uint32_t (&to)[4], const void* row, bool transposed) {
  struct Lane {
    uint32_t* to;
    const uint16_t* row;
  } mine{to, static_cast<const uint16_t*>(row)};
  emulation::block->check_shared(row, 16, 16);
  const auto load = [&](Lane** lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < 4; ++m) {
        const int first = lane % 4 * 2;
        const auto at = [&](int r, int c) -> uint32_t { return lanes[8 * m + r]->row[c]; };
        lanes[lane]->to[m] = transposed ? at(first, lane / 4) | at(first + 1, lane / 4) << 16
                                        : at(lane / 4, first) | at(lane / 4, first + 1) << 16;
      }
    }
  };
  emulation::block->together(transposed ? "ldmatrix.trans" : "ldmatrix", &mine, load);
}
inline void ldmatrix(uint32_t (&to)[4], const void* row) { load_matrices(to, row, false); }
inline void ldmatrix_transposed(uint32_t (&to)[4], const void* row) {
  load_matrices(to, row, true);
}

inline void perform(const emulation::Copy& copy) {
  char bytes[16] = {};
  std::memcpy(bytes, copy.from, copy.bytes);
  std::memcpy(copy.to, bytes, 16);
}

inline void cp_async_16(void* shared, const void* global, bool valid) {
  emulation::block->check_shared(shared, 16, 16);
  if (valid) emulation::check_global(global, 16, 16);
  const emulation::Copy copy{shared, global, valid ? 16u : 0u};
  // What has not arrived yet is not what was there before.
  std::memset(shared, emulation::kPoison, 16);
  if (emulation::settings.late_copies) {
    emulation::block->current().copies.push_back(copy);
  } else {
    perform(copy);
  }
}
inline void cp_async_commit() {
  emulation::Fiber& f = emulation::block->current();
  f.groups.emplace_back();
  f.groups.back().swap(f.copies);
}
template <int kPending>
void cp_async_wait() {
  std::vector<std::vector<emulation::Copy>>& groups = emulation::block->current().groups;
  while (groups.size() > kPending) {
    for (const emulation::Copy& copy : groups.front()) perform(copy);
    groups.erase(groups.begin());
  }
}

inline int fresh_thread() { return static_cast<int>(threadIdx.x); }

inline char* dynamic_shared() { return emulation::block->shared(); }

template <typename T>
T load_global(const T* p) {
  emulation::check_global(p, sizeof(T), sizeof(T));
  emulation::bytes_loaded += sizeof(T);
  return *p;
}
template <typename T>
T load_from_l2(const T* p) {
  return load_global(p);
}
template <typename T>
void store_global(T* p, T value) {
  emulation::check_global(p, sizeof(T), sizeof(T));
  *p = value;
}

inline float exp2_fast(float x) { return std::exp2(x); }

}  // namespace fastpage::cuda
