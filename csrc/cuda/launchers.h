// The launchers of one kBlockD lie in objects of their own; dispatch.cu picks.
#pragma once

#include "arguments.h"

namespace led::cuda {

// A launch computes on tensor cores, where head_dim is kBlockD, or by multiply-adds, where it is at most
// that.
enum class Unit { kTensorCore, kFma };

// kBlockD is 32, 64, 128, or 256 (kFma only). The caller lays out the workspace.
template <int kBlockD>
void launch_banded_forward(const Arguments& a, Unit unit);
template <int kBlockD>
void launch_banded_backward(const Arguments& a, Unit unit);
template <int kBlockD>
void launch_global_forward(const Arguments& a, Unit unit);
template <int kBlockD>
void launch_global_backward(const Arguments& a, Unit unit);

}  // namespace led::cuda
