// Tile sizes by kernel, element type and head_dim, and the choice of a kernel's instance at run time.
#pragma once

#include "fma.cuh"
#include "launch.h"
#include "launchers.h"
#include "tensor_core.cuh"

namespace led::cuda {

// For products with the elements of `T` on tensor cores; float: by multiply-adds, for any dtype. Every choice
// stays within 64 KB of shared memory, which is what sm_75 has, and 255 registers.
template <class T, int kHeadDim>
struct Tiles {
  static constexpr int kColumns = kHeadDim <= 64 ? 64 : 32;
  // two products share each load of an operand from shared memory
  using Forward = TensorCoreProducts<T, kHeadDim, kHeadDim <= 64 ? 4 : 2, kColumns, 4>;
  using Dq = TensorCoreProducts<T, kHeadDim, 2, kColumns, 4>;
  using Dkdv = TensorCoreProducts<T, kHeadDim, 2, kColumns, 4, /*kReloadRows=*/(kHeadDim > 64)>;
  // global queries: one warp where 16 rows hold them all
  using FewForward = TensorCoreProducts<T, kHeadDim, 2, kColumns, 1>;
  using ManyForward = TensorCoreProducts<T, kHeadDim, 2, kColumns, 4>;
  using FewDq = TensorCoreProducts<T, kHeadDim, 2, kColumns, 1>;
  using ManyDq = Dq;
};

template <int kHeadDim>
struct Tiles<float, kHeadDim> {
  static constexpr int kRowsPerLane = kHeadDim <= 64 ? 2 : 1;
  static constexpr int kColumns = kHeadDim <= 128 ? 32 : 16;
  using Forward = FmaProducts<kHeadDim, kRowsPerLane, kColumns, kHeadDim <= 128 ? 4 : 2>;
  using Dq = Forward;
  using Dkdv = Forward;
  using FewForward = FmaProducts<kHeadDim, 1, kColumns, 1>;
  using ManyForward = Forward;
  using FewDq = FewForward;
  using ManyDq = Forward;
};

// Calls f(T{}, has_dropout) with the element type (float for Unit::kFma) and a std::bool_constant.
template <int kHeadDim, class F>
void choose_instance(const Arguments& a, Unit unit, F f) {
  auto with_dropout = [&](auto element) {
    if (a.p.device_seed != nullptr) {
      f(element, std::true_type{});
    } else {
      f(element, std::false_type{});
    }
  };
  if constexpr (kHeadDim <= 128) {
    if (unit == Unit::kTensorCore) {
      if (a.p.dtype == DType::kFloat16) {
        with_dropout(Half{});
      } else {
        with_dropout(BFloat16{});
      }
      return;
    }
  }
  with_dropout(float{});
}

inline unsigned ceil_div(int64_t a, int64_t b) {
  return static_cast<unsigned>((a + b - 1) / b);
}

}  // namespace led::cuda
