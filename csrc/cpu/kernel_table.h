// The kernels of one instruction set, and the tables of this build.
#pragma once

#include <vector>

#include "../interruption.h"

namespace led {

struct KernelTable {
  const char* isa;
  void (*banded_forward)(const InterruptibleParams&);
  void (*banded_backward)(const InterruptibleParams&);
  void (*global_forward)(const InterruptibleParams&);
  void (*global_backward)(const InterruptibleParams&);
  void (*decode_attention)(const DecodeParams&);
  void (*write_rows)(const WriteRowsParams&);
  void (*few_rows_linear)(const LinearParams&);
  void (*few_rows_add_norm)(const AddNormParams&);
};

// Null where the compiler could not build them. Whether the processor runs them is cpu_kernels()'s to know.
const KernelTable* avx512_kernels();
const KernelTable* avx2_kernels();
const KernelTable* generic_kernels();
const KernelTable* avx512_emulated_kernels();

// The tables that this build holds and this processor runs, best first.
std::vector<const KernelTable*> cpu_kernels();

}  // namespace led
