// A table holds the kernels of one instruction set; a build holds several tables.
#pragma once

#include <vector>

#include "../interruption.h"

namespace led {

struct KernelTable {
  const char* isa;
  void (*banded_forward)(const CpuAttentionParams&);
  void (*banded_backward)(const CpuAttentionParams&);
  void (*global_forward)(const CpuAttentionParams&);
  void (*global_backward)(const CpuAttentionParams&);
  void (*decode_attention)(const DecodeParams&);
  void (*write_rows)(const WriteRowsParams&);
  void (*gemv)(const GemvParams&);
  void (*add_norm)(const AddNormParams&);
};

// These are null where the compiler could not build them. Whether the processor runs them, cpu_kernels()
// knows.
const KernelTable* avx512_kernels();
const KernelTable* avx2_kernels();
const KernelTable* generic_kernels();
const KernelTable* avx512_emulated_kernels();

// The tables that this build holds and this processor runs, best first.
std::vector<const KernelTable*> cpu_kernels();

}  // namespace led
