// This is compiled with AVX2 and FMA where the compiler can, else without kernels.
#ifdef __AVX2__
  #define LED_ISA avx2
  #define LED_VECTOR_BYTES 32
  #define LED_TILE_ROWS 6
  #define LED_BLOCK_M 48
  #define LED_BLOCK_N 192
  #include "instantiate.h"
#else
  #include "kernel_table.h"
namespace led {
const KernelTable* avx2_kernels() {
  return nullptr;
}
}  // namespace led
#endif
