// Banded attention, forward: one thread block per tile of queries, head and sequence. Global keys come first,
// gathered through global_index; those inside a query's band are skipped, because the band keeps them.
#include "configs.cuh"
#include "forward.cuh"

namespace led::cuda {

template <class P, bool kMayDrop>
__global__ void __launch_bounds__(P::kThreads, 1) banded_forward_kernel(const Arguments a) {
  constexpr int kBlockM = P::kRows;
  const AttentionCall& call = a.call;
  const int row_start = static_cast<int>(blockIdx.x) * kBlockM;
  const Sequence seq(call);
  if (row_start >= seq.num_rows) return;
  const int first_row = warp_row<P>(0) + lane_group();
  auto row = [&](int r) { return first_row + 8 * r; };
  auto query = [&](int r) { return row_start + row(r); };

  OnlineSoftmax<P> softmax;
  const int row_stop = min(row_start + kBlockM, seq.length);
  if (uniform(any_position(row_start, row_stop, [&](int i) { return seq.token_kind[i] == kLocal; }))) {
    const HeadInputs in(call, seq, seq.first_row);
    const Band band{static_cast<int>(call.window.left), static_cast<int>(call.window.right), seq.length};
    attend_tiles<P, kMayDrop>(softmax, a, seq, in, row_start, seq.length,
                              RowBands<P::kRowsPerLane>(band, query),
                              TileWalk<P::kColumns>(band, row_start, kBlockM, seq.num_globals),
                              [&](const Tile& tile) { return keep_of_tile<P>(a, seq, tile, query); });
  }

  softmax.finish();
  const int num_rows = seq.num_rows - row_start;
  auto is_local = [&](int r) { return query(r) < seq.length && seq.token_kind[query(r)] == kLocal; };
  write_rows<P>(seq.target(a.results.out, call, seq.first_row + row_start), softmax.acc, num_rows, row,
                is_local, [&](int r) { return a.keep_scale / softmax.row_sum[r]; });
  float* lse =
      static_cast<float*>(a.results.lse.data) + seq.lse_offset(a.results.lse, seq.first_row + row_start);
#pragma unroll
  for (int r = 0; r < P::kRowsPerLane; ++r) {
    if (lane_in_group() == 0 && row(r) < num_rows) {
      lse[row(r)] = is_local(r) ? (softmax.row_max[r] + log2f(softmax.row_sum[r])) * kLn2 : INFINITY;
    }
  }
}

template <int kBlockD>
void launch_banded_forward(const Arguments& a, Unit unit) {
  choose_instance<kBlockD>(a, unit, [&](auto element, auto may_drop) {
    using P = typename Tiles<decltype(element), kBlockD>::Forward;
    launch(banded_forward_kernel<P, may_drop.value>, token_grid<P>(a), P::kThreads, SharedTiles<P, 1>::kBytes,
           a);
  });
}
template void launch_banded_forward<LED_HEAD_DIM>(const Arguments&, Unit);

}  // namespace led::cuda
