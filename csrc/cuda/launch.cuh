// Launching a kernel that takes one struct of arguments.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace txl::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kThreads = 128;  // of every block
constexpr int kWarps = kThreads / kWarp;

template <typename Args>
cudaError_t launch(void (*kernel)(Args), int64_t blocks, Args args, void* stream) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  void* parameters[] = {&args};
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), parameters,
                          0, static_cast<cudaStream_t>(stream));
}

// Null where all is well. An error is said once: left where the runtime notes it, torch's next call
// would report it as its own.
inline const char* error_of(cudaError_t status) {
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(status);
}

}  // namespace txl::cuda
