// Which columns a tile of rows needs, in tiles; which of those need no mask; how they reach shared memory.
//
// Rows and columns are queries and keys, or the other way round where dk and dv are computed.
#pragma once

#include <type_traits>

#include "arguments.h"
#include "fragment.cuh"

namespace led::cuda {

// Row i sees the columns i - before ... i + after that are below num_columns.
struct Band {
  int before, after, num_columns;
};

// Columns start ... start + N - 1; if gathered, of the list of global tokens.
struct Tile {
  int start;
  bool gathered;
};

// In the order in which they are attended to: gathered tiles, tiles that an edge of the band or of the
// sequence crosses (masked), and the interior between those edges.
template <int kColumns>
class ColumnTiles {
 public:
  // The tiles of the band that `num_rows` rows from row_start on need, behind those of num_gathered columns.
  __device__ __forceinline__ ColumnTiles(const Band& band, int row_start, int num_rows, int num_gathered) {
    num_gathered_ = ceil_div(num_gathered);
    start = max(row_start - band.before, 0) & ~3;  // dropout draws for four neighbouring keys at once
    stop = min(row_start + num_rows + band.after, band.num_columns);
    num_tiles_ = ceil_div(max(stop - start, 0));
    num_left_ = min(ceil_div(max(row_start + num_rows - 1 - band.before - start, 0)), num_tiles_);
    const int seen_by_all = max(min(row_start + band.after + 1, band.num_columns) - start, 0);
    num_interior_ = max(seen_by_all / kColumns - num_left_, 0);
  }
  // The columns from start up to stop, which every row sees.
  __device__ __forceinline__ ColumnTiles(int start, int stop)
      : start(start), stop(stop), num_gathered_(0), num_left_(0) {
    num_tiles_ = ceil_div(max(stop - start, 0));
    num_interior_ = max(stop - start, 0) / kColumns;
  }

  __device__ __forceinline__ void mask_all() { num_interior_ = 0; }
  __device__ __forceinline__ int num_masked() const { return num_gathered_ + num_tiles_ - num_interior_; }
  __device__ __forceinline__ int count() const { return num_gathered_ + num_tiles_; }

  __device__ __forceinline__ Tile operator[](int i) const {
    if (i < num_gathered_) return {i * kColumns, true};
    return {start + band_tile(i - num_gathered_) * kColumns, false};
  }
  __device__ __forceinline__ Tile interior(int i) const {
    return {start + (i - num_masked() + num_left_) * kColumns, false};
  }

  int start, stop;  // the columns start ... stop - 1 are needed, beside the gathered ones

 private:
  __device__ __forceinline__ int band_tile(int i) const {
    if (i < num_left_) return i;
    const int num_masked = num_tiles_ - num_interior_;
    return i < num_masked ? i + num_interior_ : i - num_masked + num_left_;
  }
  static __device__ __forceinline__ int ceil_div(int columns) {
    return static_cast<int>((static_cast<unsigned>(columns) + kColumns - 1) / kColumns);
  }

  int num_gathered_, num_tiles_, num_left_, num_interior_;
};

// Two tiles of columns in each stage, behind kRowOperands tiles of rows.
template <class P, int kRowOperands>
struct SharedTiles {
  using Element = typename P::Element;
  static constexpr int kRowElements = P::kRows * P::kHeadDim, kColumnElements = P::kColumns * P::kHeadDim;
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

// Loads a tile of keys and their values into the stage: zeros from `stop` on, and in place of padding if
// has_padding. Of the columns from `stop` on nobody knows whether they hold padding, and 0 times a NaN of
// padding is NaN.
template <class P, class Shared, bool kIsMasked>
__device__ __forceinline__ void load_keys(const Source& k, const Source& v, const Tile& tile, int stage,
                                          int stop, const Sequence& seq, bool has_padding) {
  if (kIsMasked && (tile.gathered || has_padding)) {
    auto row_at = [&](int i) {
      const int column = tile.start + i;
      if (tile.gathered) return seq.position(column, -1);
      return column < stop && seq.token_kind[column] != kPadding ? column : -1;
    };
    P::template gather<P::kColumns>(Shared::columns(0, stage), k, row_at);
    P::template gather<P::kColumns>(Shared::columns(1, stage), v, row_at);
  } else {
    P::template load<P::kColumns, kIsMasked>(Shared::columns(0, stage), k, tile.start, stop);
    P::template load<P::kColumns, kIsMasked>(Shared::columns(1, stage), v, tile.start, stop);
  }
}

// Calls begin() when the copies issued so far have arrived, then attend(tile, is_masked, stage) for each
// tile, which load(tile, is_masked, stage) has fetched before. is_masked is a std::bool_constant: interior
// tiles carry no mask.
template <int kStages, int kColumns, class Load, class Begin, class Attend>
__device__ __forceinline__ void for_each_tile(const ColumnTiles<kColumns>& tiles, Load load, Begin begin,
                                              Attend attend) {
  static_assert(kStages == 1 || kStages == 2, "at most one tile ahead");
  const int num_masked = tiles.num_masked(), count = tiles.count();
  if (kStages == 2 && count > 0) load(tiles[0], std::true_type{}, 0);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  begin();
  auto step = [&](int i, auto is_masked, auto tile_at) {
    if constexpr (kStages == 2) {
      wait_for_copies<0>();
      __syncthreads();  // the tile is there for all, and all are done with the one before
      if (i + 1 < count) load(tile_at(i + 1), is_masked, (i + 1) & 1);
      commit_copies();
      attend(tile_at(i), is_masked, i & 1);
    } else {
      __syncthreads();
      load(tile_at(i), is_masked, 0);
      commit_copies();
      wait_for_copies<0>();
      __syncthreads();
      attend(tile_at(i), is_masked, 0);
    }
  };
#pragma unroll 1
  for (int i = 0; i < num_masked; ++i) {
    step(i, std::true_type{}, [&](int j) { return tiles[j]; });
  }
#pragma unroll 1
  for (int i = num_masked; i < count; ++i) {
    step(i, std::false_type{}, [&](int j) { return tiles.interior(j); });
  }
}

// The columns that each of a lane's rows sees: lower ... lower + width.
template <int kRowsPerLane>
struct RowBands {
  int lower[kRowsPerLane];
  unsigned width[kRowsPerLane];

