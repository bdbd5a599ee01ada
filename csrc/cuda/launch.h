// A launch on the host's side selects the device, throws errors and reserves dynamic shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>

namespace led::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // cleared, so that torch does not report it once more
  throw std::runtime_error(std::string("CUDA failed to ") + what + ": " + cudaGetErrorString(error) + ".");
}

// Selects a device, and in the end the one before if that was another.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "tell the current device");
    is_other_ = previous_ != device;
    if (is_other_) check(cudaSetDevice(device), "select the device");
  }
  ~DeviceGuard() {
    if (is_other_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool is_other_ = false;
};

// Starts kernel(argument) on the stream that the argument names. A grid without blocks is no launch.
template <class Argument>
void launch(void (*kernel)(Argument), dim3 grid, int threads, size_t shared_bytes, Argument argument) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "reserve shared memory");
  }
  void* arguments[] = {&argument};
  const auto stream = reinterpret_cast<cudaStream_t>(argument.execution.stream);
  check(cudaLaunchKernel(kernel, grid, dim3(threads), arguments, shared_bytes, stream), "launch a kernel");
}

}  // namespace led::cuda
