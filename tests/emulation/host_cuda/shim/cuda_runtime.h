// What the kernels and their launches use of CUDA, for g++: one device of compute capability 8.0, whose
// threads are fibers of the process.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <type_traits>

#include "execution.h"

#define __global__
#define __device__
#define __host__
#if defined(__SANITIZE_ADDRESS__)
  #define __forceinline__ inline  // instrumented, all of a kernel in one function takes minutes to compile
#else
  #define __forceinline__ inline __attribute__((always_inline))
#endif
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#if !defined(__restrict__)
  #define __restrict__ __restrict
#endif

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
inline int2 make_int2(int x, int y) {
  return {x, y};
}
inline int4 make_int4(int x, int y, int z, int w) {
  return {x, y, z, w};
}
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

// Arithmetic

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}

template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline int __float_as_int(float x) {
  return static_cast<int>(__float_as_uint(x));
}
inline float __int_as_float(int bits) {
  return __uint_as_float(static_cast<unsigned>(bits));
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline float __fmaf_rn(float a, float b, float c) {
  return fmaf(a, b, c);
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}
inline int __clz(int bits) {
  return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits));
}

template <class T>
inline T __ldg(const T* address) {
  return *address;
}

// Threads that meet. Only whole warps do.

namespace host_cuda {

template <class T>
struct Exchange {
  T value;
  int source;
  T result;
};

template <class T>
T exchange(const char* instruction, unsigned lanes, T value, int source, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  if (lanes != 0xFFFFFFFFu) fail(std::string(instruction) + ": only whole warps meet here", site);
  Exchange<T> mine{value, source, value};
  const Operation operation = [](void* const* operands) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      auto* to = static_cast<Exchange<T>*>(operands[lane]);
      to->result = static_cast<const Exchange<T>*>(operands[to->source])->value;
    }
  };
  meet_warp(instruction, operation, &mine, site);
  return mine.result;
}

inline unsigned ballot(const char* instruction, unsigned lanes, bool predicate, Site site) {
  if (lanes != 0xFFFFFFFFu) fail(std::string(instruction) + ": only whole warps meet here", site);
  struct Vote {
    bool mine;
    unsigned all;
  };
  Vote vote{predicate, 0};
  const Operation operation = [](void* const* operands) {
    unsigned all = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      all |= static_cast<unsigned>(static_cast<const Vote*>(operands[lane])->mine) << lane;
    }
    for (int lane = 0; lane < kWarpSize; ++lane) static_cast<Vote*>(operands[lane])->all = all;
  };
  meet_warp(instruction, operation, &vote, site);
  return vote.all;
}

}  // namespace host_cuda

template <class T>
T __shfl_sync(unsigned lanes, T value, int source, host_cuda::Site site = host_cuda::Site::here()) {
  return host_cuda::exchange("__shfl_sync", lanes, value, source & 31, site);
}

template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int distance, host_cuda::Site site = host_cuda::Site::here()) {
  const int lane = static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) & 31;
  return host_cuda::exchange("__shfl_xor_sync", lanes, value, (lane ^ distance) & 31, site);
}

inline unsigned __ballot_sync(unsigned lanes, int predicate, host_cuda::Site site = host_cuda::Site::here()) {
  return host_cuda::ballot("__ballot_sync", lanes, predicate != 0, site);
}

inline int __any_sync(unsigned lanes, int predicate, host_cuda::Site site = host_cuda::Site::here()) {
  return host_cuda::ballot("__any_sync", lanes, predicate != 0, site) != 0;
}

inline int __all_sync(unsigned lanes, int predicate, host_cuda::Site site = host_cuda::Site::here()) {
  return host_cuda::ballot("__all_sync", lanes, predicate != 0, site) == 0xFFFFFFFFu;
}

inline void __syncwarp(unsigned lanes = 0xFFFFFFFFu, host_cuda::Site site = host_cuda::Site::here()) {
  host_cuda::ballot("__syncwarp", lanes, false, site);
}

inline void __syncthreads(host_cuda::Site site = host_cuda::Site::here()) {
  host_cuda::meet_block(false, site);
}

inline int __syncthreads_or(int predicate, host_cuda::Site site = host_cuda::Site::here()) {
  return host_cuda::meet_block(predicate != 0, site);
}

[[noreturn]] inline void __trap(host_cuda::Site site = host_cuda::Site::here()) {
  host_cuda::fail("trap", site);
}

// The runtime

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
using cudaStream_t = struct CUstream_st*;

namespace host_cuda {

constexpr size_t kSharedBytes = 48 << 10;  // without asking for more
constexpr size_t kSharedBytesOptIn = 163 << 10;

inline cudaError_t last_error = cudaSuccess;

inline cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// By the kernel's address.
inline std::map<const void*, size_t> reserved_shared_bytes;

}  // namespace host_cuda

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = host_cuda::last_error;
  host_cuda::last_error = cudaSuccess;
  return error;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
  }
  return "unrecognized error code";
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  return host_cuda::remember(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return host_cuda::remember(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 108;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(host_cuda::kSharedBytesOptIn);
      return cudaSuccess;
  }
  return host_cuda::remember(cudaErrorInvalidValue);
}

template <class Argument>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Argument), cudaFuncAttribute, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > host_cuda::kSharedBytesOptIn) {
    return host_cuda::remember(cudaErrorInvalidValue);
  }
  host_cuda::reserved_shared_bytes[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

template <class Argument>
cudaError_t cudaLaunchKernel(void (*kernel)(Argument), dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
  const unsigned threads = block.x * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535 ||
      threads == 0 || threads > 1024 || threads % host_cuda::kWarpSize != 0) {
    return host_cuda::remember(cudaErrorInvalidConfiguration);
  }
  const size_t reserved = host_cuda::reserved_shared_bytes[reinterpret_cast<const void*>(kernel)];
  if (shared_bytes > max(host_cuda::kSharedBytes, reserved)) {
    return host_cuda::remember(cudaErrorInvalidValue);
  }
  struct Call {
    void (*kernel)(Argument);
    const Argument* argument;
  };
  const Call call{kernel, static_cast<const Argument*>(arguments[0])};
  const auto run = [](const void* context) {
    const Call& call = *static_cast<const Call*>(context);
    call.kernel(*call.argument);
  };
  host_cuda::run_grid(grid, block, shared_bytes, run, &call);
  return cudaSuccess;
}
