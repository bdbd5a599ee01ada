// Global attention and the gradients of global keys have few rows, slots of global_index. The tokens that
// these meet are therefore split among thread blocks, and what the splits found is summed.
#pragma once

#include "arguments.h"
#include "fragment.cuh"
#include "masks.cuh"
#include "tile_walk.cuh"

namespace led::cuda {

// A thread block's rows are the slots from slot_start on, its split the tokens start ... stop - 1.
template <class P>
struct SplitBlock {
  int split, slot_start;
  int start, stop;

  __device__ __forceinline__ SplitBlock(const Arguments& a, const Sequence& seq) {
    static_assert(kSplitUnit % P::kColumns == 0,
                  "splits are whole tiles, or padding behind them would be loaded");
    split = static_cast<int>(blockIdx.x) % a.num_splits;
    slot_start = static_cast<int>(blockIdx.x) / a.num_splits * P::kRows;
    start = split * a.split_size;
    stop = min(start + a.split_size, seq.length);
  }
  __device__ __forceinline__ bool is_empty(const Sequence& seq) const {
    return start >= stop || slot_start >= seq.num_globals;
  }
  // The slot that the lane's row r is.
  __device__ __forceinline__ int slot(int r) const { return warp_row<P>(slot_start) + lane_group() + 8 * r; }
  // The split's tokens are the columns, and every row sees all of them.
  __device__ __forceinline__ TileWalk<P::kColumns> tiles() const { return {start, stop}; }
  __device__ __forceinline__ RowBands<P::kRowsPerLane> bands() const {
    return {Band{0, stop, stop}, [](int) { return 0; }};
  }
};

// What splits found are rows of floats, [batch, heads, num_splits, max_globals, row_size] for each operand.
__device__ __forceinline__ float* split_rows(const Arguments& a, const Sequence& seq, int operand, int split,
                                             int64_t row_size) {
  const int64_t sequences = a.call.batch * a.call.heads;
  const int64_t sequence = operand * sequences + seq.batch * a.call.heads + seq.head;
  return a.partials + (sequence * a.num_splits + split) * a.call.mask.max_globals * row_size;
}

// Writes x to row(r) of a split's rows of row_size floats, if that is below num_rows.
template <class P, class RowAt>
__device__ __forceinline__ void write_partial(float* data, int64_t row_size, int head_dim,
                                              const typename P::Result& x, int num_rows, RowAt row) {
#pragma unroll
  for (int r = 0; r < P::kRowsPerLane; ++r) {
    if (row(r) >= num_rows) continue;
#pragma unroll
    for (int n = 0; n < P::kBlockD / 8; ++n) {
      float* pair = data + row(r) * row_size + 8 * n + 2 * lane_in_group();
      if (8 * n + 2 * lane_in_group() < head_dim) pair[0] = x.at(n, r, 0);
      if (8 * n + 2 * lane_in_group() + 1 < head_dim) pair[1] = x.at(n, r, 1);
    }
  }
}

// What the splits that hold tokens found of one slot: rows that lie `stride` floats apart. There are none of
// a slot that is not in use.
struct SlotPartials {
  const float* rows;
  int64_t stride;
  int num_splits;

  __device__ __forceinline__ SlotPartials(const Arguments& a, const Sequence& seq, int operand, int slot,
                                          int64_t row_size) {
    rows = split_rows(a, seq, operand, 0, row_size) + slot * row_size;
    stride = a.call.mask.max_globals * row_size;
    num_splits = slot < seq.num_globals ? (seq.length + a.split_size - 1) / a.split_size : 0;
  }
};

// Writes scale times the sum of a slot's partial rows, each times weight(partial row), to a row of a tensor.
// The thread block is one warp.
template <class P, class Weight>
__device__ __forceinline__ void sum_splits(const SlotPartials& partials, const Target& target, int row,
                                           float scale, Weight weight) {
  for (int d = 2 * lane_id(); d < target.head_dim; d += 2 * static_cast<int>(kWarpSize)) {
    const bool is_pair = d + 1 < target.head_dim;
    float x0 = 0, x1 = 0;
#pragma unroll 8
    for (int split = 0; split < partials.num_splits; ++split) {
      const float* partial = partials.rows + split * partials.stride;
      const float w = weight(partial);
      x0 = fmaf(partial[d], w, x0);
      if (is_pair) x1 = fmaf(partial[d + 1], w, x1);
    }
    P::write_pair(target, row, d, x0 * scale, x1 * scale);
  }
}

}  // namespace led::cuda
