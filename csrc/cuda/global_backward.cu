// Global attention, backward: dq by splits of the keys, then summed; dk and dv by tiles of keys, each from
// all global queries. dq's kernel leaves delta behind.
#include "backward.cuh"
#include "column_tiles.cuh"
#include "configs.cuh"
#include "global_tiles.cuh"

namespace led::cuda {

template <class P>
__global__ void __launch_bounds__(P::kThreads, 1) global_dq_kernel(const Arguments a) {
  const AttentionParams& p = a.p;
  const Sequence seq(p, static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y));
  const GlobalTiles<P> block(a, seq);
  if (block.is_empty(seq)) return;
  auto slot = [&](int r) { return block.slot(r); };
  auto query = [&](int r) { return seq.position(slot(r), 0); };

  using Shared = SharedTiles<P, 2>;
  const Source d_out = seq.source(p.d_out, p, 0);
  const Source k = seq.source(p.k, p, seq.first_row), v = seq.source(p.v, p, seq.first_row);
  const int64_t lse_start = seq.lse_offset(p.lse, 0);
  const float* d_lse = static_cast<const float*>(p.d_lse.data);
  const RowStatistics<P> rows =
      read_rows<P>(a, seq.source(p.out, p, 0), d_out, static_cast<const float*>(p.lse.data) + lse_start,
                   d_lse == nullptr ? nullptr : d_lse + seq.lse_offset(p.d_lse, 0), slot,
                   [&](int r) { return slot(r) < seq.num_globals; });
#pragma unroll
  for (int r = 0; r < P::kRowsPerLane; ++r) {
    if (block.split == 0 && lane_in_group() == 0 && slot(r) < seq.num_globals) {
      a.delta[lse_start + slot(r)] = rows.delta[r];
    }
  }

  const RowBands<P::kRowsPerLane> bands({0, block.stop, block.stop}, [](int) { return 0; });
  ColumnTiles<P::kColumns> tiles(block.start, block.stop);
  const bool has_padding = seq.has_padding(block.start, block.stop);
  if (has_padding) tiles.mask_all();
  P::template load<P::kRows, true>(Shared::rows(0), seq.source(p.q, p, 0), block.slot_start, seq.num_globals);
  P::template load<P::kRows, true>(Shared::rows(1), d_out, block.slot_start, seq.num_globals);
  typename P::Rows q_rows, d_out_rows;
  typename P::Result dq;
  dq.clear();
  for_each_tile<P::kStages>(
      tiles,
      [&](const Tile& tile, auto is_masked, int stage) {
        load_keys<P, Shared, decltype(is_masked)::value>(k, v, tile, stage, block.stop, seq, has_padding);
      },
      [&] {
        q_rows.set(Shared::rows(0));
        d_out_rows.set(Shared::rows(1));
      },
      [&](const Tile& tile, auto is_masked, int stage) {
        accumulate_dq<P>(
            dq, q_rows, d_out_rows, rows, Shared::columns(0, stage), Shared::columns(1, stage), a.qk_scale,
            [&](typename P::Scores& scores) {
              if constexpr (decltype(is_masked)::value) mask_scores(scores, tile, bands, seq, has_padding);
            },
            a.has_dropout(),
            [&] {
              return Dropout(a, seq, kGlobalStream).of_keys<P::kColumns, P::kRowsPerLane>(tile.start, query);
            });
      });
  const int head_dim = static_cast<int>(p.head_dim);
  write_partial<P>(split_rows(a, seq, 0, block.split, head_dim), head_dim, head_dim, dq, seq.num_globals,
                   slot);
}

// dq of one slot and head; zeros where the slot is not in use.
template <class P>
__global__ void __launch_bounds__(kWarpSize) global_sum_splits_kernel(const Arguments a) {
  const AttentionParams& p = a.p;
  const int slot = static_cast<int>(blockIdx.x);
  const Sequence seq(p, static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y));
  const int num_splits = slot < seq.num_globals ? splits_in_use(a, seq) : 0;
  sum_splits<P>(split_rows(a, seq, 0, 0, p.head_dim) + slot * p.head_dim, num_splits,
                p.mask.max_globals * p.head_dim, seq.target(p.dq, p, 0), slot,
                a.softmax_scale * a.keep_scale);
}

