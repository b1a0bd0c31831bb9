// What stands around attention and the matrix products: norms, activations, embedding.
#include "cuda/launch.cuh"

namespace fastpage::cuda {

namespace {

constexpr int kThreads = 256;

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Few {
  T elements[kWidth];
};

template <typename T, int kWidth>
__device__ __forceinline__ Few<T, kWidth> load_few(const T* from) {
  return load_global(reinterpret_cast<const Few<T, kWidth>*>(from));
}
template <typename T, int kWidth>
__device__ __forceinline__ void store_few(T* to, const Few<T, kWidth>& x) {
  store_global(reinterpret_cast<Few<T, kWidth>*>(to), x);
}

// Sums of warps, where a block shares a group.
template <int kLanes>
constexpr int kNumSums = kLanes == 32 ? 0 : kLanes / 32;

// Over the kLanes threads (a warp, or the block) that share a group; the same order everywhere.
template <int kLanes>
__device__ __forceinline__ float sum_of_lanes(float x, float* sums) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(kFullWarp, x, bits);
  if (kLanes == 32) return x;
  __syncthreads();
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) total += sums[i];
  return total;
}

struct NormArgs {
  const void* x;
  void* y;
  void* residual;  // or null: x += residual first, and what comes out is left there
  int64_t x_stride, y_stride, residual_stride;
  int64_t num_groups;  // of all rows
  int32_t groups_per_row;
  int32_t group;
  bool is_layer;
  bool is_per_column;
  const float* weight;
  const float* bias;
  float eps;
};

// Floats of shared memory that kLanes threads need for a group: whole rounds of kWidth each.
template <int kWidth, int kLanes>
__host__ __device__ __forceinline__ int kept_size(int group) {
  return (group + kWidth * kLanes - 1) / (kWidth * kLanes) * kWidth * kLanes;
}

// kLanes threads normalize a group, which they keep in shared memory in between: each its own
// elements, kLanes apart, so that neighbours are in different banks.
template <typename T, int kWidth, int kLanes>
__global__ void __launch_bounds__(kThreads) norm_kernel(NormArgs a) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int part = static_cast<int>(threadIdx.x) / kLanes;
  const int64_t index = int64_t{blockIdx.x} * (kThreads / kLanes) + part;
  if (index >= a.num_groups) return;  // whole warps
  float* const sums = reinterpret_cast<float*>(dynamic_shared());
  float* const values = sums + kNumSums<kLanes> + part * kept_size<kWidth, kLanes>(a.group) + lane;
  const auto at = [&](int i, int e) { return i - lane * kWidth + e * kLanes; };
  const int64_t row = index / a.groups_per_row;
  const int64_t first = index % a.groups_per_row * a.group;  // column
  const T* const x = static_cast<const T*>(a.x) + row * a.x_stride + first;
  T* const residual =
      a.residual ? static_cast<T*>(a.residual) + row * a.residual_stride + first : nullptr;
  float sum = 0.0f;
  for (int i = lane * kWidth; i < a.group; i += kLanes * kWidth) {
    Few<T, kWidth> in = load_few<T, kWidth>(x + i);
    if (residual != nullptr) {
      const Few<T, kWidth> old = load_few<T, kWidth>(residual + i);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        in.elements[e] = from_float<T>(to_float(in.elements[e]) + to_float(old.elements[e]));
      }
      store_few(residual + i, in);
    }
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const float value = to_float(in.elements[e]);
      values[at(i, e)] = value;
      sum = __fadd_rn(sum, a.is_layer ? value : __fmul_rn(value, value));
    }
  }
  sum = sum_of_lanes<kLanes>(sum, sums);
  float mean = 0.0f;
  if (a.is_layer) {
    mean = sum / static_cast<float>(a.group);
    sum = 0.0f;
    for (int i = lane * kWidth; i < a.group; i += kLanes * kWidth) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        const float difference = values[at(i, e)] - mean;
        sum += difference * difference;
      }
    }
    sum = sum_of_lanes<kLanes>(sum, sums);
  }
  const float factor = rsqrtf(sum / static_cast<float>(a.group) + a.eps);
  const int64_t of_weight = a.is_per_column ? first : 0;
  T* const y = static_cast<T*>(a.y) + row * a.y_stride + first;
  for (int i = lane * kWidth; i < a.group; i += kLanes * kWidth) {
    float normed[kWidth];
#pragma unroll
    for (int e = 0; e < kWidth; ++e) normed[e] = (values[at(i, e)] - mean) * factor;
    // Four at a time: one at a time, neighbours are in eight lines of the cache, and L1 is as busy
    // as memory.
    constexpr int kEach = kWidth < 4 ? kWidth : 4;
#pragma unroll
    for (int part = 0; part < kWidth; part += kEach) {
      Few<float, kEach> weight, bias;
      const int64_t column = of_weight + i + part;
      if (a.weight != nullptr) weight = load_few<float, kEach>(a.weight + column);
      if (a.bias != nullptr) bias = load_few<float, kEach>(a.bias + column);
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        if (a.weight != nullptr) normed[part + e] *= weight.elements[e];
        if (a.bias != nullptr) normed[part + e] += bias.elements[e];
      }
    }
    Few<T, kWidth> out;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) out.elements[e] = from_float<T>(normed[e]);
    store_few(y + i, out);
  }
}

