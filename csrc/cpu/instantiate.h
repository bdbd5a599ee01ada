// Instantiates every kernel for the instruction set that the including file names:
//   LED_ISA             namespace and name
//   LED_VECTOR_BYTES    width of a vector
//   LED_TILE_ROWS       rows of a register tile
//   LED_BLOCK_M, _N     rows of a tile of queries, of a tile of keys
#pragma once

#include "banded_backward.h"
#include "banded_forward.h"
#include "decode.h"
#include "global_backward.h"
#include "global_forward.h"
#include "kernel_table.h"

#define LED_STRING_(x) #x
#define LED_STRING(x) LED_STRING_(x)
#define LED_JOIN_(a, b) a##b
#define LED_JOIN(a, b) LED_JOIN_(a, b)

namespace led {
namespace LED_ISA {

inline DType dtype_of(const CpuAttentionParams& params) {
  return params.call.dtype;
}
template <class Params>
inline DType dtype_of(const Params& params) {
  return params.dtype;
}

// Inputs of fp64 are accumulated in fp64, all others in fp32.
template <template <class> class Kernel, class Params>
void run(const Params& params) {
  if (dtype_of(params) == DType::kFloat64) {
    Kernel<double>(params).run();
  } else {
    Kernel<float>(params).run();
  }
}

}  // namespace LED_ISA

const KernelTable* LED_JOIN(LED_ISA, _kernels)() {
  static const KernelTable kernels = {LED_STRING(LED_ISA),
                                      LED_ISA::run<LED_ISA::BandedForward>,
                                      LED_ISA::run<LED_ISA::BandedBackward>,
                                      LED_ISA::run<LED_ISA::GlobalForward>,
                                      LED_ISA::run<LED_ISA::GlobalBackward>,
                                      LED_ISA::run<LED_ISA::DecodeAttention>,
                                      LED_ISA::write_rows,
                                      LED_ISA::run<LED_ISA::Gemv>,
                                      LED_ISA::run<LED_ISA::AddNorm>};
  return &kernels;
}

}  // namespace led
