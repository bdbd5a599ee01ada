// Rows see some of the columns; the scores of the others are masked.
#pragma once

#include "arguments.h"
#include "fragment.cuh"
#include "tile_walk.cuh"

namespace led::cuda {

// Whether `holds` of one of the positions start ... stop - 1; all threads of the block ask together.
template <class Predicate>
__device__ __forceinline__ bool any_position(int start, int stop, Predicate holds) {
  bool found = false;
  for (int i = start + static_cast<int>(threadIdx.x); i < stop; i += static_cast<int>(blockDim.x)) {
    found |= holds(i);
  }
  return __syncthreads_or(found) != 0;
}

// The same value in all lanes, which the compiler then knows: a branch on another one costs the loops in it
// their uniform registers.
__device__ __forceinline__ bool uniform(bool x) {
  return __shfl_sync(kAllLanes, static_cast<int>(x), 0) != 0;
}

// Each of a lane's rows sees the columns lower ... lower + width.
template <int kRowsPerLane>
struct RowBands {
  int lower[kRowsPerLane];
  unsigned width[kRowsPerLane];

  // The lane's row r lies at position row(r).
  template <class RowAt>
  __device__ __forceinline__ RowBands(const Band& band, RowAt row) {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) {
      lower[r] = row(r) - band.before;
      width[r] = static_cast<unsigned>(min(row(r) + band.after, band.num_columns - 1) - lower[r]);
    }
  }

  __device__ __forceinline__ bool holds(int r, int column) const {
    return static_cast<unsigned>(column - lower[r]) <= width[r];
  }
};

// Scores become -inf where a row does not see a column. In a tile of global keys, a key counts where it lies
// outside of the row's band, which holds it otherwise. Padding is looked for if has_padding.
template <int kColumns, int kRowsPerLane>
__device__ __forceinline__ void mask_scores(Fragment<kColumns, kRowsPerLane>& scores, const Tile& tile,
                                            const RowBands<kRowsPerLane>& bands, const Sequence& seq,
                                            bool has_padding) {
  const int column = tile.start + 2 * lane_in_group();  // of element (0, 0)
  if (!tile.is_global && !has_padding) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (!bands.holds(r, column + 8 * n + e)) scores.at(n, r, e) = -INFINITY;
        }
      }
    }
    return;
  }
  ElementBits seen = 0;
#pragma unroll 1
  for (int i = 0; i < kColumns / 4; ++i) {  // the lane's columns
    const int n = i / 2, e = i % 2;
    int position = column + 8 * n + e;  // of a tile of global keys: the slot, then its position
    bool exists;
    if (tile.is_global) {
      position = seq.position(position, -1);
      exists = position >= 0;
    } else {
      exists = position < seq.length && seq.token_kind[position] != kPadding;
    }
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) {
      const bool sees = exists && bands.holds(r, position) != tile.is_global;
      seen |= static_cast<ElementBits>(sees) << ((n * kRowsPerLane + r) * 2 + e);
    }
  }
  keep_elements(scores, seen, -INFINITY);
}

}  // namespace led::cuda
