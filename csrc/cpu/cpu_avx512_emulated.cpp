// Tests run the AVX-512 tiles on vectors that the compiler splits, so that any processor runs this code.
#define LED_ISA avx512_emulated
#define LED_VECTOR_BYTES 64
#define LED_TILE_ROWS 12
#define LED_BLOCK_M 48
#define LED_BLOCK_N 96
#include "instantiate.h"
