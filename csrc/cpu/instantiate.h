// Instantiates every kernel for the instruction set that the including file names:
//   LED_ISA             namespace and name
//   LED_VECTOR_BYTES    width of a vector
//   LED_TILE_ROWS       rows of a register tile
//   LED_BLOCK_M, _N     queries of a tile, keys of a block
#pragma once

#include "banded_backward.h"
#include "banded_forward.h"
#include "few_rows.h"
#include "global_backward.h"
#include "global_forward.h"
#include "kernel_table.h"

#define LED_STRING_(x) #x
#define LED_STRING(x) LED_STRING_(x)
#define LED_JOIN_(a, b) a##b
#define LED_JOIN(a, b) LED_JOIN_(a, b)

namespace led {
namespace LED_ISA {

// fp64 accumulates in fp64, everything else in fp32.
template <template <class> class Kernel, class Params = InterruptibleParams>
void run(const Params& params) {
  if (params.dtype == DType::kFloat64) {
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
                                      LED_ISA::run<LED_ISA::DecodeAttention, DecodeParams>,
                                      LED_ISA::write_rows,
                                      LED_ISA::run<LED_ISA::FewRowsLinear, LinearParams>,
                                      LED_ISA::run<LED_ISA::FewRowsAddNorm, AddNormParams>};
  return &kernels;
}

}  // namespace led
