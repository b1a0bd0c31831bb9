// Launching kernels and choosing instantiations.
#pragma once

#include <string>

#include "cuda/instructions.cuh"
#include "cuda/ops.h"

namespace fastpage::cuda {

inline void check(bool ok, const char* name, const std::string& what) {
  if (!ok) throw InvalidArgument(std::string(name) + " " + what);
}

inline void check_shared_bytes(const char* name, size_t bytes, int most) {
  check(bytes <= static_cast<size_t>(most), name,
        "needs " + std::to_string(bytes) +
            " bytes of shared memory a block for this: the device has " + std::to_string(most));
}

#ifdef FASTPAGE_CUDA_EMULATION

inline int max_shared_bytes() { return emulation::max_shared; }

template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, int threads,
            size_t shared_bytes, Stream, const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  check_shared_bytes(name, shared_bytes, max_shared_bytes());
  emulation::launch(kernel, grid, dim3(threads), shared_bytes, args...);
}

#else

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is told here, not by whoever asks next
  throw Error(std::string(what) + ": " + cudaGetErrorString(error) + " (" +
              cudaGetErrorName(error) + ")");
}

// What a block of the current device may have, of shared memory.
inline int max_shared_bytes() {
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "cudaDeviceGetAttribute");
  return bytes;
}

template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, int threads,
            size_t shared_bytes, Stream stream, const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > (48 << 10)) {
    // The most there is, whatever this launch needs: another thread may be about to launch the same
    // kernel with more. Kernels that get here have no shared memory but this (test_cuda_sass.py).
    const int most = max_shared_bytes();
    check_shared_bytes(name, shared_bytes, most);
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, most),
               name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  check_cuda(cudaLaunchKernelEx(&config, kernel, Params(args)...), name);
}

#endif

template <typename T>
struct Type {
  using type = T;
};

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// fn(Type<T>{}) for the T that `dtype` is.
template <typename Fn>
void with_half_type(DType dtype, const char* name, Fn fn) {
  if (dtype == DType::kBFloat16) return fn(Type<BFloat16>{});
  if (dtype == DType::kFloat16) return fn(Type<Half>{});
  check(false, name, std::string("is ") + dtype_name(dtype) + ": bfloat16 or float16 is needed");
}

template <typename Fn>
void with_float_type(DType dtype, const char* name, Fn fn) {
  if (dtype == DType::kBFloat16) return fn(Type<BFloat16>{});
  if (dtype == DType::kFloat16) return fn(Type<Half>{});
  if (dtype == DType::kFloat32) return fn(Type<float>{});
  check(false, name,
        std::string("is ") + dtype_name(dtype) + ": float32, bfloat16 or float16 is needed");
}

inline void check_rows(const Rows& x, int64_t rows, int64_t cols) {
  check(x.rows == rows && x.cols == cols, x.name,
        "is " + std::to_string(x.rows) + " x " + std::to_string(x.cols) + ", not " +
            std::to_string(rows) + " x " + std::to_string(cols));
}

// Rows of logits. The limit is what the sampler can sum up in 64 bits, and in shared memory.
inline void check_vocabulary(const Rows& logits) {
  check(logits.dtype == DType::kFloat32, logits.name, "must be float32");
  check(logits.cols > 0 && logits.cols <= (1 << 22), logits.name,
        "must have between 1 and 4194304 columns");
}

// Every row on 16 bytes, and whole vectors of them.
inline bool is_vectorized(const Rows& x) {
  const int64_t size = static_cast<int64_t>(dtype_size(x.dtype));
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride * size % 16 == 0 &&
         x.cols * size % 16 == 0;
}

inline void check_vectorized(const Rows& x) {
  check(is_vectorized(x), x.name, "must have rows that begin and end on 16 bytes");
}

inline void check_cache(const KvCache& cache) {
  check(
      cache.block_size > 0 && cache.block_size % 16 == 0, "cache",
      "has blocks of " + std::to_string(cache.block_size) + " tokens: a multiple of 16 is needed");
  const bool is_float8 = cache.dtype == DType::kUInt8;
  check(is_float8 || cache.dtype == DType::kBFloat16 || cache.dtype == DType::kFloat16 ||
            cache.dtype == DType::kFloat32,
        "cache",
        std::string("is ") + dtype_name(cache.dtype) +
            ": float32, bfloat16, float16 or uint8 (float8 bits) is needed");
  check(is_float8 || (cache.k_scale == nullptr && cache.v_scale == nullptr), "k_scale",
        "is for float8 caches only");
  const auto size = static_cast<int64_t>(dtype_size(cache.dtype));
  for (const int64_t stride : {cache.block_stride, cache.token_stride, cache.head_stride,
                               static_cast<int64_t>(cache.head_dim)}) {
    check(stride * size % 16 == 0, "cache", "must have heads that begin and end on 16 bytes");
  }
  check(reinterpret_cast<uintptr_t>(cache.k) % 16 == 0 &&
            reinterpret_cast<uintptr_t>(cache.v) % 16 == 0,
        "cache", "must have heads that begin and end on 16 bytes");
}

// What is computed with a cache, or goes into it.
inline void check_cached_type(const Rows& x, const KvCache& cache) {
  if (cache.dtype == DType::kUInt8) {
    check(x.dtype == DType::kBFloat16 || x.dtype == DType::kFloat16, x.name,
          std::string("is ") + dtype_name(x.dtype) +
              ": with a float8 cache, bfloat16 or float16 is needed");
  } else {
    check(x.dtype == cache.dtype, x.name, "must be of the type of the cache");
  }
}

// 16 bytes as elements of T.
template <typename T>
struct Vector {
  static constexpr int kSize = 16 / static_cast<int>(sizeof(T));
  union {
    uint4 words;
    T elements[kSize];
  };
};

template <typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* p) {
  Vector<T> v;
  v.words = load_global(reinterpret_cast<const uint4*>(p));
  return v;
}
template <typename T>
__device__ __forceinline__ void store_vector(T* p, const Vector<T>& v) {
  store_global(reinterpret_cast<uint4*>(p), v.words);
}

}  // namespace fastpage::cuda
