// What global attention's kernels share: rows are slots of global_index, columns the keys of one split.
#pragma once

#include "column_tiles.cuh"
#include "dropout.cuh"

namespace led::cuda {

// Slots slot_start + 0 ... P::kRows - 1 against the keys of one split.
template <class P>
struct GlobalTiles {
  int split, slot_start;
  int start, stop;  // keys

  __device__ __forceinline__ GlobalTiles(const Arguments& a, const Sequence& seq) {
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

// The position of a slot's token; any where the slot is not in use.
__device__ __forceinline__ int position_of_slot(const Sequence& seq, int slot) {
  return slot < seq.num_globals ? seq.global_index[slot] : 0;
}

// Results of splits: [batch, heads, num_splits, max_globals, row_size] floats.
__device__ __forceinline__ float* split_rows(const Arguments& a, const Sequence& seq, int split,
                                             int64_t row_size) {
  const int64_t first = ((seq.batch * a.p.heads + seq.head) * a.num_splits + split) * a.p.mask.max_globals;
  return a.partials + first * row_size;
}

// How many splits hold keys.
__device__ __forceinline__ int splits_with_keys(const Arguments& a, const Sequence& seq) {
  return (seq.length + a.split_size - 1) / a.split_size;
}

}  // namespace led::cuda