template <typename T, int kWidth, int kLanes>
void launch_norm(const NormArgs& a, Stream stream) {
  constexpr int kPerBlock = kThreads / kLanes;
  const auto blocks = static_cast<unsigned>((a.num_groups + kPerBlock - 1) / kPerBlock);
  const int floats = kNumSums<kLanes> + kPerBlock * kept_size<kWidth, kLanes>(a.group);
  launch("norm", norm_kernel<T, kWidth, kLanes>, dim3(blocks), kThreads,
         sizeof(float) * static_cast<size_t>(floats), stream, a);
}

template <typename T, int kWidth>
void launch_norm(const NormArgs& a, Stream stream) {
  a.group <= 512 ? launch_norm<T, kWidth, 32>(a, stream)
                 : launch_norm<T, kWidth, kThreads>(a, stream);
}

__device__ __forceinline__ float activated(ops::ActivationKind kind, float x) {
  switch (kind) {
    case ops::ActivationKind::kSilu:
      return x / (1.0f + __expf(-x));
    case ops::ActivationKind::kGelu:
      return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case ops::ActivationKind::kGeluTanh: {
      const float u = 0.79788456080286536f * (x + 0.044715f * x * x * x);
      return x / (1.0f + __expf(-2.0f * u));
    }
    case ops::ActivationKind::kRelu:
      return fmaxf(x, 0.0f);
    default:
      return x;
  }
}

struct ActivateArgs {
  const void* x;
  void* y;
  int64_t x_stride, y_stride;
  int64_t rows;
  int32_t cols;  // of y
  ops::Activation activation;
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) activate_kernel(ActivateArgs a) {
  const int64_t row = blockIdx.y;
  const int column =
      (static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x)) * kWidth;
  if (column >= a.cols) return;
  const T* const x = static_cast<const T*>(a.x) + row * a.x_stride + column;
  const Few<T, kWidth> in = load_few<T, kWidth>(x);
  Few<T, kWidth> out, factor;
  if (a.activation.is_gated) factor = load_few<T, kWidth>(x + a.cols);
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    float value = activated(a.activation.kind, to_float(in.elements[e]));
    if (a.activation.is_gated) value *= to_float(factor.elements[e]);
    out.elements[e] = from_float<T>(value);
  }
  store_few(static_cast<T*>(a.y) + row * a.y_stride + column, out);
}

// `size` bytes at a time: rows of a table.
template <typename Part>
__global__ void __launch_bounds__(kThreads)
    embed_kernel(const int32_t* ids, const char* table, int64_t table_bytes, int32_t table_rows,
                 char* y, int64_t y_bytes, int32_t parts) {
  const int64_t row = blockIdx.x;
  const int64_t id = min(max(load_global(ids + row), 0), table_rows - 1);
  const Part* const from = reinterpret_cast<const Part*>(table + id * table_bytes);
  Part* const to = reinterpret_cast<Part*>(y + row * y_bytes);
  for (int i = threadIdx.x; i < parts; i += kThreads) store_global(to + i, load_global(from + i));
}

constexpr int64_t kMostRowsOfAGrid = 65535;

}  // namespace

