// The CUDA kernels as the bindings see them: plain functions that put work on a stream.
#pragma once

#include <cstdint>
#include <vector>

#include "../attention_params.h"

namespace led::cuda {

// Each function checks the device and its architecture, and selects the device for the time of the call.
// Errors of the CUDA runtime are std::runtime_error with CUDA's text.
void banded_forward(const AttentionParams& params);
void banded_backward(const AttentionParams& params);
void global_forward(const AttentionParams& params);
void global_backward(const AttentionParams& params);

// Floats that params.workspace must hold for the function of that name; shapes decide.
int64_t banded_forward_workspace(const AttentionParams& params);
int64_t banded_backward_workspace(const AttentionParams& params);
int64_t global_forward_workspace(const AttentionParams& params);
int64_t global_backward_workspace(const AttentionParams& params);

// What this build holds: machine code by compute capability (75, 80, ...), and the one whose PTX the driver
// can compile for later devices (0: none).
struct Architectures {
  std::vector<int> compiled;
  int ptx = 0;
};
Architectures architectures();

// "cuda"; "cpu" where tests execute the kernels on the CPU.
const char* device_type();

}  // namespace led::cuda
