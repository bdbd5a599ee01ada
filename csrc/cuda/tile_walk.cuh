// The matrix of scores has rows and columns: queries and keys, or the other way round where dk and dv are
// computed. A thread block holds a tile of rows and visits tiles of columns: which ones, and which of them
// need no mask.
#pragma once

#include <type_traits>

#include "primitives.cuh"

namespace led::cuda {

// Row i sees those of the columns i - before ... i + after that are below num_columns.
struct Band {
  int before, after, num_columns;
};

// The columns from `start` on; of a tile of global keys these are slots of global_index.
struct Tile {
  int start;
  bool is_global;
};

// The tiles that a thread block visits, in order: those of global keys and those that an edge of the band or
// of the sequence crosses, all of which are masked, then the interior tiles between these edges.
template <int kColumns>
class TileWalk {
 public:
  // Visits num_globals global keys, then the band that `num_rows` rows from row_start on see.
  __device__ __forceinline__ TileWalk(const Band& band, int row_start, int num_rows, int num_globals) {
    num_global_ = ceil_div(num_globals);
    start = max(row_start - band.before, 0) & ~3;  // dropout draws for four neighboring keys at once
    stop = min(row_start + num_rows + band.after, band.num_columns);
    num_tiles_ = ceil_div(max(stop - start, 0));
    num_left_ = min(ceil_div(max(row_start + num_rows - 1 - band.before - start, 0)), num_tiles_);
    const int seen_by_all = max(min(row_start + band.after + 1, band.num_columns) - start, 0);
    num_interior_ = max(seen_by_all / kColumns - num_left_, 0);
  }
  // Visits the columns from start up to stop, which every row sees.
  __device__ __forceinline__ TileWalk(int start, int stop)
      : start(start), stop(stop), num_global_(0), num_left_(0) {
    num_tiles_ = ceil_div(max(stop - start, 0));
    num_interior_ = max(stop - start, 0) / kColumns;
  }

  __device__ __forceinline__ void mask_all() { num_interior_ = 0; }
  __device__ __forceinline__ int num_masked() const { return num_global_ + num_tiles_ - num_interior_; }
  __device__ __forceinline__ int count() const { return num_global_ + num_tiles_; }

  __device__ __forceinline__ Tile operator[](int i) const {
    if (i < num_global_) return {i * kColumns, true};
    return {start + band_tile(i - num_global_) * kColumns, false};
  }
  __device__ __forceinline__ Tile interior(int i) const {
    return {start + (i - num_masked() + num_left_) * kColumns, false};
  }

  int start, stop;  // the columns start ... stop - 1 are visited, beside the global keys

 private:
  __device__ __forceinline__ int band_tile(int i) const {
    if (i < num_left_) return i;
    const int num_masked = num_tiles_ - num_interior_;
    return i < num_masked ? i + num_interior_ : i - num_masked + num_left_;
  }
  static __device__ __forceinline__ int ceil_div(int columns) {
    return static_cast<int>((static_cast<unsigned>(columns) + kColumns - 1) / kColumns);
  }

  int num_global_, num_tiles_, num_left_, num_interior_;
};

// Calls begin() when the copies issued so far have arrived, then visit(tile, is_masked, stage) for each tile,
// which load(tile, is_masked, stage) has fetched before. is_masked is a std::bool_constant: interior tiles
// carry no mask.
template <int kStages, int kColumns, class Load, class Begin, class Visit>
__device__ __forceinline__ void for_each_tile(const TileWalk<kColumns>& tiles, Load load, Begin begin,
                                              Visit visit) {
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
      visit(tile_at(i), is_masked, i & 1);
    } else {
      __syncthreads();
      load(tile_at(i), is_masked, 0);
      commit_copies();
      wait_for_copies<0>();
      __syncthreads();
      visit(tile_at(i), is_masked, 0);
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

}  // namespace led::cuda
