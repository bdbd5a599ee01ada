// The two products of attention on tensor cores, and the tiles in shared memory that feed them.
#pragma once

#include "arguments.h"
#include "fragment.cuh"

namespace led::cuda {

// Tiles of kRows rows, 8 kRowsPerLane for each of kNumWarps warps, against tiles of kTileColumns columns; both are
// rows of head_dim elements in memory. With kReloadRows the left operand is read from shared memory for each product
// instead of being kept in registers.
template <class T, int kHeadDim_, int kRowsPerLane_, int kTileColumns, int kNumWarps, bool kReloadRows = false>
struct TensorCoreProducts {
  using Element = T;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRowsPerLane = kRowsPerLane_;
  static constexpr int kWarpRows = 8 * kRowsPerLane;
  static constexpr int kRows = kNumWarps * kWarpRows;
  static constexpr int kColumns = kTileColumns;
  static constexpr int kThreads = kNumWarps * kWarpSize;
  static constexpr int kStages = 2;
  using Scores = Fragment<kColumns, kRowsPerLane>;
  using Result = Fragment<kHeadDim, kRowsPerLane>;

  // Of chunk c (8 elements, 16 bytes) of a row, so that eight rows' chunks lie in different banks.
  static __device__ __forceinline__ int offset(int row, int chunk) {
    constexpr int kChunksInBanks = kChunks < 8 ? kChunks : 8;
    return row * kHeadDim + (chunk ^ (row / (8 / kChunksInBanks) % kChunksInBanks)) * 8;
  }

  // Starts to load kTileRows rows: row_at(i) is the row of x that becomes row i, or -1 for zeros.
  template <int kTileRows, class RowAt>
  static __device__ __forceinline__ void load(T* tile, const Source& x, RowAt row_at) {
    constexpr int kRowsAtOnce = kThreads / kChunks;
    const int chunk = static_cast<int>(threadIdx.x) % kChunks;
    const T* data = static_cast<const T*>(x.data) + chunk * 8;
#pragma unroll
    for (int first = 0; first < kTileRows; first += kRowsAtOnce) {
      const int i = first + static_cast<int>(threadIdx.x) / kChunks;
      if (kTileRows % kRowsAtOnce != 0 && i >= kTileRows) break;
      const int row = row_at(i);
      copy_async(tile + offset(i, chunk), data + (row < 0 ? 0 : row) * x.row_stride, row >= 0);
    }
  }

  // This warp's rows of a tile, as left operand.
  class Rows {
   public:
    __device__ __forceinline__ void set(const T* tile) {
      tile_ = tile + offset(warp_id() * kWarpRows, 0);
      if constexpr (!kReloadRows) {
#pragma unroll
        for (int k = 0; k < kHeadDim / 16; ++k) read(a_[k], k);
      }
    }
    // Columns 16 k ... 16 k + 15 of head_dim.
    __device__ __forceinline__ void get(uint32_t (&a)[kRowsPerLane / 2][4], int k) const {
      if constexpr (kReloadRows) {
        read(a, k);
      } else {
#pragma unroll
        for (int m = 0; m < kRowsPerLane / 2; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[m][i] = a_[k][m][i];
        }
      }
    }

   private:
    __device__ __forceinline__ void read(uint32_t (&a)[kRowsPerLane / 2][4], int k) const {
#pragma unroll
      for (int m = 0; m < kRowsPerLane / 2; ++m) {
        ldmatrix(a[m], tile_ + offset(m * 16 + lane_id() % 16, 2 * k + lane_id() / 16));
      }
    }
    const T* tile_;
    uint32_t a_[kReloadRows ? 1 : kHeadDim / 16][kRowsPerLane / 2][4];
  };

  // scores = rows tile^T, tile [kColumns, kHeadDim]
  static __device__ __forceinline__ void multiply_transposed(Scores& scores, const Rows& rows, const T* tile) {
    scores.clear();
    const int row = lane_id() % 8 + lane_id() / 16 * 8, chunk = lane_id() / 8 % 2;
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t a[kRowsPerLane / 2][4];
      rows.get(a, k);
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n) {
        uint32_t b[4];
        ldmatrix(b, tile + offset(n * 16 + row, 2 * k + chunk));
#pragma unroll
        for (int m = 0; m < kRowsPerLane / 2; ++m) {
          mma<T>(scores.x[2 * n][m], a[m], b[0], b[1]);
          mma<T>(scores.x[2 * n + 1][m], a[m], b[2], b[3]);
        }
      }
    }
  }

  // result += p tile, tile [kColumns, kHeadDim]; p is rounded to T.
  static __device__ __forceinline__ void accumulate(Result& result, const Scores& p, const T* tile) {
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
      uint32_t a[kRowsPerLane / 2][4];
#pragma unroll
      for (int m = 0; m < kRowsPerLane / 2; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // rows 2m, 2m + 1 of block 2k, then of block 2k + 1
          a[m][i] = pack<T>(p.at(2 * k + i / 2, 2 * m + i % 2, 0), p.at(2 * k + i / 2, 2 * m + i % 2, 1));
        }
      }
#pragma unroll
      for (int d = 0; d < kHeadDim / 16; ++d) {
        uint32_t b[4];
        ldmatrix_transposed(b, tile + offset(k * 16 + lane_id() % 16, 2 * d + lane_id() / 16));
#pragma unroll
        for (int m = 0; m < kRowsPerLane / 2; ++m) {
          mma<T>(result.x[2 * d][m], a[m], b[0], b[1]);
          mma<T>(result.x[2 * d + 1][m], a[m], b[2], b[3]);
        }
      }
    }
  }

  // Elements d, d + 1 of a row.
  static __device__ __forceinline__ float2 read_pair(const Source& x, int64_t row, int d) {
    const auto pair =
        *reinterpret_cast<const uint32_t*>(static_cast<const T*>(x.data) + row * x.row_stride + d);
    return make_float2(to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)}));
  }
  static __device__ __forceinline__ void write_pair(const Target& x, int64_t row, int d, float x0, float x1) {
    *reinterpret_cast<uint32_t*>(static_cast<T*>(x.data) + row * x.row_stride + d) = pack<T>(x0, x1);
  }

 private:
  static constexpr int kChunks = kHeadDim / 8;
};

}  // namespace led::cuda