template <class P>
__global__ void __launch_bounds__(P::kThreads, 1) global_dkdv_kernel(const Arguments a) {
  const AttentionParams& p = a.p;
  const int row_start = static_cast<int>(blockIdx.x) * P::kRows;
  const Sequence seq(p, static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y));
  if (row_start >= seq.num_rows) return;
  const int warp_start = row_start + warp_id() * P::kWarpRows;
  auto key = [&](int r) { return warp_start + lane_group() + 8 * r; };

  typename P::Result dk, dv;
  dk.clear();
  dv.clear();
  if (row_start < seq.length && seq.num_globals > 0) {  // behind length there is only padding
    using Shared = SharedTiles<P, 2>;
    const Source q = seq.source(p.q, p, 0), d_out = seq.source(p.d_out, p, 0);
    const int64_t lse_start = seq.lse_offset(p.lse, 0);
    const float *lse = static_cast<const float*>(p.lse.data) + lse_start, *delta = a.delta + lse_start;
    const ColumnTiles<P::kColumns> tiles(0, seq.num_globals);
    P::template load<P::kRows, true>(Shared::rows(0), seq.source(p.k, p, seq.first_row), row_start,
                                     seq.length);
    P::template load<P::kRows, true>(Shared::rows(1), seq.source(p.v, p, seq.first_row), row_start,
                                     seq.length);
    typename P::Rows k_rows, v_rows;
    for_each_tile<P::kStages>(
        tiles,
        [&](const Tile& tile, auto is_masked, int stage) {
          P::template load<P::kColumns, decltype(is_masked)::value>(Shared::columns(0, stage), q, tile.start,
                                                                    seq.num_globals);
          P::template load<P::kColumns, decltype(is_masked)::value>(Shared::columns(1, stage), d_out,
                                                                    tile.start, seq.num_globals);
        },
        [&] {
          k_rows.set(Shared::rows(0));
          v_rows.set(Shared::rows(1));
        },
        [&](const Tile& tile, auto is_masked, int stage) {
          const QueryTile queries{lse, delta, tile.start, seq.num_globals};
          accumulate_dkdv<P, decltype(is_masked)::value>(
              dk, dv, k_rows, v_rows, queries, Shared::columns(0, stage), Shared::columns(1, stage),
              a.qk_scale, [](typename P::Scores&) {},  // lse is inf where there is no query
              a.has_dropout(),
              [&] {
                return Dropout(a, seq, kGlobalStream)
                    .of_queries<P::kColumns, P::kRowsPerLane>(
                        warp_start, [&](int i) { return seq.position(tile.start + i, 0); });
              });
        });
  }
  write_dkdv<P>(a, seq, dk, dv, key);
}

template <int kHeadDim>
void launch_global_backward(const Arguments& a, Unit unit) {
  choose_element<kHeadDim>(a, unit, [&](auto element) {
    using T = Tiles<decltype(element), kHeadDim>;
    const AttentionParams& p = a.p;
    const auto heads = static_cast<unsigned>(p.heads), batch = static_cast<unsigned>(p.batch);
    choose_warps<typename T::FewGlobalQueries, typename T::Dq>(a, [&](auto products) {
      using P = decltype(products);
      const unsigned blocks = ceil_div(p.mask.max_globals, P::kRows) * static_cast<unsigned>(a.num_splits);
      launch(global_dq_kernel<P>, dim3(blocks, heads, batch), P::kThreads, SharedTiles<P, 2>::kBytes, p, a);
    });
    launch(global_sum_splits_kernel<typename T::Dq>,
           dim3(static_cast<unsigned>(p.mask.max_globals), heads, batch), kWarpSize, 0, p, a);
    using P = typename T::Dkdv;
    launch(global_dkdv_kernel<P>, dim3(ceil_div(p.max_seqlen, P::kRows), heads, batch), P::kThreads,
           SharedTiles<P, 2>::kBytes, p, a);
  });
}
template void launch_global_backward<LED_HEAD_DIM>(const Arguments&, Unit);

}  // namespace led::cuda
