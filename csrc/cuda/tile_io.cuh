// Tiles get from tensors into shared memory, and results from registers into tensors.
#pragma once

#include "arguments.h"
#include "fragment.cuh"
#include "tile_walk.cuh"

namespace led::cuda {

// Shared memory holds kRowOperands tiles of rows, and behind them two tiles of columns in each stage.
template <class P, int kRowOperands>
struct SharedTiles {
  using Element = typename P::Element;
  static constexpr int kRowElements = P::kRows * P::kBlockD, kColumnElements = P::kColumns * P::kBlockD;
  static constexpr size_t kBytes =
      sizeof(Element) * (kRowOperands * kRowElements + 2 * P::kStages * kColumnElements);
  static_assert(kBytes <= 64 * 1024, "what a block of sm_75 can have");

  static __device__ __forceinline__ Element* rows(int operand) {
    return reinterpret_cast<Element*>(dynamic_shared_memory()) + operand * kRowElements;
  }
  static __device__ __forceinline__ Element* columns(int operand, int stage) {
    return rows(kRowOperands) + (2 * stage + operand) * kColumnElements;
  }
};

// Starts to load the keys and values from row_start on as the block's tiles of rows.
template <class P, class Shared>
__device__ __forceinline__ void load_key_rows(const AttentionCall& call, const Sequence& seq, int row_start) {
  P::template load<P::kRows, true>(Shared::rows(0), seq.source(call.k, call, seq.first_row), row_start,
                                   seq.length);
  P::template load<P::kRows, true>(Shared::rows(1), seq.source(call.v, call, seq.first_row), row_start,
                                   seq.length);
}

// Loads a tile of keys and their values into the stage, with zeros from `stop` on, and in place of padding if
// has_padding. Nobody knows whether the keys from `stop` on are padding, and 0 times a NaN of padding is NaN.
template <class P, class Shared, bool kIsMasked>
__device__ __forceinline__ void load_keys(const Source& k, const Source& v, const Tile& tile, int stage,
                                          int stop, const Sequence& seq, bool has_padding) {
  if (kIsMasked && (tile.is_global || has_padding)) {
    auto row_at = [&](int i) {
      const int key = tile.start + i;  // or its slot
      if (tile.is_global) return seq.position(key, -1);
      return key < stop && seq.token_kind[key] != kPadding ? key : -1;
    };
    P::template gather<P::kColumns>(Shared::columns(0, stage), k, row_at);
    P::template gather<P::kColumns>(Shared::columns(1, stage), v, row_at);
  } else {
    P::template load<P::kColumns, kIsMasked>(Shared::columns(0, stage), k, tile.start, stop);
    P::template load<P::kColumns, kIsMasked>(Shared::columns(1, stage), v, tile.start, stop);
  }
}

// Loads a tile of queries and their d_out into the stage, with zeros from `stop` on, and in place of other
// than local tokens if has_others.
template <class P, class Shared, bool kIsMasked>
__device__ __forceinline__ void load_queries(const Source& q, const Source& d_out, const Tile& tile,
                                             int stage, int stop, const Sequence& seq, bool has_others) {
  if (kIsMasked && has_others) {
    auto row_at = [&](int i) {
      const int query = tile.start + i;
      return query < stop && seq.token_kind[query] == kLocal ? query : -1;
    };
    P::template gather<P::kColumns>(Shared::columns(0, stage), q, row_at);
    P::template gather<P::kColumns>(Shared::columns(1, stage), d_out, row_at);
  } else {
    P::template load<P::kColumns, kIsMasked>(Shared::columns(0, stage), q, tile.start, stop);
    P::template load<P::kColumns, kIsMasked>(Shared::columns(1, stage), d_out, tile.start, stop);
  }
}

// Writes x times factor(r) to row(r) of a tensor, zeros where !has_result(r), and nothing from num_rows on.
template <class P, class RowAt, class HasResult, class Factor>
__device__ __forceinline__ void write_rows(const Target& target, const typename P::Result& x, int num_rows,
                                           RowAt row, HasResult has_result, Factor factor) {
#pragma unroll
  for (int r = 0; r < P::kRowsPerLane; ++r) {
    if (row(r) >= num_rows) continue;
    const bool has = has_result(r);
    const float f = factor(r);
#pragma unroll
    for (int n = 0; n < P::kBlockD / 8; ++n) {
      P::write_pair(target, row(r), 8 * n + 2 * lane_in_group(), has ? x.at(n, r, 0) * f : 0.0f,
                    has ? x.at(n, r, 1) * f : 0.0f);
    }
  }
}

}  // namespace led::cuda
