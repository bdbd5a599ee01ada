// primitives.cuh on the CPU: the same functions, of the same fragments.
#pragma once

#include <type_traits>

#include "execution.h"

namespace led::cuda {

// 16-bit floats by their bits; rounds to nearest even.
float float_of_half(uint16_t bits);
uint16_t half_of_float(float x);
uint16_t bfloat16_of_float(float x);

inline float float_of_bfloat16(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

inline float to_float(float x) {
  return x;
}
inline float to_float(Half x) {
  return float_of_half(x.bits);
}
inline float to_float(BFloat16 x) {
  return float_of_bfloat16(x.bits);
}

template <class T>
inline T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline Half from_float<Half>(float x) {
  return {half_of_float(x)};
}

template <>
inline BFloat16 from_float<BFloat16>(float x) {
  return {bfloat16_of_float(x)};
}

template <class T>
inline uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

// What a lane brings to a product of the tensor cores, and to ldmatrix.
struct ProductOperands {
  float* d;           // [4]
  const uint32_t* a;  // [4]
  uint32_t b[2];
  const float* c;  // [4]
};
struct MatrixOperands {
  uint32_t* r;  // [4]
  const void* row;
};
void multiply_halfs(void* const* operands);
void multiply_bfloat16s(void* const* operands);
void load_matrices(void* const* operands);
void load_matrices_transposed(void* const* operands);

template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4],
                host_cuda::Site site = host_cuda::Site::here()) {
  constexpr bool is_half = std::is_same_v<T, Half>;
  static_assert(is_half || std::is_same_v<T, BFloat16>);
  ProductOperands operands{d, a, {b0, b1}, c};
  host_cuda::meet_warp("mma", is_half ? multiply_halfs : multiply_bfloat16s, &operands, site);
}

inline void ldmatrix(uint32_t (&r)[4], const void* row, host_cuda::Site site = host_cuda::Site::here()) {
  host_cuda::check_shared_row(row, "ldmatrix", site);
  MatrixOperands operands{r, row};
  host_cuda::meet_warp("ldmatrix", load_matrices, &operands, site);
}

inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row,
                                host_cuda::Site site = host_cuda::Site::here()) {
  host_cuda::check_shared_row(row, "ldmatrix_transposed", site);
  MatrixOperands operands{r, row};
  host_cuda::meet_warp("ldmatrix_transposed", load_matrices_transposed, &operands, site);
}

inline void copy_async(void* shared, const void* global, bool exists,
                       host_cuda::Site site = host_cuda::Site::here()) {
  host_cuda::start_copy(shared, global, exists, site);
}

inline void commit_copies() {
  host_cuda::commit_copies();
}

template <int pending>
inline void wait_for_copies() {
  host_cuda::wait_for_copies(pending);
}

inline float exp2_approx(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}

inline unsigned char* dynamic_shared_memory() {
  return host_cuda::shared_memory();
}

}  // namespace led::cuda
