// Tile sizes by kernel, element type and head_dim, and the choice of a kernel's instance at run time.
#pragma once

#include <type_traits>

#include "fma.cuh"
#include "launch.h"
#include "launchers.h"
#include "tensor_core.cuh"

namespace led::cuda {

// For products of elements of `T` on tensor cores; float: by multiply-adds, for any dtype. Every choice stays
// within 64 KB of shared memory, which is what sm_75 has, and without spills on tensor cores. Kernels ask for
// at least one block per multiprocessor: left alone, ptxas spills a few registers to fit one more.
template <class T, int kHeadDim>
struct Tiles {
  static constexpr int kColumns = kHeadDim <= 64 ? 64 : 32;
  // 32 rows a warp share each load of k and v from shared memory
  using Forward = TensorCoreProducts<T, kHeadDim, kHeadDim <= 64 ? 4 : 2, kColumns, 4>;
  using Dq = TensorCoreProducts<T, kHeadDim, 2, kColumns, 4>;
  // two results in registers, so narrower tiles
  using Dkdv = TensorCoreProducts<T, kHeadDim, 2, kColumns / 2, 4, /*kReloadRows=*/(kHeadDim > 64)>;
  // Of global tokens. One warp where they are few, as 16 rows then hold them.
  using DkdvGlobals = TensorCoreProducts<T, kHeadDim, 2, kColumns / 2, 1, /*kReloadRows=*/(kHeadDim > 64)>;
  using FewGlobalQueries = TensorCoreProducts<T, kHeadDim, 2, kColumns, 1, /*kReloadRows=*/(kHeadDim > 64)>;
  using ManyGlobalQueries = TensorCoreProducts<T, kHeadDim, 2, kColumns, 4>;
};

template <int kHeadDim>
struct Tiles<float, kHeadDim> {
  static constexpr int kColumns = kHeadDim <= 128 ? 32 : 16;
  using Forward = FmaProducts<kHeadDim, kHeadDim <= 64 ? 2 : 1, kColumns, kHeadDim <= 128 ? 4 : 2>;
  using Dq = Forward;
  using Dkdv = Forward;
  using DkdvGlobals = Forward;
  using FewGlobalQueries = Forward;
  using ManyGlobalQueries = Forward;
};

// Calls f(T{}) with the element type; float for Unit::kFma.
template <int kHeadDim, class F>
void choose_element(const Arguments& a, Unit unit, F f) {
  if constexpr (kHeadDim <= 128) {
    if (unit == Unit::kTensorCore && a.p.dtype == DType::kFloat16) return f(Half{});
    if (unit == Unit::kTensorCore) return f(BFloat16{});
  }
  f(float{});
}

// Calls f(T{}, may_drop) with a std::bool_constant, so that a tuned kernel comes without dropout, too. Other
// kernels ask has_dropout alone: a branch for each tile, and half as much to compile.
template <int kHeadDim, class F>
void choose_instance(const Arguments& a, Unit unit, F f) {
  choose_element<kHeadDim>(a, unit, [&](auto element) {
    if constexpr (!std::is_same_v<decltype(element), float>) {
      if (!a.has_dropout()) return f(element, std::false_type{});
    }
    f(element, std::true_type{});
  });
}

// Calls f(Few{}) where its rows hold all global tokens, else f(Many{}).
template <class Few, class Many, class F>
void choose_warps(const Arguments& a, F f) {
  if (a.p.mask.max_globals <= Few::kRows) {
    f(Few{});
  } else {
    f(Many{});
  }
}

inline unsigned ceil_div(int64_t a, int64_t b) {
  return static_cast<unsigned>((a + b - 1) / b);
}

}  // namespace led::cuda
