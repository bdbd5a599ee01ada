// Tensor cores compute the two products of attention, from tiles in shared memory.
#pragma once

#include <type_traits>

#include "arguments.h"
#include "fragment.cuh"

namespace led::cuda {

// A tile of kRows rows, 8 kRowsPerLane for each of kNumWarps warps, meets tiles of kTileColumns columns.
// These are kBlockM queries and kBlockN keys, or the other way round where dk and dv are computed; in memory
// both are rows of kBlockD elements. With kReloadRows the left operand is read from shared memory for each
// product instead of being kept in registers.
template <class T, int kBlockD_, int kRowsPerLane_, int kTileColumns, int kNumWarps, bool kReloadRows = false>
struct TensorCoreProducts {
  using Element = T;
  static constexpr int kBlockD = kBlockD_;
  static constexpr int kRowsPerLane = kRowsPerLane_;
  static constexpr int kWarpRows = 8 * kRowsPerLane;
  static constexpr int kRows = kNumWarps * kWarpRows;
  static constexpr int kColumns = kTileColumns;
  static constexpr int kThreads = kNumWarps * kWarpSize;
  static constexpr int kStages = 2;
  using Scores = Fragment<kColumns, kRowsPerLane>;
  using Result = Fragment<kBlockD, kRowsPerLane>;

  // A chunk (8 elements, 16 bytes) of a row, where eight rows' chunks lie in different banks. The permutation
  // repeats every 8 rows and every 8 chunks, so that a lane needs few addresses: the rest are constant
  // distances from those.
  template <class Tile>
  static __device__ __forceinline__ Tile* at(Tile* tile, unsigned row, unsigned chunk) {
    constexpr unsigned kPermuted = kChunks < 8 ? kChunks : 8;
    const unsigned permuted = chunk % kPermuted ^ (row / (8 / kPermuted) % kPermuted);
    const unsigned bytes = row * (2 * kBlockD) + chunk / kPermuted * (16 * kPermuted) + permuted * 16;
    using Byte = std::conditional_t<std::is_const_v<Tile>, const char, char>;
    return reinterpret_cast<Tile*>(reinterpret_cast<Byte*>(tile) + bytes);
  }
  // Chunk 2 pair + half of row 16 rows16 + row, for constants rows16 and pair.
  static __device__ __forceinline__ const T* at_pair(const T* tile, int rows16, unsigned row, int pair,
                                                     unsigned half) {
    return at(tile + rows16 * 16 * kBlockD + pair / 4 * 64, row, 2 * (pair % 4) + half);
  }

  // Starts to load kTileRows rows of x from `first` on; zeros from row `stop` on if kHasEnd.
  template <int kTileRows, bool kHasEnd>
  static __device__ __forceinline__ void load(T* tile, const Source& x, int first, int stop) {
    const int chunk = threadIdx.x % kChunks, thread_row = threadIdx.x / kChunks;
    const T* source = static_cast<const T*>(x.data) + x.offset(first + thread_row) + chunk * 8;
    const int64_t stride = static_cast<int64_t>(kRowsAtOnce) * x.row_stride;
#pragma unroll
    for (int i = 0; i < kTileRows; i += kRowsAtOnce) {
      const bool exists = !kHasEnd || first + thread_row + i < stop;
      T* target =
          kRowsAtOnce % 8 == 0 ? at(tile, thread_row, chunk) + i * kBlockD : at(tile, thread_row + i, chunk);
      copy_async(target, exists ? source : x.data, exists);
      source += stride;
    }
  }

  // Does the same for any rows: row_at(i) is the row of x that becomes row i, or -1 for zeros.
  template <int kTileRows, class RowAt>
  static __device__ __forceinline__ void gather(T* tile, const Source& x, RowAt row_at) {
    const int chunk = threadIdx.x % kChunks, thread_row = threadIdx.x / kChunks;
    const T* data = static_cast<const T*>(x.data) + chunk * 8;
#pragma unroll
    for (int i = 0; i < kTileRows; i += kRowsAtOnce) {
      const int row = row_at(thread_row + i);
      copy_async(at(tile, thread_row + i, chunk), data + x.offset(row < 0 ? 0 : row), row >= 0);
    }
  }

