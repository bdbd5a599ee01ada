// The launchers of one head_dim, each in an object of its own; dispatch.cu picks.
#pragma once

#include "arguments.h"

namespace led::cuda {

// A launch computes on tensor cores (head_dim is kHeadDim) or by multiply-adds (head_dim is at most that).
enum class Unit { kTensorCore, kFma };

// kHeadDim is 32, 64, 128, or 256 (kFma only). The workspace is laid out by the caller.
template <int kHeadDim>
void launch_banded_forward(const Arguments& a, Unit unit);
template <int kHeadDim>
void launch_banded_backward(const Arguments& a, Unit unit);
template <int kHeadDim>
void launch_global_forward(const Arguments& a, Unit unit);
template <int kHeadDim>
void launch_global_backward(const Arguments& a, Unit unit);

}  // namespace led::cuda
