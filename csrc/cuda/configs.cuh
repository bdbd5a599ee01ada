// Tile sizes depend on the kernel, element type and head_dim; the instance of a kernel is chosen at run time.
#pragma once

#include <type_traits>

#include "fma.cuh"
#include "launch.h"
#include "launchers.h"
#include "tensor_core.cuh"

namespace led::cuda {

// Elements of `T` are multiplied on tensor cores; with float, those of any dtype by multiply-adds. Every
// choice stays within 64 KB of shared memory, which is what sm_75 has, and on tensor cores without spills.
// Kernels ask for at least one block per multiprocessor: left alone, ptxas spills a few registers to fit one
// more.
template <class T, int kBlockD>
struct Tiles {
  static constexpr int kColumns = kBlockD <= 64 ? 64 : 32;
  // The 32 rows of a warp share each load of k and v from shared memory.
  using Forward = TensorCoreProducts<T, kBlockD, kBlockD <= 64 ? 4 : 2, kColumns, 4>;
  using Dq = TensorCoreProducts<T, kBlockD, 2, kColumns, 4>;
  // Two results lie in registers, so that tiles are narrower.
  using Dkdv = TensorCoreProducts<T, kBlockD, 2, kColumns / 2, 4, /*kReloadRows=*/(kBlockD > 64)>;
  // Rows are global tokens. One warp serves where they are few, as 16 rows then hold them.
  using DkdvGlobals = TensorCoreProducts<T, kBlockD, 2, kColumns / 2, 1, /*kReloadRows=*/(kBlockD > 64)>;
  using FewGlobalQueries = TensorCoreProducts<T, kBlockD, 2, kColumns, 1, /*kReloadRows=*/(kBlockD > 64)>;
  using ManyGlobalQueries = TensorCoreProducts<T, kBlockD, 2, kColumns, 4>;
};

template <int kBlockD>
struct Tiles<float, kBlockD> {
  static constexpr int kColumns = kBlockD <= 128 ? 32 : 16;
  using Forward = FmaProducts<kBlockD, kBlockD <= 64 ? 2 : 1, kColumns, kBlockD <= 128 ? 4 : 2>;
  using Dq = Forward;
  using Dkdv = Forward;
  using DkdvGlobals = Forward;
  using FewGlobalQueries = Forward;
  using ManyGlobalQueries = Forward;
};

// Calls f(T{}) with the element type, which is float for Unit::kFma.
template <int kBlockD, class F>
void choose_element(const Arguments& a, Unit unit, F f) {
  if constexpr (kBlockD <= 128) {
    if (unit == Unit::kTensorCore && a.call.dtype == DType::kFloat16) return f(Half{});
    if (unit == Unit::kTensorCore) return f(BFloat16{});
  }
  f(float{});
}

// Calls f(T{}, may_drop) with a std::bool_constant, so that a tuned kernel comes without dropout, too. Other
// kernels ask has_dropout alone, which is a branch for each tile, and half as much to compile.
template <int kBlockD, class F>
void choose_instance(const Arguments& a, Unit unit, F f) {
  choose_element<kBlockD>(a, unit, [&](auto element) {
    if constexpr (!std::is_same_v<decltype(element), float>) {
      if (!a.has_dropout()) return f(element, std::false_type{});
    }
    f(element, std::true_type{});
  });
}

// Calls f(Few{}) where its rows hold all global tokens, else f(Many{}).
template <class Few, class Many, class F>
void choose_warps(const Arguments& a, F f) {
  if (a.call.mask.max_globals <= Few::kRows) {
    f(Few{});
  } else {
    f(Many{});
  }
}

inline unsigned ceil_div(int64_t a, int64_t b) {
  return static_cast<unsigned>((a + b - 1) / b);
}

// A grid has `blocks` thread blocks for each head and sequence: one for each tile of tokens, for each tile of
// slots and split, or for each slot.
inline dim3 grid(unsigned blocks, const Arguments& a) {
  return dim3(blocks, static_cast<unsigned>(a.call.heads), static_cast<unsigned>(a.call.batch));
}
template <class P>
dim3 token_grid(const Arguments& a) {
  return grid(ceil_div(a.call.max_seqlen, P::kRows), a);
}
template <class P>
dim3 split_grid(const Arguments& a) {
  return grid(ceil_div(a.call.mask.max_globals, P::kRows) * static_cast<unsigned>(a.num_splits), a);
}
inline dim3 slot_grid(const Arguments& a) {
  return grid(static_cast<unsigned>(a.call.mask.max_globals), a);
}

}  // namespace led::cuda
