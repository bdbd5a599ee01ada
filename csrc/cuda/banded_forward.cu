// Banded attention, forward: one block per tile of queries, head and sequence. Global keys come first,
// gathered through global_index; those inside a query's band are skipped, because the band keeps them.
#include "column_tiles.cuh"
#include "configs.cuh"
#include "forward.cuh"

namespace led::cuda {

template <class P, bool kMayDrop>
__global__ void __launch_bounds__(P::kThreads, 1) banded_forward_kernel(const Arguments a) {
  const AttentionParams& p = a.p;
  const int row_start = static_cast<int>(blockIdx.x) * P::kRows;
  const Sequence seq(p, static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y));
  if (row_start >= seq.num_rows) return;
  const int first_row = warp_id() * P::kWarpRows + lane_group();
  auto row = [&](int r) { return first_row + 8 * r; };
  auto query = [&](int r) { return row_start + row(r); };

  OnlineSoftmax<P> softmax;
  if (row_start < seq.length) {  // behind that there is only padding
    using Shared = SharedTiles<P, 1>;
    const Source q = seq.source(p.q, p, seq.first_row);
    const Source k = seq.source(p.k, p, seq.first_row), v = seq.source(p.v, p, seq.first_row);
    const Band band{static_cast<int>(p.window_left), static_cast<int>(p.window_right), seq.length};
    const RowBands<P::kRowsPerLane> bands(band, query);
    ColumnTiles<P::kColumns> tiles(band, row_start, P::kRows, seq.num_globals);
    const bool has_padding = seq.has_padding(tiles.start, tiles.stop);
    if (has_padding) tiles.mask_all();

    P::template load<P::kRows, true>(Shared::rows(0), q, row_start, seq.length);
    typename P::Rows q_rows;
    for_each_tile<P::kStages>(
        tiles,
        [&](const Tile& tile, auto is_masked, int stage) {
          load_keys<P, Shared, decltype(is_masked)::value>(k, v, tile, stage, tiles.stop, seq, has_padding);
        },
        [&] { q_rows.set(Shared::rows(0)); },
        [&](const Tile& tile, auto is_masked, int stage) {
          typename P::Scores scores;
          P::multiply_transposed(scores, q_rows, Shared::columns(0, stage));
          if constexpr (decltype(is_masked)::value) mask_scores(scores, tile, bands, seq, has_padding);
          softmax.update(scores, a.qk_scale);
          if (kMayDrop && a.has_dropout()) keep_elements(scores, keep_of_keys<P>(a, seq, tile, query), 0.0f);
          P::accumulate(softmax.acc, scores, Shared::columns(1, stage));
        });
  }

  softmax.finish();
  const int num_rows = seq.num_rows - row_start;
  auto is_local = [&](int r) { return query(r) < seq.length && seq.token_kind[query(r)] == kLocal; };
  write_rows<P>(seq.target(p.out, p, seq.first_row + row_start), softmax.acc, num_rows, row, is_local,
                [&](int r) { return a.keep_scale / softmax.row_sum[r]; });
  float* lse = static_cast<float*>(p.lse.data) + seq.lse_offset(p.lse, seq.first_row + row_start);
#pragma unroll
  for (int r = 0; r < P::kRowsPerLane; ++r) {
    if (lane_in_group() == 0 && row(r) < num_rows) {
      lse[row(r)] = is_local(r) ? (softmax.row_max[r] + log2f(softmax.row_sum[r])) * kLn2 : INFINITY;
    }
  }
}

template <int kHeadDim>
void launch_banded_forward(const Arguments& a, Unit unit) {
  choose_instance<kHeadDim>(a, unit, [&](auto element, auto may_drop) {
    using P = typename Tiles<decltype(element), kHeadDim>::Forward;
    const dim3 grid(ceil_div(a.p.max_seqlen, P::kRows), a.p.heads, a.p.batch);
    launch(banded_forward_kernel<P, may_drop.value>, grid, P::kThreads, SharedTiles<P, 1>::kBytes, a.p, a);
  });
}
template void launch_banded_forward<LED_HEAD_DIM>(const Arguments&, Unit);

}  // namespace led::cuda
