// The bindings see the CUDA kernels as plain functions that put work on a stream.
#pragma once

#include <cstdint>
#include <vector>

#include "../attention_params.h"

namespace led::cuda {

// Each function checks the device and its architecture, and selects the device for the time of the call.
// Errors of the CUDA runtime are std::runtime_error with CUDA's text.
void banded_forward(const CudaAttentionParams& params);
void banded_backward(const CudaAttentionParams& params);
void global_forward(const CudaAttentionParams& params);
void global_backward(const CudaAttentionParams& params);

// How many floats the workspace must hold for the function of that name; shapes decide.
int64_t banded_forward_workspace(const CudaAttentionParams& params);
int64_t banded_backward_workspace(const CudaAttentionParams& params);
int64_t global_forward_workspace(const CudaAttentionParams& params);
int64_t global_backward_workspace(const CudaAttentionParams& params);

// This build holds machine code for the compute capabilities `compiled` (75, 80, ...), and PTX of one, which
// the driver can compile for later devices (0: none).
struct Architectures {
  std::vector<int> compiled;
  int ptx = 0;
};
Architectures architectures();

// Returns "cuda", or "cpu" where tests execute the kernels on the CPU.
const char* device_type();

}  // namespace led::cuda
