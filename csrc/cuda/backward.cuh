// The backward of a thread block's tile: probabilities are computed again from lse (Dao, "FlashAttention-2",
// 2023). With p the probabilities before dropout and m its mask, and with keep_scale left out:
//   dp = (d_out v^T) m, d_scores = p (dp - delta), delta = (sum(out * d_out) - d_lse) / keep_scale,
//   dv = (p m)^T d_out, dq = d_scores k, dk = d_scores^T q.
#pragma once

#include "dropout.cuh"
#include "fma.cuh"
#include "masks.cuh"
#include "tensor_core.cuh"
#include "tile_io.cuh"

namespace led::cuda {

// What the backward reads of one head's queries besides q; row 0 is that of q.
struct BackwardRows {
  Source d_out;
  const float* lse;
  float* delta;
  int64_t first;

  __device__ __forceinline__ BackwardRows(const Arguments& a, const Sequence& seq, int64_t first)
      : d_out(seq.source(a.grads.d_out, a.call, first)), first(first) {
    const int64_t start = seq.lse_offset(a.results.lse, first);
    lse = static_cast<const float*>(a.results.lse.data) + start;
    delta = a.delta + start;
  }
};

// What the backward needs of each of a lane's rows, which are queries.
template <class P>
struct RowStatistics {
  float lse[P::kRowsPerLane];  // in units of log2; inf on rows without a result
  float delta[P::kRowsPerLane];

  __device__ __forceinline__ bool has_result(int r) const { return lse[r] != INFINITY; }  // NaN is one
};

// Reads the statistics of the rows row(r) of the queries, of those that exist.
template <class P, class RowAt, class Exists>
__device__ __forceinline__ RowStatistics<P> read_statistics(const Arguments& a, const Sequence& seq,
                                                            const BackwardRows& queries, RowAt row,
                                                            Exists exists) {
  const Source out = seq.source(a.results.out, a.call, queries.first);
  const LseRef& d_lse_ref = a.grads.d_lse;
  const float* d_lse = static_cast<const float*>(d_lse_ref.data);
  if (d_lse != nullptr) d_lse += seq.lse_offset(d_lse_ref, queries.first);
  RowStatistics<P> rows;
#pragma unroll
  for (int r = 0; r < P::kRowsPerLane; ++r) {
    rows.lse[r] = exists(r) ? queries.lse[row(r)] * kLog2E : INFINITY;
    float delta = 0;
    if (rows.has_result(r)) {
#pragma unroll 4
      for (int d = 2 * lane_in_group(); d < P::kBlockD; d += 8) {
        const float2 x = P::read_pair(out, row(r), d), y = P::read_pair(queries.d_out, row(r), d);
        delta = fmaf(x.x, y.x, fmaf(x.y, y.y, delta));
      }
    }
    delta = row_sum_of(delta);
    if (d_lse != nullptr && rows.has_result(r)) delta -= d_lse[row(r)];
    rows.delta[r] = delta / a.keep_scale;
  }
  return rows;
}

// Writes delta of the rows row(r), of those that are this thread block's to write.
template <class P, class RowAt, class Writes>
__device__ __forceinline__ void write_delta(const BackwardRows& queries, const RowStatistics<P>& rows,
                                            RowAt row, Writes writes) {
#pragma unroll
  for (int r = 0; r < P::kRowsPerLane; ++r) {
    if (lane_in_group() == 0 && writes(r)) queries.delta[row(r)] = rows.delta[r];
  }
}

// A tile of queries as columns. It has the queries from `start` on, of which those from `stop` on do not
// exist.
struct QueryTile {
  const float* lse;
  const float* delta;
  int start, stop;

  // Reads a statistic of the lane's columns, as elements (n, e) of a fragment; `other` for those that do not
  // exist, if kHasEnd.
  template <bool kHasEnd, int kBlocks>
  __device__ __forceinline__ void read(float (&x)[kBlocks][2], const float* statistics, float other) const {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int query = start + 8 * n + 2 * lane_in_group() + e;
        x[n][e] = !kHasEnd || query < stop ? statistics[query] : other;
      }
    }
  }
};

// Adds to dq what a tile of keys and values gives. mask(scores) sets what does not count to -inf; keep()
// gives dropout's bits.
template <class P, class Mask, class Keep>
__device__ __forceinline__ void accumulate_dq(typename P::Result& dq, const typename P::Rows& q,
                                              const typename P::Rows& d_out, const RowStatistics<P>& rows,
                                              const typename P::Element* k, const typename P::Element* v,
                                              float qk_scale, Mask mask, bool has_dropout, Keep keep) {
  typename P::Scores scores, dp;
  P::multiply_transposed(scores, q, k);
  P::multiply_transposed(dp, d_out, v);
  mask(scores);
  if (has_dropout) keep_elements(dp, keep(), 0.0f);
#pragma unroll
  for (int n = 0; n < P::Scores::kBlocks; ++n) {
#pragma unroll
    for (int r = 0; r < P::kRowsPerLane; ++r) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float p = exp2_approx(fmaf(scores.at(n, r, e), qk_scale, -rows.lse[r]));
        dp.at(n, r, e) = p * (dp.at(n, r, e) - rows.delta[r]);
      }
    }
  }
  P::accumulate(dq, dp, k);
}

