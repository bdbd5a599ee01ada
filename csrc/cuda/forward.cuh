// The forward of a thread block's tile of queries: online softmax (Milakov and Gimelshein, 2018; Dao,
// "FlashAttention-2", 2023).
#pragma once

#include "dropout.cuh"
#include "fma.cuh"
#include "masks.cuh"
#include "tensor_core.cuh"
#include "tile_io.cuh"

namespace led::cuda {

// The running maximum of a row that has seen no key. It is finite, so that no difference of maxima is inf -
// inf.
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

  // Turns scores into probabilities.
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

// The tile's queries attend to a tile of keys and values: acc grows by dropout(softmax(q k^T)) v.
// mask(scores) sets what does not count to -inf; keep() gives dropout's bits.
template <class P, class Mask, class Keep>
__device__ __forceinline__ void attend(OnlineSoftmax<P>& softmax, const typename P::Rows& q,
                                       const typename P::Element* k, const typename P::Element* v,
                                       float qk_scale, Mask mask, bool has_dropout, Keep keep) {
  typename P::Scores scores;
  P::multiply_transposed(scores, q, k);
  mask(scores);
  softmax.update(scores, qk_scale);
  if (has_dropout) keep_elements(scores, keep(), 0.0f);
  P::accumulate(softmax.acc, scores, v);
}

// The rows row_start ... row_stop - 1 of q attend to all keys that the block visits. keep(tile) gives
// dropout's bits.
template <class P, bool kMayDrop, class Keep>
__device__ __forceinline__ void attend_tiles(OnlineSoftmax<P>& softmax, const Arguments& a,
                                             const Sequence& seq, const HeadInputs& in, int row_start,
                                             int row_stop, const RowBands<P::kRowsPerLane>& bands,
                                             TileWalk<P::kColumns> tiles, Keep keep) {
  using Shared = SharedTiles<P, 1>;
  const bool has_padding = seq.has_padding(tiles.start, tiles.stop);
  if (has_padding) tiles.mask_all();
  P::template load<P::kRows, true>(Shared::rows(0), in.q, row_start, row_stop);
  typename P::Rows q_rows;
  for_each_tile<P::kStages>(
      tiles,
      [&](const Tile& tile, auto is_masked, int stage) {
        load_keys<P, Shared, decltype(is_masked)::value>(in.k, in.v, tile, stage, tiles.stop, seq,
                                                         has_padding);
      },
      [&] { q_rows.set(Shared::rows(0)); },
      [&](const Tile& tile, auto is_masked, int stage) {
        attend<P>(
            softmax, q_rows, Shared::columns(0, stage), Shared::columns(1, stage), a.qk_scale,
            [&](typename P::Scores& scores) {
              if constexpr (decltype(is_masked)::value) mask_scores(scores, tile, bands, seq, has_padding);
            },
            kMayDrop && a.has_dropout(), [&] { return keep(tile); });
      });
}

}  // namespace led::cuda