  // row(r) is the position of the lane's row r.
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

// -inf where a row does not see a column. A gathered column, a global key, counts where it is outside of the
// row's band, which holds it otherwise. Columns of padding are looked for if has_padding.
template <int kColumns, int kRowsPerLane>
__device__ __forceinline__ void mask_scores(Fragment<kColumns, kRowsPerLane>& scores, const Tile& tile,
                                            const RowBands<kRowsPerLane>& bands, const Sequence& seq,
                                            bool has_padding) {
  const int column = tile.start + 2 * lane_in_group();  // of element (0, 0)
  if (!tile.gathered && !has_padding) {
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
  for (int i = 0; i < kColumns / 4; ++i) {  // column 2 i + e of the lane
    const int n = i / 2, e = i % 2;
    int position = column + 8 * n + e;
    bool exists;
    if (tile.gathered) {
      position = seq.position(position, -1);
      exists = position >= 0;
    } else {
      exists = position < seq.length && seq.token_kind[position] != kPadding;
    }
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) {
      const bool sees = exists && bands.holds(r, position) != tile.gathered;
      seen |= static_cast<ElementBits>(sees) << ((n * kRowsPerLane + r) * 2 + e);
    }
  }
  keep_elements(scores, seen, -INFINITY);
}

// Writes x times factor(r), or zeros where !has_result(r), to row(r) of a tensor, if that is below num_rows.
template <class P, class RowAt, class HasResult, class Factor>
__device__ __forceinline__ void write_rows(const Target& target, const typename P::Result& x, int num_rows,
                                           RowAt row, HasResult has_result, Factor factor) {
#pragma unroll
  for (int r = 0; r < P::kRowsPerLane; ++r) {
    if (row(r) >= num_rows) continue;
    const bool has = has_result(r);
    const float f = factor(r);
#pragma unroll
    for (int n = 0; n < P::kHeadDim / 8; ++n) {
      P::write_pair(target, row(r), 8 * n + 2 * lane_in_group(), has ? x.at(n, r, 0) * f : 0.0f,
                    has ? x.at(n, r, 1) * f : 0.0f);
    }
  }
}

// Writes x to row(r) of an array of rows of row_stride floats, if that is below num_rows.
template <class P, class RowAt>
__device__ __forceinline__ void write_partial(float* data, int64_t row_stride, int head_dim,
                                              const typename P::Result& x, int num_rows, RowAt row) {
#pragma unroll
  for (int r = 0; r < P::kRowsPerLane; ++r) {
    if (row(r) >= num_rows) continue;
#pragma unroll
    for (int n = 0; n < P::kHeadDim / 8; ++n) {
      float* pair = data + row(r) * row_stride + 8 * n + 2 * lane_in_group();
      if (8 * n + 2 * lane_in_group() < head_dim) pair[0] = x.at(n, r, 0);
      if (8 * n + 2 * lane_in_group() + 1 < head_dim) pair[1] = x.at(n, r, 1);
    }
  }
}

}  // namespace led::cuda
