// Banded attention, backward, in three steps: dq (which leaves delta behind) by tiles of queries; dk and dv
// by tiles of keys, from the queries whose band holds them; dk and dv of global keys, which every local query
// sees, in place of what the second step wrote there: by splits of the queries, then summed.
#include "backward.cuh"
#include "configs.cuh"
#include "splits.cuh"

namespace led::cuda {

template <class P>
__global__ void __launch_bounds__(P::kThreads, 1) banded_dq_kernel(const Arguments a) {
  constexpr int kBlockM = P::kRows;
  const AttentionCall& call = a.call;
  const int row_start = static_cast<int>(blockIdx.x) * kBlockM;
  const Sequence seq(call);
  if (row_start >= seq.num_rows) return;
  const int first_row = warp_row<P>(row_start) + lane_group();
  auto query = [&](int r) { return first_row + 8 * r; };

  const HeadInputs in(call, seq, seq.first_row);
  const BackwardRows queries(a, seq, seq.first_row);
  const RowStatistics<P> rows =
      read_statistics<P>(a, seq, queries, query, [&](int r) { return query(r) < seq.length; });
  write_delta<P>(queries, rows, query, [&](int r) { return query(r) < seq.num_rows; });

  typename P::Result dq;
  dq.clear();
  const int row_stop = min(row_start + kBlockM, seq.length);
  if (uniform(any_position(row_start, row_stop, [&](int i) { return queries.lse[i] != INFINITY; }))) {
    const Band band{static_cast<int>(call.window.left), static_cast<int>(call.window.right), seq.length};
    accumulate_dq_tiles<P>(dq, a, seq, in, queries, rows, row_start, seq.length,
                           TileWalk<P::kColumns>(band, row_start, kBlockM, seq.num_globals),
                           RowBands<P::kRowsPerLane>(band, query),
                           [&](const Tile& tile) { return keep_of_tile<P>(a, seq, tile, query); });
  }
  const float scale = a.softmax_scale * a.keep_scale;
  write_rows<P>(
      seq.target(a.grads.dq, call, seq.first_row), dq, seq.num_rows, query,
      [&](int r) { return rows.has_result(r); }, [&](int) { return scale; });
}

// Whether one of the positions start ... stop - 1 is not a local token: its q and d_out need not be finite.
__device__ __forceinline__ bool has_others_than_local(const Sequence& seq, int start, int stop) {
  return any_position(start, stop, [&](int i) { return seq.token_kind[i] != kLocal; });
}

template <class P>
__global__ void __launch_bounds__(P::kThreads, 1) banded_dkdv_kernel(const Arguments a) {
  constexpr int kBlockN = P::kRows, kBlockM = P::kColumns;
  const AttentionCall& call = a.call;
  const int row_start = static_cast<int>(blockIdx.x) * kBlockN;
  const Sequence seq(call);
  if (row_start >= seq.num_rows) return;
  const int warp_start = warp_row<P>(row_start);
  auto key = [&](int r) { return warp_start + lane_group() + 8 * r; };

  typename P::Result dk, dv;
  dk.clear();
  dv.clear();
  if (row_start < seq.length) {  // behind that there is only padding
    const HeadInputs in(call, seq, seq.first_row);
    const BackwardRows queries(a, seq, seq.first_row);
    load_key_rows<P, SharedTiles<P, 2>>(call, seq, row_start);
    const Band band{static_cast<int>(call.window.right), static_cast<int>(call.window.left), seq.length};
    const RowBands<P::kRowsPerLane> bands(band, key);
    TileWalk<kBlockM> tiles(band, row_start, kBlockN, 0);
    const bool has_others = has_others_than_local(seq, tiles.start, tiles.stop);
    if (has_others) tiles.mask_all();
    accumulate_dkdv_tiles<P>(
        dk, dv, a, seq, in, queries, tiles, has_others,
        [&](typename P::Scores& scores, const Tile& tile) { mask_scores(scores, tile, bands, seq, false); },
        [&](const Tile& tile) {
          const Dropout dropout(a, seq, kBandedStream);
          return dropout.of_queries<kBlockM, P::kRowsPerLane>(
              warp_start, [&](int i) { return dropout.position(tile.start + i); });
        });
  }
  write_dkdv<P>(a, seq, dk, dv, key);
}

// Computes what one split of the local queries adds to dk and dv of a tile of global keys, without the
// scales.
template <class P>
__global__ void __launch_bounds__(P::kThreads, 1) banded_dkdv_globals_kernel(const Arguments a) {
  constexpr int kBlockN = P::kRows, kBlockM = P::kColumns;
  const AttentionCall& call = a.call;
  const Sequence seq(call);
  const SplitBlock<P> block(a, seq);
  if (block.is_empty(seq)) return;
  auto slot = [&](int r) { return block.slot(r); };

  using Shared = SharedTiles<P, 2>;
  const HeadInputs in(call, seq, seq.first_row);
  const BackwardRows queries(a, seq, seq.first_row);
  auto key_row = [&](int i) { return seq.position(block.slot_start + i, -1); };
  P::template gather<kBlockN>(Shared::rows(0), in.k, key_row);
  P::template gather<kBlockN>(Shared::rows(1), in.v, key_row);
  TileWalk<kBlockM> tiles = block.tiles();
  const bool has_others = has_others_than_local(seq, block.start, block.stop);
  if (has_others) tiles.mask_all();
  typename P::Result dk, dv;
  dk.clear();
  dv.clear();
  accumulate_dkdv_tiles<P>(
      dk, dv, a, seq, in, queries, tiles, has_others,
      [](typename P::Scores&, const Tile&) {},  // every local query sees every global key
      [&](const Tile& tile) {
        const Dropout dropout(a, seq, kBandedStream);
        return dropout.of_pairs<kBlockM, P::kRowsPerLane>(
            [&](int, int r, int) { return seq.dropout_position(slot(r)); },
            [&](int n, int, int e) {
              return dropout.position(tile.start + 8 * n + 2 * lane_in_group() + e);
            });
      });
  const int head_dim = static_cast<int>(call.head_dim);
#pragma unroll
  for (int operand = 0; operand < 2; ++operand) {
    write_partial<P>(split_rows(a, seq, operand, block.split, head_dim), head_dim, head_dim,
                     operand == 0 ? dk : dv, seq.num_globals, slot);
  }
}

// Writes dk and dv of one global key and head; a thread block is one warp.
template <class P>
__global__ void __launch_bounds__(kWarpSize) banded_sum_splits_kernel(const Arguments a) {
  const AttentionCall& call = a.call;
  const int slot = static_cast<int>(blockIdx.x);
  const Sequence seq(call);
  if (slot >= seq.num_globals) return;
#pragma unroll
  for (int operand = 0; operand < 2; ++operand) {
    const RowsRef& gradient = operand == 0 ? a.grads.dk : a.grads.dv;
    sum_splits<P>(SlotPartials(a, seq, operand, slot, call.head_dim),
                  seq.target(gradient, call, seq.first_row), seq.global_index[slot],
                  operand == 0 ? a.softmax_scale * a.keep_scale : a.keep_scale,
                  [](const float*) { return 1.0f; });
  }
}

template <int kBlockD>
void launch_banded_backward(const Arguments& a, Unit unit) {
  choose_element<kBlockD>(a, unit, [&](auto element) {
    using T = Tiles<decltype(element), kBlockD>;
    using Dq = typename T::Dq;
    launch(banded_dq_kernel<Dq>, token_grid<Dq>(a), Dq::kThreads, SharedTiles<Dq, 2>::kBytes, a);
    using Dkdv = typename T::Dkdv;
    launch(banded_dkdv_kernel<Dkdv>, token_grid<Dkdv>(a), Dkdv::kThreads, SharedTiles<Dkdv, 2>::kBytes, a);
    if (a.call.mask.max_globals > 0) {
      choose_warps<typename T::DkdvGlobals, Dkdv>(a, [&](auto products) {
        using P = decltype(products);
        launch(banded_dkdv_globals_kernel<P>, split_grid<P>(a), P::kThreads, SharedTiles<P, 2>::kBytes, a);
      });
      launch(banded_sum_splits_kernel<Dq>, slot_grid(a), kWarpSize, 0, a);
    }
  });
}
template void launch_banded_backward<LED_HEAD_DIM>(const Arguments&, Unit);

}  // namespace led::cuda
