// One tile of the backward: probabilities again from lse (Dao, "FlashAttention-2", 2023). With p the
// probabilities before and m the mask of dropout, and keep_scale left out:
//   dp = (d_out v^T) m, d_scores = p (dp - delta), delta = (sum(out * d_out) - d_lse) / keep_scale,
//   dv = (p m)^T d_out, dq = d_scores k, dk = d_scores^T q.
#pragma once

#include "column_tiles.cuh"
#include "dropout.cuh"
#include "fma.cuh"
#include "tensor_core.cuh"

namespace led::cuda {

// What the backward needs of the queries that are a lane's rows.
template <class P>
struct RowStatistics {
  float lse[P::kRowsPerLane];  // in units of log2; inf on rows without a result
  float delta[P::kRowsPerLane];

  __device__ __forceinline__ bool has_result(int r) const { return lse[r] != INFINITY; }  // NaN is one
};

// Of the rows row(r) of out and d_out, which start where lse and d_lse (or null) do; those that exist.
template <class P, class RowAt, class Exists>
__device__ __forceinline__ RowStatistics<P> read_rows(const Arguments& a, const Source& out,
                                                      const Source& d_out, const float* lse,
                                                      const float* d_lse, RowAt row, Exists exists) {
  RowStatistics<P> rows;
#pragma unroll
  for (int r = 0; r < P::kRowsPerLane; ++r) {
    rows.lse[r] = exists(r) ? lse[row(r)] * kLog2E : INFINITY;
    float delta = 0;
    if (rows.has_result(r)) {
#pragma unroll 4
      for (int d = 2 * lane_in_group(); d < P::kHeadDim; d += 8) {
        const float2 x = P::read_pair(out, row(r), d), y = P::read_pair(d_out, row(r), d);
        delta = fmaf(x.x, y.x, fmaf(x.y, y.y, delta));
      }
    }
    delta = row_sum_of(delta);
    if (d_lse != nullptr && rows.has_result(r)) delta -= d_lse[row(r)];
    rows.delta[r] = delta / a.keep_scale;
  }
  return rows;
}

// A tile of queries as columns: those from `start` on, of which those from `stop` on do not exist.
struct QueryTile {
  const float* lse;
  const float* delta;
  int start, stop;

  // Of the lane's columns, as elements (n, e) of a fragment; `other` for those that do not exist, if kHasEnd.
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

// dq += of a tile of keys. mask(scores) sets what does not count to -inf; keep() are dropout's bits.
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

// dk, dv += of a tile of queries; rows are keys.
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

// Scaled dk and dv to the rows key(r), zeros where those are padding.
template <class P, class KeyAt>
__device__ __forceinline__ void write_dkdv(const Arguments& a, const Sequence& seq,
                                           const typename P::Result& dk, const typename P::Result& dv,
                                           KeyAt key) {
  auto exists = [&](int r) { return key(r) < seq.length && seq.token_kind[key(r)] != kPadding; };
  const float dk_scale = a.softmax_scale * a.keep_scale, dv_scale = a.keep_scale;
  write_rows<P>(seq.target(a.p.dk, a.p, seq.first_row), dk, seq.num_rows, key, exists,
                [&](int) { return dk_scale; });
  write_rows<P>(seq.target(a.p.dv, a.p, seq.first_row), dv, seq.num_rows, key, exists,
                [&](int) { return dv_scale; });
}

// Writes to a row of a tensor the sum of num_splits rows of floats, split_stride apart, times scale: a warp.
template <class P>
__device__ __forceinline__ void sum_splits(const float* partials, int num_splits, int64_t split_stride,
                                           const Target& target, int row, float scale) {
  for (int d = 2 * lane_id(); d < target.head_dim; d += 2 * kWarpSize) {
    const bool is_pair = d + 1 < target.head_dim;
    float x0 = 0, x1 = 0;
#pragma unroll 8
    for (int split = 0; split < num_splits; ++split) {
      x0 += partials[split * split_stride + d];
      if (is_pair) x1 += partials[split * split_stride + d + 1];
    }
    P::write_pair(target, row, d, x0 * scale, x1 * scale);
  }
}

}  // namespace led::cuda