  // This warp's rows of a tile are the left operand.
  class Rows {
   public:
    __device__ __forceinline__ void set(const T* tile) {
      tile_ = tile + warp_id() * kWarpRows * kBlockD;
      if constexpr (!kReloadRows) {
#pragma unroll
        for (int k = 0; k < kBlockD / 16; ++k) read(a_[k], k);
      }
    }
    // The elements 16 k ... 16 k + 15 of each row.
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
      const unsigned lane = threadIdx.x % kWarpSize;
#pragma unroll
      for (int m = 0; m < kRowsPerLane / 2; ++m) {
        ldmatrix(a[m], at_pair(tile_, m, lane % 16, k, lane / 16));
      }
    }
    const T* tile_;
    uint32_t a_[kReloadRows ? 1 : kBlockD / 16][kRowsPerLane / 2][4];
  };

  // scores become rows tile^T; tile is [kColumns, kBlockD].
  static __device__ __forceinline__ void multiply_transposed(Scores& scores, const Rows& rows,
                                                             const T* tile) {
    const float zero[4] = {0, 0, 0, 0};
    const unsigned lane = threadIdx.x % kWarpSize, row = lane % 8 + lane / 16 * 8, half = lane / 8 % 2;
#pragma unroll
    for (int k = 0; k < kBlockD / 16; ++k) {
      uint32_t a[kRowsPerLane / 2][4];
      rows.get(a, k);
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n) {
        uint32_t b[4];
        ldmatrix(b, at_pair(tile, n, row, k, half));
#pragma unroll
        for (int m = 0; m < kRowsPerLane / 2; ++m) {
          float (&left)[4] = scores.x[2 * n][m], (&right)[4] = scores.x[2 * n + 1][m];
          if (k == 0) {
            mma<T>(left, a[m], b[0], b[1], zero);
            mma<T>(right, a[m], b[2], b[3], zero);
          } else {
            mma<T>(left, a[m], b[0], b[1], left);
            mma<T>(right, a[m], b[2], b[3], right);
          }
        }
      }
    }
  }

  // result grows by p tile; tile is [kColumns, kBlockD], and p is rounded to T.
  static __device__ __forceinline__ void accumulate(Result& result, const Scores& p, const T* tile) {
    const unsigned lane = threadIdx.x % kWarpSize;
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
      for (int d = 0; d < kBlockD / 16; ++d) {
        uint32_t b[4];
        ldmatrix_transposed(b, at_pair(tile, k, lane % 16, d, lane / 16));
#pragma unroll
        for (int m = 0; m < kRowsPerLane / 2; ++m) {
          mma<T>(result.x[2 * d][m], a[m], b[0], b[1], result.x[2 * d][m]);
          mma<T>(result.x[2 * d + 1][m], a[m], b[2], b[3], result.x[2 * d + 1][m]);
        }
      }
    }
  }

  // These read and write the elements d and d + 1 of a row.
  static __device__ __forceinline__ float2 read_pair(const Source& x, int row, int d) {
    const auto pair = *reinterpret_cast<const uint32_t*>(static_cast<const T*>(x.data) + x.offset(row) + d);
    return make_float2(to_float(T{static_cast<uint16_t>(pair)}),
                       to_float(T{static_cast<uint16_t>(pair >> 16)}));
  }
  static __device__ __forceinline__ void write_pair(const Target& x, int row, int d, float x0, float x1) {
    *reinterpret_cast<uint32_t*>(static_cast<T*>(x.data) + x.offset(row) + d) = pack<T>(x0, x1);
  }

 private:
  static constexpr int kChunks = kBlockD / 8;  // of a row
  static constexpr int kRowsAtOnce = kThreads / kChunks;
  static_assert(kRows % kRowsAtOnce == 0 && kColumns % kRowsAtOnce == 0, "every thread loads as many chunks");
};

}  // namespace led::cuda