// Adds to dq of the rows row_start ... row_stop - 1 of the queries what all keys give that the block visits.
// keep(tile) gives dropout's bits.
template <class P, class Keep>
__device__ __forceinline__ void accumulate_dq_tiles(typename P::Result& dq, const Arguments& a,
                                                    const Sequence& seq, const HeadInputs& in,
                                                    const BackwardRows& queries, const RowStatistics<P>& rows,
                                                    int row_start, int row_stop, TileWalk<P::kColumns> tiles,
                                                    const RowBands<P::kRowsPerLane>& bands, Keep keep) {
  using Shared = SharedTiles<P, 2>;
  const bool has_padding = seq.has_padding(tiles.start, tiles.stop);
  if (has_padding) tiles.mask_all();
  P::template load<P::kRows, true>(Shared::rows(0), in.q, row_start, row_stop);
  P::template load<P::kRows, true>(Shared::rows(1), queries.d_out, row_start, row_stop);
  typename P::Rows q_rows, d_out_rows;
  for_each_tile<P::kStages>(
      tiles,
      [&](const Tile& tile, auto is_masked, int stage) {
        load_keys<P, Shared, decltype(is_masked)::value>(in.k, in.v, tile, stage, tiles.stop, seq,
                                                         has_padding);
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
            a.has_dropout(), [&] { return keep(tile); });
      });
}

// Adds to dk and dv of the rows, which are keys, what a tile of queries gives.
template <class P, bool kHasEnd, class Mask, class Keep>
__device__ __forceinline__ void accumulate_dkdv(typename P::Result& dk, typename P::Result& dv,
                                                const typename P::Rows& k, const typename P::Rows& v,
                                                const QueryTile& queries, const typename P::Element* q,
                                                const typename P::Element* d_out, float qk_scale, Mask mask,
                                                bool has_dropout, Keep keep) {
  constexpr int kBlocks = P::Scores::kBlocks;
  typename P::Scores p, dp;
  const ElementBits bits = has_dropout ? keep() : 0;  // here, where few registers are in use
  float lse[kBlocks][2];
  queries.template read<kHasEnd>(lse, queries.lse, INFINITY);
  P::multiply_transposed(p, k, q);
  mask(p);
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int r = 0; r < P::kRowsPerLane; ++r) {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        p.at(n, r, e) = exp2_approx(fmaf(p.at(n, r, e), qk_scale, -lse[n][e] * kLog2E));
    }
  }
  float delta[kBlocks][2];
  queries.template read<kHasEnd>(delta, queries.delta, 0.0f);
  P::multiply_transposed(dp, v, d_out);
  if (has_dropout) keep_elements(dp, bits, 0.0f);
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int r = 0; r < P::kRowsPerLane; ++r) {
#pragma unroll
      for (int e = 0; e < 2; ++e) dp.at(n, r, e) = p.at(n, r, e) * (dp.at(n, r, e) - delta[n][e]);
    }
  }
  if (has_dropout) keep_elements(p, bits, 0.0f);
  P::accumulate(dv, p, d_out);
  P::accumulate(dk, dp, q);
}

// Adds to dk and dv what all queries give that the block visits; its tiles of keys and values are being
// loaded. mask(scores, tile) sets what does not count to -inf in masked tiles; keep(tile) gives dropout's
// bits.
template <class P, class Mask, class Keep>
__device__ __forceinline__ void accumulate_dkdv_tiles(typename P::Result& dk, typename P::Result& dv,
                                                      const Arguments& a, const Sequence& seq,
                                                      const HeadInputs& in, const BackwardRows& queries,
                                                      const TileWalk<P::kColumns>& tiles, bool has_others,
                                                      Mask mask, Keep keep) {
  using Shared = SharedTiles<P, 2>;
  typename P::Rows k_rows, v_rows;
  for_each_tile<P::kStages>(
      tiles,
      [&](const Tile& tile, auto is_masked, int stage) {
        load_queries<P, Shared, decltype(is_masked)::value>(in.q, queries.d_out, tile, stage, tiles.stop, seq,
                                                            has_others);
      },
      [&] {
        k_rows.set(Shared::rows(0));
        v_rows.set(Shared::rows(1));
      },
      [&](const Tile& tile, auto is_masked, int stage) {
        const QueryTile columns{queries.lse, queries.delta, tile.start, tiles.stop};
        accumulate_dkdv<P, decltype(is_masked)::value>(
            dk, dv, k_rows, v_rows, columns, Shared::columns(0, stage), Shared::columns(1, stage), a.qk_scale,
            [&](typename P::Scores& scores) {
              if constexpr (decltype(is_masked)::value) mask(scores, tile);
            },
            a.has_dropout(), [&] { return keep(tile); });
      });
}

// Writes scaled dk and dv to the rows key(r), and zeros where these are padding.
template <class P, class KeyAt>
__device__ __forceinline__ void write_dkdv(const Arguments& a, const Sequence& seq,
                                           const typename P::Result& dk, const typename P::Result& dv,
                                           KeyAt key) {
  auto exists = [&](int r) { return key(r) < seq.length && seq.token_kind[key(r)] != kPadding; };
  const float dk_scale = a.softmax_scale * a.keep_scale, dv_scale = a.keep_scale;
  write_rows<P>(seq.target(a.grads.dk, a.call, seq.first_row), dk, seq.num_rows, key, exists,
                [&](int) { return dk_scale; });
  write_rows<P>(seq.target(a.grads.dv, a.call, seq.first_row), dv, seq.num_rows, key, exists,
                [&](int) { return dv_scale; });
}

}  // namespace led::cuda
