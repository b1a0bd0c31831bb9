// The kernels of the instruction set in use.
#pragma once

#include "fastpage/tensor.h"
#include "ops/cpu/kernel_table.h"

namespace fastpage::ops {

enum class ActivationKind : uint8_t;

const cpu::KernelTable& kernels();

// Throws InvalidArgument, naming `what`, unless dtype is fp32, bf16 or fp16.
cpu::ElementType element_type(DType dtype, const char* what);

// Throws InvalidArgument unless a KV cache may be of this type: fp32, bf16, fp16 or int8.
cpu::CacheType cache_type(DType dtype);

// Of any kind but kNone: f(x), times `up` unless that is null.
using ActivationKernel = void (*)(const float* x, const float* up, int64_t n, float* y);
ActivationKernel activation_kernel(ActivationKind kind);

// A loop of the thread pool costs about a microsecond: less work than this stays with the caller.
inline constexpr int64_t kSerialElements = 16384;

}  // namespace fastpage::ops
