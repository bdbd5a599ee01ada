// Multiply-adds in fp32 compute the two products of attention, for any dtype, alignment and head_dim up to
// kBlockD.
#pragma once

#include "arguments.h"
#include "fragment.cuh"

namespace led::cuda {

// Members are as in TensorCoreProducts. Tiles in shared memory are fp32, with zeros past head_dim.
template <int kBlockD_, int kRowsPerLane_, int kTileColumns, int kNumWarps>
struct FmaProducts {
  using Element = float;
  static constexpr int kBlockD = kBlockD_;
  static constexpr int kRowsPerLane = kRowsPerLane_;
  static constexpr int kWarpRows = 8 * kRowsPerLane;
  static constexpr int kRows = kNumWarps * kWarpRows;
  static constexpr int kColumns = kTileColumns;
  static constexpr int kThreads = kNumWarps * kWarpSize;
  static constexpr int kStages = 1;
  using Scores = Fragment<kColumns, kRowsPerLane>;
  using Result = Fragment<kBlockD, kRowsPerLane>;

  // Groups of four elements are permuted, so that eight rows' groups lie in different banks.
  static __device__ __forceinline__ int at(int row, int d) {
    return row * kBlockD + ((d / 4) ^ (row % 8)) * 4 + d % 4;
  }

  template <int kTileRows, bool kHasEnd>
  static __device__ __forceinline__ void load(float* tile, const Source& x, int first, int stop) {
    gather<kTileRows>(tile, x, [&](int i) { return kHasEnd && first + i >= stop ? -1 : first + i; });
  }
  template <int kTileRows, class RowAt>
  static __device__ __forceinline__ void gather(float* tile, const Source& x, RowAt row_at) {
    constexpr int kBatch = 8;  // loads under way at once
    static_assert(kTileRows * kBlockD % (kBatch * kThreads) == 0, "every thread loads as many elements");
#pragma unroll 1
    for (int first = static_cast<int>(threadIdx.x); first < kTileRows * kBlockD; first += kBatch * kThreads) {
      float loaded[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int i = first + j * kThreads, row = row_at(i / kBlockD), d = i % kBlockD;
        loaded[j] = row >= 0 && d < x.head_dim ? read(x, x.offset(row) + d) : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int i = first + j * kThreads;
        tile[at(i / kBlockD, i % kBlockD)] = loaded[j];
      }
    }
  }

  class Rows {
   public:
    __device__ __forceinline__ void set(const float* tile) { tile_ = tile + warp_id() * kWarpRows * kBlockD; }
    // Returns the elements d ... d + 3 of this lane's row r; d is a multiple of 4.
    __device__ __forceinline__ float4 get(int r, int d) const {
      return *reinterpret_cast<const float4*>(tile_ + at(lane_group() + 8 * r, d));
    }

   private:
    const float* tile_;
  };

  static __device__ __forceinline__ void multiply_transposed(Scores& scores, const Rows& rows,
                                                             const float* tile) {
    scores.clear();
#pragma unroll 2
    for (int d = 0; d < kBlockD; d += 4) {
      float4 a[kRowsPerLane];
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r) a[r] = rows.get(r, d);
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = 8 * n + 2 * lane_in_group() + e;
          const float4 b = *reinterpret_cast<const float4*>(tile + at(column, d));
#pragma unroll
          for (int r = 0; r < kRowsPerLane; ++r) {
            float& sum = scores.at(n, r, e);
            sum = fmaf(a[r].x, b.x, sum);
            sum = fmaf(a[r].y, b.y, sum);
            sum = fmaf(a[r].z, b.z, sum);
            sum = fmaf(a[r].w, b.w, sum);
          }
        }
      }
    }
  }

  static __device__ __forceinline__ void accumulate(Result& result, const Scores& p, const float* tile) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll 1
      for (int i = 0; i < 8; ++i) {  // a column of the block: element i % 2 of the group's lane i / 2
        float factor[kRowsPerLane];
#pragma unroll
        for (int r = 0; r < kRowsPerLane; ++r) {
          factor[r] =
              __shfl_sync(kAllLanes, i % 2 == 0 ? p.at(n, r, 0) : p.at(n, r, 1), lane_id() / 4 * 4 + i / 2);
        }
#pragma unroll
        for (int d = 0; d < kBlockD / 8; ++d) {
          const float2 b =
              *reinterpret_cast<const float2*>(tile + at(8 * n + i, 8 * d + 2 * lane_in_group()));
#pragma unroll
          for (int r = 0; r < kRowsPerLane; ++r) {
            result.at(d, r, 0) = fmaf(factor[r], b.x, result.at(d, r, 0));
            result.at(d, r, 1) = fmaf(factor[r], b.y, result.at(d, r, 1));
          }
        }
      }
    }
  }

  static __device__ __forceinline__ float2 read_pair(const Source& x, int row, int d) {
    const int64_t i = x.offset(row) + d;
    return make_float2(d < x.head_dim ? read(x, i) : 0.0f, d + 1 < x.head_dim ? read(x, i + 1) : 0.0f);
  }
  static __device__ __forceinline__ void write_pair(const Target& x, int row, int d, float x0, float x1) {
    const int64_t i = x.offset(row) + d;
    if (d < x.head_dim) write(x, i, x0);
    if (d + 1 < x.head_dim) write(x, i + 1, x1);
  }

 private:
  static __device__ __forceinline__ float read(const Source& x, int64_t i) {
    if (x.dtype == DType::kFloat32) return static_cast<const float*>(x.data)[i];
    if (x.dtype == DType::kFloat16) return to_float(static_cast<const Half*>(x.data)[i]);
    return to_float(static_cast<const BFloat16*>(x.data)[i]);
  }
  static __device__ __forceinline__ void write(const Target& x, int64_t i, float value) {
    if (x.dtype == DType::kFloat32) {
      static_cast<float*>(x.data)[i] = value;
    } else if (x.dtype == DType::kFloat16) {
      static_cast<Half*>(x.data)[i] = from_float<Half>(value);
    } else {
      static_cast<BFloat16*>(x.data)[i] = from_float<BFloat16>(value);
    }
  }
};

}  // namespace led::cuda
