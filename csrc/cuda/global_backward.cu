// Global attention, backward: dq by splits of the keys, then summed; dk and dv by tiles of keys, each from
// all global queries. dq's kernel leaves delta behind.
#include "backward.cuh"
#include "configs.cuh"
#include "splits.cuh"

namespace led::cuda {

// Computes what one split of the keys adds to dq of a tile of global queries, without the scales.
template <class P>
__global__ void __launch_bounds__(P::kThreads, 1) global_dq_kernel(const Arguments a) {
  const AttentionCall& call = a.call;
  const Sequence seq(call);
  const SplitBlock<P> block(a, seq);
  if (block.is_empty(seq)) return;
  auto slot = [&](int r) { return block.slot(r); };
  auto query = [&](int r) { return seq.dropout_position(slot(r)); };
  auto exists = [&](int r) { return slot(r) < seq.num_globals; };

  const HeadInputs in(call, seq, 0);
  const BackwardRows queries(a, seq, 0);
  const RowStatistics<P> rows = read_statistics<P>(a, seq, queries, slot, exists);
  write_delta<P>(queries, rows, slot, [&](int r) { return block.split == 0 && exists(r); });

  typename P::Result dq;
  dq.clear();
  accumulate_dq_tiles<P>(dq, a, seq, in, queries, rows, block.slot_start, seq.num_globals, block.tiles(),
                         block.bands(), [&](const Tile& tile) {
                           const Dropout dropout(a, seq, kGlobalStream);
                           return dropout.of_keys<P::kColumns, P::kRowsPerLane>(tile.start, query);
                         });
  const int head_dim = static_cast<int>(call.head_dim);
  write_partial<P>(split_rows(a, seq, 0, block.split, head_dim), head_dim, head_dim, dq, seq.num_globals,
                   slot);
}

// Writes dq of one slot and head, zeros where the slot is not in use; a thread block is one warp.
template <class P>
__global__ void __launch_bounds__(kWarpSize) global_sum_splits_kernel(const Arguments a) {
  const AttentionCall& call = a.call;
  const int slot = static_cast<int>(blockIdx.x);
  const Sequence seq(call);
  sum_splits<P>(SlotPartials(a, seq, 0, slot, call.head_dim), seq.target(a.grads.dq, call, 0), slot,
                a.softmax_scale * a.keep_scale, [](const float*) { return 1.0f; });
}

template <class P>
__global__ void __launch_bounds__(P::kThreads, 1) global_dkdv_kernel(const Arguments a) {
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
  if (row_start < seq.length && seq.num_globals > 0) {  // behind length there is only padding
    const HeadInputs in(call, seq, 0);
    const BackwardRows queries(a, seq, 0);
    const TileWalk<kBlockM> tiles(0, seq.num_globals);
    load_key_rows<P, SharedTiles<P, 2>>(call, seq, row_start);
    accumulate_dkdv_tiles<P>(
        dk, dv, a, seq, in, queries, tiles, false,
        [](typename P::Scores&, const Tile&) {},  // lse is inf where there is no query
        [&](const Tile& tile) {
          return Dropout(a, seq, kGlobalStream).of_queries<kBlockM, P::kRowsPerLane>(warp_start, [&](int i) {
            return seq.dropout_position(tile.start + i);
          });
        });
  }
  write_dkdv<P>(a, seq, dk, dv, key);
}

template <int kBlockD>
void launch_global_backward(const Arguments& a, Unit unit) {
  choose_element<kBlockD>(a, unit, [&](auto element) {
    using T = Tiles<decltype(element), kBlockD>;
    choose_warps<typename T::FewGlobalQueries, typename T::Dq>(a, [&](auto products) {
      using P = decltype(products);
      launch(global_dq_kernel<P>, split_grid<P>(a), P::kThreads, SharedTiles<P, 2>::kBytes, a);
    });
    launch(global_sum_splits_kernel<typename T::Dq>, slot_grid(a), kWarpSize, 0, a);
    using Dkdv = typename T::Dkdv;
    launch(global_dkdv_kernel<Dkdv>, token_grid<Dkdv>(a), Dkdv::kThreads, SharedTiles<Dkdv, 2>::kBytes, a);
  });
}
template void launch_global_backward<LED_HEAD_DIM>(const Arguments&, Unit);

}  // namespace led::cuda
