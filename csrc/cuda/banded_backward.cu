// Banded attention, backward, in three steps: dq (which leaves delta behind) by tiles of queries; dk and dv
// by tiles of keys, from the queries whose band holds them; dk and dv of global keys, which every local query
// sees, in place of what the second step wrote there: by splits of the queries, then summed.
#include "backward.cuh"
#include "column_tiles.cuh"
#include "configs.cuh"
#include "global_tiles.cuh"

namespace led::cuda {

template <class P>
__global__ void __launch_bounds__(P::kThreads, 1) banded_dq_kernel(const Arguments a) {
  const AttentionParams& p = a.p;
  const int row_start = static_cast<int>(blockIdx.x) * P::kRows;
  const Sequence seq(p, static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y));
  if (row_start >= seq.num_rows) return;
  const int first_row = row_start + warp_id() * P::kWarpRows + lane_group();
  auto query = [&](int r) { return first_row + 8 * r; };

  using Shared = SharedTiles<P, 2>;
  const Source q = seq.source(p.q, p, seq.first_row), d_out = seq.source(p.d_out, p, seq.first_row);
  const Source k = seq.source(p.k, p, seq.first_row), v = seq.source(p.v, p, seq.first_row);
  const int64_t lse_start = seq.lse_offset(p.lse, seq.first_row);
  const float* d_lse = static_cast<const float*>(p.d_lse.data);
  const RowStatistics<P> rows = read_rows<P>(
      a, seq.source(p.out, p, seq.first_row), d_out, static_cast<const float*>(p.lse.data) + lse_start,
      d_lse == nullptr ? nullptr : d_lse + seq.lse_offset(p.d_lse, seq.first_row), query,
      [&](int r) { return query(r) < seq.length; });
#pragma unroll
  for (int r = 0; r < P::kRowsPerLane; ++r) {
    if (lane_in_group() == 0 && query(r) < seq.num_rows) a.delta[lse_start + query(r)] = rows.delta[r];
  }

  typename P::Result dq;
  dq.clear();
  if (row_start < seq.length) {  // behind that there is only padding
    const Band band{static_cast<int>(p.window_left), static_cast<int>(p.window_right), seq.length};
    const RowBands<P::kRowsPerLane> bands(band, query);
    ColumnTiles<P::kColumns> tiles(band, row_start, P::kRows, seq.num_globals);
    const bool has_padding = seq.has_padding(tiles.start, tiles.stop);
    if (has_padding) tiles.mask_all();

    P::template load<P::kRows, true>(Shared::rows(0), q, row_start, seq.length);
    P::template load<P::kRows, true>(Shared::rows(1), d_out, row_start, seq.length);
    typename P::Rows q_rows, d_out_rows;
    for_each_tile<P::kStages>(
        tiles,
        [&](const Tile& tile, auto is_masked, int stage) {
          load_keys<P, Shared, decltype(is_masked)::value>(k, v, tile, stage, tiles.stop, seq, has_padding);
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
              a.has_dropout(), [&] { return keep_of_keys<P>(a, seq, tile, query); });
        });
  }
  const float scale = a.softmax_scale * a.keep_scale;
  write_rows<P>(
      seq.target(p.dq, p, seq.first_row), dq, seq.num_rows, query, [&](int r) { return rows.has_result(r); },
      [&](int) { return scale; });
}

// Loads a tile of queries and their d_out into the stage: zeros from `stop` on, and in place of other than
// local tokens if has_others.
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

// Whether one of the positions start ... stop - 1 is padding or global: its q and d_out need not be finite.
__device__ __forceinline__ bool has_others_than_local(const Sequence& seq, int start, int stop) {
  bool found = false;
  for (int i = start + static_cast<int>(threadIdx.x); i < stop; i += static_cast<int>(blockDim.x)) {
    found |= seq.token_kind[i] != kLocal;
  }
  return __syncthreads_or(found) != 0;
}

