// What the kernels take from the hardware, each as one function: 16-bit floats, tensor-core products,
// ldmatrix, asynchronous copies, the fast exponential. Source: PTX ISA, "Matrix fragments for mma.m16n8k16".
//
// Without nvcc the bodies come from tests/emulation/host_cuda, which executes the kernels on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace led::cuda {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

constexpr unsigned kWarpSize = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

}  // namespace led::cuda

#if !defined(__CUDACC__)
  #include "host_primitives.h"
#else

namespace led::cuda {

__device__ __forceinline__ float to_float(float x) {
  return x;
}

__device__ __forceinline__ float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

__device__ __forceinline__ float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float x);

template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}

template <>
__device__ __forceinline__ Half from_float<Half>(float x) {
  Half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  BFloat16 y;
  #if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  #else
  const uint32_t bits = __float_as_uint(x);
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  y.bits = static_cast<uint16_t>(is_nan ? 0x7FFFu : (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
  #endif
  return y;
}

// Packs two neighbors, `low` at the lower address.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<Half>(float low, float high) {
  uint32_t y;
  #if __CUDA_ARCH__ >= 800
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  #else
  y = from_float<Half>(low).bits | static_cast<uint32_t>(from_float<Half>(high).bits) << 16;
  #endif
  return y;
}

template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  uint32_t y;
  #if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  #else
  y = from_float<BFloat16>(low).bits | static_cast<uint32_t>(from_float<BFloat16>(high).bits) << 16;
  #endif
  return y;
}

// d[16, 8] = a[16, 16] b[16, 8] + c[16, 8]. With g = lane / 4 and t = lane % 4 a lane holds
//   d at (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1), and so c, which may be d;
//   a, in pairs, from (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8);
//   b, in pairs down its columns, from (2t, g) as b0 and (2t + 8, g) as b1.
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                    const float (&c)[4]);

template <>
__device__ __forceinline__ void mma<Half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                          const float (&c)[4]) {
  #if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),
        "f"(c[3]));
  #else
  asm("{\n"
      ".reg .f32 x0, x1, x2, x3;\n"
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {x0,x1,x2,x3}, {%4,%5}, {%8}, {%10,%11,%12,%13};\n"
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%6,%7}, {%9}, {x0,x1,x2,x3};\n"
      "}"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),
        "f"(c[3]));
  #endif
}

template <>
__device__ __forceinline__ void mma<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                              const float (&c)[4]) {
  #if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),
        "f"(c[3]));
  #elif defined(__CUDA_ARCH__)
  __trap();  // refused before the launch
  __builtin_unreachable();
  #endif
}

// Loads four 8x8 matrices of 16-bit elements. Lane 8 m + i gives the address of row i of matrix m, 16 bytes
// in shared memory; r[m] holds elements (g, 2t), (g, 2t + 1) of matrix m.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Does the same, but r[m] holds elements (2t, g), (2t + 1, g) of matrix m.
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Copies 16 bytes from global to shared memory, or writes zeros. What arrives may be read after the wait for
// its group and a barrier. On sm_75, which has no asynchronous copies, it arrives at once.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool exists) {
  #if __CUDA_ARCH__ >= 800
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(exists ? 16 : 0)
               : "memory");
  #else
  *static_cast<uint4*>(shared) = exists ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
  #endif
}

__device__ __forceinline__ void commit_copies() {
  #if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
  #endif
}

// Waits until at most `pending` of this thread's groups are under way.
template <int pending>
__device__ __forceinline__ void wait_for_copies() {
  #if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
  #endif
}

// Returns 2^x, which is 0 for -inf.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Returns the memory that the launch reserved, aligned to 128 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  return shared_memory;
}

}  // namespace led::cuda

#endif
