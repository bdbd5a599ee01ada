#include "../../../../csrc/cuda/primitives.cuh"

namespace led::cuda {
namespace {

constexpr int kM = 16, kN = 8, kK = 16;

// The element of a pair that lies at the lower address comes first.
uint16_t element(uint32_t pair, int which) {
  return static_cast<uint16_t>(which == 0 ? pair : pair >> 16);
}

// d = a b + c of the fragments of 32 lanes: products are exact, sums in fp32.
template <float (*to_float)(uint16_t)>
void multiply(void* const* operands) {
  float a[kM][kK], b[kK][kN];
  for (int lane = 0; lane < host_cuda::kWarpSize; ++lane) {
    const auto& mine = *static_cast<const ProductOperands*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 2; ++i) {
      a[g][2 * t + i] = to_float(element(mine.a[0], i));
      a[g + 8][2 * t + i] = to_float(element(mine.a[1], i));
      a[g][2 * t + 8 + i] = to_float(element(mine.a[2], i));
      a[g + 8][2 * t + 8 + i] = to_float(element(mine.a[3], i));
      b[2 * t + i][g] = to_float(element(mine.b[0], i));
      b[2 * t + 8 + i][g] = to_float(element(mine.b[1], i));
    }
  }
  float sums[kM][kN] = {};
  for (int m = 0; m < kM; ++m) {
    for (int k = 0; k < kK; ++k) {
      for (int n = 0; n < kN; ++n) sums[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < host_cuda::kWarpSize; ++lane) {
    const auto& mine = *static_cast<const ProductOperands*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) mine.d[i] = mine.c[i] + sums[g + i / 2 * 8][2 * t + i % 2];
  }
}

template <bool transposed>
void load(void* const* operands) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t elements[8][8];
    for (int i = 0; i < 8; ++i) {
      const void* row = static_cast<const MatrixOperands*>(operands[8 * matrix + i])->row;
      std::memcpy(elements[i], row, sizeof(elements[i]));
    }
    for (int lane = 0; lane < host_cuda::kWarpSize; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint16_t low = transposed ? elements[2 * t][g] : elements[g][2 * t];
      const uint16_t high = transposed ? elements[2 * t + 1][g] : elements[g][2 * t + 1];
      static_cast<const MatrixOperands*>(operands[lane])->r[matrix] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

}  // namespace

float float_of_half(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  // fp16's exponent bias is 15, fp32's 127; the product makes subnormal numbers normal
  const float magnitude = __uint_as_float(static_cast<uint32_t>(bits & 0x7FFFu) << 13) * 0x1p112f;
  const uint32_t infinity = magnitude >= 65536.0f ? 0x7F800000u : 0u;  // infinite or NaN
  return __uint_as_float(__float_as_uint(magnitude) | infinity | sign);
}

uint16_t half_of_float(float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t magnitude_bits = bits & 0x7FFFFFFFu;
  const float magnitude = __uint_as_float(magnitude_bits);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (magnitude != magnitude) return 0x7FFF;
  if (magnitude >= 65520.0f) return sign | 0x7C00;
  // the sum's last place is fp16's smallest number
  if (magnitude < 0x1p-14f)
    return sign | static_cast<uint16_t>(__float_as_uint(magnitude + 0.5f) - 0x3F000000u);
  const uint32_t rounded = magnitude_bits + 0xFFFu + (magnitude_bits >> 13 & 1u);
  return sign | static_cast<uint16_t>((rounded - (112u << 23)) >> 13);
}

uint16_t bfloat16_of_float(float x) {
  if (x != x) return 0x7FFF;
  const uint32_t bits = __float_as_uint(x);
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

void multiply_halfs(void* const* operands) {
  multiply<float_of_half>(operands);
}

void multiply_bfloat16s(void* const* operands) {
  multiply<float_of_bfloat16>(operands);
}

void load_matrices(void* const* operands) {
  load<false>(operands);
}

void load_matrices_transposed(void* const* operands) {
  load<true>(operands);
}

}  // namespace led::cuda