template <class P>
__global__ void __launch_bounds__(P::kThreads, 1) banded_dkdv_kernel(const Arguments a) {
  const AttentionParams& p = a.p;
  const int row_start = static_cast<int>(blockIdx.x) * P::kRows;
  const Sequence seq(p, static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y));
  if (row_start >= seq.num_rows) return;
  const int warp_start = row_start + warp_id() * P::kWarpRows;
  auto key = [&](int r) { return warp_start + lane_group() + 8 * r; };

  typename P::Result dk, dv;
  dk.clear();
  dv.clear();
  if (row_start < seq.length) {  // behind that there is only padding
    using Shared = SharedTiles<P, 2>;
    const Source q = seq.source(p.q, p, seq.first_row), d_out = seq.source(p.d_out, p, seq.first_row);
    const int64_t lse_start = seq.lse_offset(p.lse, seq.first_row);
    const float *lse = static_cast<const float*>(p.lse.data) + lse_start, *delta = a.delta + lse_start;
    P::template load<P::kRows, true>(Shared::rows(0), seq.source(p.k, p, seq.first_row), row_start,
                                     seq.length);
    P::template load<P::kRows, true>(Shared::rows(1), seq.source(p.v, p, seq.first_row), row_start,
                                     seq.length);
    const Band band{static_cast<int>(p.window_right), static_cast<int>(p.window_left), seq.length};
    const RowBands<P::kRowsPerLane> bands(band, key);
    ColumnTiles<P::kColumns> tiles(band, row_start, P::kRows, 0);
    const bool has_others = has_others_than_local(seq, tiles.start, tiles.stop);
    if (has_others) tiles.mask_all();
    typename P::Rows k_rows, v_rows;
    for_each_tile<P::kStages>(
        tiles,
        [&](const Tile& tile, auto is_masked, int stage) {
          load_queries<P, Shared, decltype(is_masked)::value>(q, d_out, tile, stage, tiles.stop, seq,
                                                              has_others);
        },
        [&] {
          k_rows.set(Shared::rows(0));
          v_rows.set(Shared::rows(1));
        },
        [&](const Tile& tile, auto is_masked, int stage) {
          const QueryTile queries{lse, delta, tile.start, tiles.stop};
          accumulate_dkdv<P, decltype(is_masked)::value>(
              dk, dv, k_rows, v_rows, queries, Shared::columns(0, stage), Shared::columns(1, stage),
              a.qk_scale,
              [&](typename P::Scores& scores) {
                if constexpr (decltype(is_masked)::value) mask_scores(scores, tile, bands, seq, false);
              },
              a.has_dropout(),
              [&] {
                return Dropout(a, seq, kBandedStream)
                    .of_queries<P::kColumns, P::kRowsPerLane>(warp_start,
                                                              [&](int i) { return tile.start + i; });
              });
        });
  }
  write_dkdv<P>(a, seq, dk, dv, key);
}

// What one split of the local queries adds to dk, dv of a tile of global keys: without the scales.
template <class P>
__global__ void __launch_bounds__(P::kThreads, 1) banded_dkdv_globals_kernel(const Arguments a) {
  const AttentionParams& p = a.p;
  const Sequence seq(p, static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y));
  const GlobalTiles<P> block(a, seq);
  if (block.is_empty(seq)) return;
  auto slot = [&](int r) { return block.slot(r); };

  using Shared = SharedTiles<P, 2>;
  const Source q = seq.source(p.q, p, seq.first_row), d_out = seq.source(p.d_out, p, seq.first_row);
  const int64_t lse_start = seq.lse_offset(p.lse, seq.first_row);
  const float *lse = static_cast<const float*>(p.lse.data) + lse_start, *delta = a.delta + lse_start;
  auto key_row = [&](int i) { return seq.position(block.slot_start + i, -1); };
  P::template gather<P::kRows>(Shared::rows(0), seq.source(p.k, p, seq.first_row), key_row);
  P::template gather<P::kRows>(Shared::rows(1), seq.source(p.v, p, seq.first_row), key_row);
  ColumnTiles<P::kColumns> tiles(block.start, block.stop);
  const bool has_others = has_others_than_local(seq, block.start, block.stop);
  if (has_others) tiles.mask_all();
  typename P::Rows k_rows, v_rows;
  typename P::Result dk, dv;
  dk.clear();
  dv.clear();
  for_each_tile<P::kStages>(
      tiles,
      [&](const Tile& tile, auto is_masked, int stage) {
        load_queries<P, Shared, decltype(is_masked)::value>(q, d_out, tile, stage, block.stop, seq,
                                                            has_others);
      },
      [&] {
        k_rows.set(Shared::rows(0));
        v_rows.set(Shared::rows(1));
      },
      [&](const Tile& tile, auto is_masked, int stage) {
        const QueryTile queries{lse, delta, tile.start, block.stop};
        accumulate_dkdv<P, decltype(is_masked)::value>(
            dk, dv, k_rows, v_rows, queries, Shared::columns(0, stage), Shared::columns(1, stage), a.qk_scale,
            [](typename P::Scores&) {}, a.has_dropout(),
            [&] {
              return Dropout(a, seq, kBandedStream)
                  .of_pairs<P::kColumns, P::kRowsPerLane>(
                      [&](int, int r, int) { return seq.position(slot(r), 0); },
                      [&](int n, int, int e) { return tile.start + 8 * n + 2 * lane_in_group() + e; });
            });
      });
  const int head_dim = static_cast<int>(p.head_dim);
