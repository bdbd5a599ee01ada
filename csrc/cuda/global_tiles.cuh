// Rows that are slots of global_index, against one split of a sequence's tokens: global attention, and the
// gradients of global keys.
#pragma once

#include "column_tiles.cuh"
#include "dropout.cuh"

namespace led::cuda {

// Slots slot_start ... slot_start + P::kRows - 1 against the tokens start ... stop - 1.
template <class P>
struct GlobalTiles {
  int split, slot_start;
  int start, stop;

  __device__ __forceinline__ GlobalTiles(const Arguments& a, const Sequence& seq) {
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
  // The slot of this lane's row r.
  __device__ __forceinline__ int slot(int r) const {
    return slot_start + warp_id() * P::kWarpRows + lane_group() + 8 * r;
  }
};

// What splits found: rows of floats, [batch, heads, num_splits, max_globals, row_size] for each operand.
__device__ __forceinline__ float* split_rows(const Arguments& a, const Sequence& seq, int operand, int split,
                                             int64_t row_size) {
  const int64_t sequences = a.p.batch * a.p.heads;
  const int64_t sequence = operand * sequences + seq.batch * a.p.heads + seq.head;
  return a.partials + (sequence * a.num_splits + split) * a.p.mask.max_globals * row_size;
}

// How many splits hold columns.
__device__ __forceinline__ int splits_in_use(const Arguments& a, const Sequence& seq) {
  return (seq.length + a.split_size - 1) / a.split_size;
}

}  // namespace led::cuda
