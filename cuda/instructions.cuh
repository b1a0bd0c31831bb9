// Element types, and the few PTX instructions that kernels are written with. Under
// FASTPAGE_CUDA_EMULATION the same names run on the CPU (emulation/).
#pragma once

#ifdef FASTPAGE_CUDA_EMULATION
#include "cuda/emulation/runtime.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>

namespace fastpage::cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct Float8 {  // e4m3: no infinities, NaN is 0x7f
  uint8_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
// Two values as 16-bit ones in one register, rounded to nearest even.
template <typename T>
__device__ uint32_t pack(float low, float high);

constexpr unsigned kFullWarp = 0xffffffffu;

}  // namespace fastpage::cuda

#ifdef FASTPAGE_CUDA_EMULATION
#include "cuda/emulation/instructions.h"
#else

namespace fastpage::cuda {

__device__ __forceinline__ float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ __forceinline__ float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}

template <>
__device__ __forceinline__ uint32_t pack<Half>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

__device__ __forceinline__ uint32_t multiply_bfloat16x2(uint32_t a, uint32_t b) {
  uint32_t y;  // sm_80 has no mul.bf16x2
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(0x80008000u));
  return y;
}

// c += a b, for a warp, all lanes together: volatile, so that no compiler moves it to where some
// are not; see "Matrix fragments for mma.m16n8k16" in the PTX ISA.
template <typename T>
__device__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma_16x8x16<Half>(float (&c)[4], const uint32_t (&a)[4],
                                                  uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_16x8x16<BFloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                      uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8x8 matrices of 16-bit elements; lane 8 i + r brings the address of row r of matrix i.
__device__ __forceinline__ void ldmatrix(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// 16 bytes, not through L1; zeros, and nothing is read, if not valid.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until at most kPending of this thread's groups have not arrived. Others see them after a barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// threadIdx.x, read again: what is computed from it is not kept in registers from one use to the
// next.
__device__ __forceinline__ int fresh_thread() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

template <typename T>
__device__ __forceinline__ T load_global(const T* p) {
  return *p;
}
// Not from L1, which knows nothing of what other multiprocessors have written.
template <typename T>
__device__ __forceinline__ T load_from_l2(const T* p) {
  return __ldcg(p);
}
template <typename T>
__device__ __forceinline__ void store_global(T* p, T value) {
  *p = value;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fastpage::cuda

#endif  // FASTPAGE_CUDA_EMULATION

namespace fastpage::cuda {

// One value of T, rounded to nearest even.
template <typename T>
__device__ __forceinline__ T from_float(float x) {
  return T{static_cast<uint16_t>(pack<T>(x, 0.0f))};
}
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}

// e4m3, rounded to nearest even, saturating at 448.
template <>
__device__ __forceinline__ Float8 from_float<Float8>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t y;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(y) : "f"(0.0f), "f"(x));
  return {static_cast<uint8_t>(y)};
#else
  const uint32_t sign = __float_as_uint(x) >> 24 & 0x80;
  uint32_t bits = __float_as_uint(x) & 0x7fffffffu;
  if (bits > 0x7f800000u) return {static_cast<uint8_t>(sign | 0x7f)};
  if (bits >= 0x43e00000u) return {static_cast<uint8_t>(sign | 0x7e)};  // 448
  if (bits < 0x3c800000u) {  // 2^-6: multiples of 2^-9, to which the addition rounds
    const float shifted = __fadd_rn(__uint_as_float(bits), 16384.0f);
    return {static_cast<uint8_t>(sign | (__float_as_uint(shifted) - 0x46800000u))};
  }
  bits += 0x7ffffu + (bits >> 20 & 1);
  return {static_cast<uint8_t>(sign | ((bits - 0x3c000000u) >> 20))};
#endif
}

__device__ __forceinline__ float to_float(Float8 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits & 0x7f) << 20;  // exponent off by 120
  const float magnitude = __uint_as_float(bits) * 0x1p120f;
  return x.bits & 0x80 ? -magnitude : magnitude;
}

}  // namespace fastpage::cuda