void norm(const Rows& x, const Rows* residual, const ops::NormParams& params, const Rows& y,
          Stream stream) {
  check_rows(y, x.rows, x.cols);
  check(y.dtype == x.dtype, y.name, "must be of the type of x");
  check(params.group > 0 && x.cols % params.group == 0, "group",
        "must divide the columns of x, " + std::to_string(x.cols));
  check(params.group <= (1 << 20), "group", "is more than 1048576");
  NormArgs a{};
  a.x = x.data;
  a.y = y.data;
  a.x_stride = x.stride;
  a.y_stride = y.stride;
  bool vectorized = is_vectorized(x) && is_vectorized(y);
  if (residual != nullptr) {
    check_rows(*residual, x.rows, x.cols);
    check(residual->dtype == x.dtype, residual->name, "must be of the type of x");
    a.residual = residual->data;
    a.residual_stride = residual->stride;
    vectorized = vectorized && is_vectorized(*residual);
  }
  a.groups_per_row = static_cast<int32_t>(x.cols / params.group);
  a.num_groups = x.rows * a.groups_per_row;
  a.group = static_cast<int32_t>(params.group);
  a.is_layer = params.kind == ops::NormKind::kLayer;
  a.is_per_column = params.is_per_column;
  a.weight = params.weight;
  a.bias = params.bias;
  a.eps = params.eps;
  for (const float* p : {params.weight, params.bias}) {
    vectorized = vectorized && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  }
  with_float_type(x.dtype, x.name, [&](auto t) {
    using T = typename decltype(t)::type;
    constexpr int kWide = 16 / static_cast<int>(sizeof(T));
    vectorized&& a.group % kWide == 0 ? launch_norm<T, kWide>(a, stream)
                                      : launch_norm<T, 1>(a, stream);
  });
}

void activate(const Rows& x, ops::Activation activation, const Rows& y, Stream stream) {
  check_rows(x, y.rows, activation.is_gated ? 2 * y.cols : y.cols);
  check(y.dtype == x.dtype, y.name, "must be of the type of x");
  const auto size = static_cast<int64_t>(dtype_size(x.dtype));
  for (int64_t begin = 0; begin < x.rows; begin += kMostRowsOfAGrid) {
    const int64_t rows = std::min(kMostRowsOfAGrid, x.rows - begin);
    const ActivateArgs a{static_cast<const char*>(x.data) + begin * x.stride * size,
                         static_cast<char*>(y.data) + begin * y.stride * size,
                         x.stride,
                         y.stride,
                         rows,
                         static_cast<int32_t>(y.cols),
                         activation};
    with_float_type(x.dtype, x.name, [&](auto t) {
      using T = typename decltype(t)::type;
      constexpr int kWide = 16 / static_cast<int>(sizeof(T));
      const auto run = [&](auto kernel, int width) {
        const int64_t per_block = int64_t{kThreads} * width;
        const dim3 grid(static_cast<unsigned>((y.cols + per_block - 1) / per_block),
                        static_cast<unsigned>(rows));
        launch("activate", kernel, grid, kThreads, 0, stream, a);
      };
      const bool wide = is_vectorized(x) && is_vectorized(y);
      wide ? run(activate_kernel<T, kWide>, kWide) : run(activate_kernel<T, 1>, 1);
    });
  }
}

void embed(const int32_t* ids, const Rows& table, const Rows& y, Stream stream) {
  check_rows(y, y.rows, table.cols);
  check(y.dtype == table.dtype, y.name, "must be of the type of table");
  check(table.rows > 0, table.name, "is empty");
  const auto size = static_cast<int64_t>(dtype_size(table.dtype));
  const int64_t bytes = table.cols * size;
  const auto run = [&](auto kernel, int64_t part) {
    launch("embed", kernel, dim3(static_cast<unsigned>(y.rows)), kThreads, 0, stream, ids,
           static_cast<const char*>(table.data), table.stride * size,
           static_cast<int32_t>(table.rows), static_cast<char*>(y.data), y.stride * size,
           static_cast<int32_t>(bytes / part));
  };
  if (is_vectorized(table) && is_vectorized(y)) return run(embed_kernel<uint4>, 16);
  check(size == 2 || size == 4, table.name, "must have elements of 2 or 4 bytes");
  size == 4 ? run(embed_kernel<uint32_t>, 4) : run(embed_kernel<uint16_t>, 2);
}

}  // namespace fastpage::cuda
