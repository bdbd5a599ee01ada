// This is compiled with AVX-512 F, BW, DQ and VL where the compiler can, else without kernels.
#ifdef __AVX512F__
  #define LED_ISA avx512
  #define LED_VECTOR_BYTES 64
  #define LED_TILE_ROWS 12
  #define LED_BLOCK_M 48
  #define LED_BLOCK_N 96
  #include "instantiate.h"
#else
  #include "kernel_table.h"
namespace led {
const KernelTable* avx512_kernels() {
  return nullptr;
}
}  // namespace led
#endif
