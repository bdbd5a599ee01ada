// One tile of the forward: online softmax (Milakov and Gimelshein, 2018; Dao, "FlashAttention-2", 2023).
#pragma once

#include "column_tiles.cuh"
#include "dropout.cuh"
#include "fma.cuh"
#include "tensor_core.cuh"

namespace led::cuda {

// The running maximum of a row that has seen no key: finite, so that no difference of maxima is inf - inf.
constexpr float kNoKey = -3.0e38f;
// Probabilities are relative to a maximum that may be 2^kSlack too small: few tiles then rescale the sums.
constexpr float kSlack = 8;

template <class P>
struct OnlineSoftmax {
  static constexpr int kRowsPerLane = P::kRowsPerLane;

  typename P::Result acc;       // without dropout's scale
  float row_max[kRowsPerLane];  // in units of log2
  float row_sum[kRowsPerLane];  // this lane's share

  __device__ __forceinline__ OnlineSoftmax() {
    acc.clear();
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) {
      row_max[r] = kNoKey;
      row_sum[r] = 0;
    }
  }

  // scores become probabilities.
  __device__ __forceinline__ void update(typename P::Scores& scores, float qk_scale) {
    float rescale[kRowsPerLane];
    bool has_grown = false;
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) {
      float tile_max = fmaxf(scores.at(0, r, 0), scores.at(0, r, 1));
#pragma unroll
      for (int n = 1; n < P::Scores::kBlocks; ++n) {
        tile_max = fmaxf(fmaxf(tile_max, scores.at(n, r, 0)), scores.at(n, r, 1));
      }
      tile_max = row_max_of(tile_max) * qk_scale;
      const bool grows = tile_max > row_max[r] + kSlack;
      const float new_max = grows ? tile_max : row_max[r];
      rescale[r] = exp2_approx(row_max[r] - new_max);
      row_max[r] = new_max;
      has_grown |= grows;
    }
    if (__any_sync(kAllLanes, has_grown)) {
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r) {
        row_sum[r] *= rescale[r];
#pragma unroll
        for (int n = 0; n < P::Result::kBlocks; ++n) {
          acc.at(n, r, 0) *= rescale[r];
          acc.at(n, r, 1) *= rescale[r];
        }
      }
    }
#pragma unroll
    for (int n = 0; n < P::Scores::kBlocks; ++n) {
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float p = exp2_approx(fmaf(scores.at(n, r, e), qk_scale, -row_max[r]));
          scores.at(n, r, e) = p;
          row_sum[r] += p;
        }
      }
    }
  }

  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) row_sum[r] = row_sum_of(row_sum[r]);
  }
};

}  // namespace led::cuda
