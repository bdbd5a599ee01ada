// A fragment is a matrix that a warp holds in registers, laid out as results of tensor-core products are.
#pragma once

#include "primitives.cuh"

namespace led::cuda {

// These are unsigned until the end, so that divisions are shifts.
__device__ __forceinline__ int lane_id() {
  return static_cast<int>(threadIdx.x % kWarpSize);
}
// Fragments count lanes as 4 g + t: this is g, and the next function t.
__device__ __forceinline__ int lane_group() {
  return static_cast<int>(threadIdx.x % kWarpSize / 4);
}
__device__ __forceinline__ int lane_in_group() {
  return static_cast<int>(threadIdx.x % 4);
}
__device__ __forceinline__ int warp_id() {
  return static_cast<int>(threadIdx.x / kWarpSize);
}

// A tile that starts at tile_start is divided among warps; this is the first row of this one.
template <class P>
__device__ __forceinline__ int warp_row(int tile_start) {
  return tile_start + warp_id() * P::kWarpRows;
}

// A matrix [8 kRowsPerLane, kColumns]: lane (g, t) holds rows g + 8 r at columns 8 n + 2 t + e, e = 0, 1.
template <int kColumns, int kRowsPerLane>
struct Fragment {
  static constexpr int kBlocks = kColumns / 8;
  // Block n, pair of rows m: (2m, 0), (2m, 1), (2m + 1, 0), (2m + 1, 1) are one result of a tensor core.
  float x[kBlocks][(kRowsPerLane + 1) / 2][kRowsPerLane == 1 ? 2 : 4];

  __device__ __forceinline__ float& at(int n, int r, int e) { return x[n][r / 2][r % 2 * 2 + e]; }
  __device__ __forceinline__ float at(int n, int r, int e) const { return x[n][r / 2][r % 2 * 2 + e]; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r) at(n, r, 0) = at(n, r, 1) = 0;
    }
  }
};

// Bit (n * kRowsPerLane + r) * 2 + e is that of a fragment's element (n, r, e).
using ElementBits = uint64_t;

// Elements whose bit is not set become `other`.
template <int kColumns, int kRowsPerLane>
__device__ __forceinline__ void keep_elements(Fragment<kColumns, kRowsPerLane>& x, ElementBits keep,
                                              float other) {
  static_assert(kColumns / 4 * kRowsPerLane <= 64, "one bit for each element");
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if ((keep >> ((n * kRowsPerLane + r) * 2 + e) & 1) == 0) x.at(n, r, e) = other;
      }
    }
  }
}

// These reduce over the four lanes that hold a row.
__device__ __forceinline__ float row_max_of(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ __forceinline__ float row_sum_of(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// These do the same over all lanes of the warp.
__device__ __forceinline__ float warp_max_of(float x) {
#pragma unroll
  for (unsigned distance = kWarpSize / 2; distance > 0; distance /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, static_cast<int>(distance)));
  }
  return x;
}
__device__ __forceinline__ float warp_sum_of(float x) {
#pragma unroll
  for (unsigned distance = kWarpSize / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, static_cast<int>(distance));
  }
  return x;
}

}  // namespace led::cuda
