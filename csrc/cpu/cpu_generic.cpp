// Every processor has vectors of 128 bits: SSE2 on x86-64, NEON on ARM64.
#define LED_ISA generic
#define LED_VECTOR_BYTES 16
#define LED_TILE_ROWS 4
#define LED_BLOCK_M 48
#define LED_BLOCK_N 48
#include "instantiate.h"
