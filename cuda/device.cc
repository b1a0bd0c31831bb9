// Whether there is a GPU to run on. libcudart is linked statically, and finds out at run time
// whether there is a driver: this loads everywhere.
#include <cuda_runtime_api.h>

#include "cuda/ops.h"

namespace fastpage::cuda {

std::string unavailable_reason() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();  // it is told here, not by the next call
  if (error != cudaSuccess) {
    std::string reason = std::string("no CUDA device can be used: ") + cudaGetErrorString(error) +
                         " (" + cudaGetErrorName(error) + ")";
    if (error == cudaErrorInitializationError) {
      reason += "; a process that was forked from one that had used CUDA cannot: start a new one";
    }
    return reason;
  }
  if (count == 0) return "there is no CUDA device";
  int major = 0, minor = 0, device = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (major < 8) {
    return "the CUDA device has compute capability " + std::to_string(major) + "." +
           std::to_string(minor) + ": 8.0 or newer is needed";
  }
  return "";
}

void check_current_device(int32_t index, const char* name) {
  int current = 0;
  cudaGetDevice(&current);
  if (current == index) return;
  throw InvalidArgument(std::string(name) + " is on CUDA device " + std::to_string(index) +
                        ", the current one is " + std::to_string(current));
}

void check_pinned(const void* memory, const char* name) {
  cudaPointerAttributes attributes{};
  const cudaError_t error = cudaPointerGetAttributes(&attributes, memory);
  if (error == cudaSuccess && attributes.type == cudaMemoryTypeHost) return;
  cudaGetLastError();
  throw InvalidArgument(std::string(name) + " must be in pinned host memory");
}

bool is_available() { return unavailable_reason().empty(); }

}  // namespace fastpage::cuda