#pragma unroll
  for (int operand = 0; operand < 2; ++operand) {
    write_partial<P>(split_rows(a, seq, operand, block.split, head_dim), head_dim, head_dim,
                     operand == 0 ? dk : dv, seq.num_globals, slot);
  }
}

// dk and dv of one global key and head.
template <class P>
__global__ void __launch_bounds__(kWarpSize) banded_sum_splits_kernel(const Arguments a) {
  const AttentionParams& p = a.p;
  const int slot = static_cast<int>(blockIdx.x);
  const Sequence seq(p, static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y));
  if (slot >= seq.num_globals) return;
#pragma unroll
  for (int operand = 0; operand < 2; ++operand) {
    const float* rows = split_rows(a, seq, operand, 0, p.head_dim) + slot * p.head_dim;
    sum_splits<P>(rows, splits_in_use(a, seq), p.mask.max_globals * p.head_dim,
                  seq.target(operand == 0 ? p.dk : p.dv, p, seq.first_row), seq.global_index[slot],
                  operand == 0 ? a.softmax_scale * a.keep_scale : a.keep_scale);
  }
}

template <int kHeadDim>
void launch_banded_backward(const Arguments& a, Unit unit) {
  choose_element<kHeadDim>(a, unit, [&](auto element) {
    using T = Tiles<decltype(element), kHeadDim>;
    const AttentionParams& p = a.p;
    const auto heads = static_cast<unsigned>(p.heads), batch = static_cast<unsigned>(p.batch);
    using Dq = typename T::Dq;
    launch(banded_dq_kernel<Dq>, dim3(ceil_div(p.max_seqlen, Dq::kRows), heads, batch), Dq::kThreads,
           SharedTiles<Dq, 2>::kBytes, p, a);
    using Dkdv = typename T::Dkdv;
    launch(banded_dkdv_kernel<Dkdv>, dim3(ceil_div(p.max_seqlen, Dkdv::kRows), heads, batch), Dkdv::kThreads,
           SharedTiles<Dkdv, 2>::kBytes, p, a);
    if (p.mask.max_globals > 0) {
      choose_warps<typename T::DkdvGlobals, Dkdv>(a, [&](auto products) {
        using P = decltype(products);
        const unsigned blocks = ceil_div(p.mask.max_globals, P::kRows) * static_cast<unsigned>(a.num_splits);
        launch(banded_dkdv_globals_kernel<P>, dim3(blocks, heads, batch), P::kThreads,
               SharedTiles<P, 2>::kBytes, p, a);
      });
      launch(banded_sum_splits_kernel<Dq>, dim3(static_cast<unsigned>(p.mask.max_globals), heads, batch),
             kWarpSize, 0, p, a);
    }
  });
}
template void launch_banded_backward<LED_HEAD_DIM>(const Arguments&, Unit);

}  // namespace led::cuda
