// Global attention, forward: each global query over every key of its sequence. The keys are split among
// blocks, as there are few queries; a second kernel merges what they found.
#include "column_tiles.cuh"
#include "configs.cuh"
#include "forward.cuh"
#include "global_tiles.cuh"

namespace led::cuda {

// A row of partial results: acc [head_dim], row_max, row_sum.
template <class P>
__global__ void __launch_bounds__(P::kThreads, 1) global_forward_kernel(const Arguments a) {
  const AttentionParams& p = a.p;
  const Sequence seq(p, static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y));
  const GlobalTiles<P> block(a, seq);
  if (block.is_empty(seq)) return;
  auto slot = [&](int r) { return block.slot(r); };
  auto query = [&](int r) { return seq.position(slot(r), 0); };

  using Shared = SharedTiles<P, 1>;
  const Source k = seq.source(p.k, p, seq.first_row), v = seq.source(p.v, p, seq.first_row);
  const RowBands<P::kRowsPerLane> bands({0, block.stop, block.stop}, [](int) { return 0; });
  ColumnTiles<P::kColumns> tiles(block.start, block.stop);
  const bool has_padding = seq.has_padding(block.start, block.stop);
  if (has_padding) tiles.mask_all();

  P::template load<P::kRows, true>(Shared::rows(0), seq.source(p.q, p, 0), block.slot_start, seq.num_globals);
  typename P::Rows q_rows;
  OnlineSoftmax<P> softmax;
  for_each_tile<P::kStages>(
      tiles,
      [&](const Tile& tile, auto is_masked, int stage) {
        load_keys<P, Shared, decltype(is_masked)::value>(k, v, tile, stage, block.stop, seq, has_padding);
      },
      [&] { q_rows.set(Shared::rows(0)); },
      [&](const Tile& tile, auto is_masked, int stage) {
        typename P::Scores scores;
        P::multiply_transposed(scores, q_rows, Shared::columns(0, stage));
        if constexpr (decltype(is_masked)::value) mask_scores(scores, tile, bands, seq, has_padding);
        softmax.update(scores, a.qk_scale);
        if (a.has_dropout()) {
          const Dropout dropout(a, seq, kGlobalStream);
          keep_elements(scores, dropout.of_keys<P::kColumns, P::kRowsPerLane>(tile.start, query), 0.0f);
        }
        P::accumulate(softmax.acc, scores, Shared::columns(1, stage));
      });

  softmax.finish();
  const int head_dim = static_cast<int>(p.head_dim);
  float* rows = split_rows(a, seq, 0, block.split, head_dim + 2);
  write_partial<P>(rows, head_dim + 2, head_dim, softmax.acc, seq.num_globals, slot);
#pragma unroll
  for (int r = 0; r < P::kRowsPerLane; ++r) {
    if (lane_in_group() == 0 && slot(r) < seq.num_globals) {
      float* statistics = rows + static_cast<int64_t>(slot(r)) * (head_dim + 2) + head_dim;
      statistics[0] = softmax.row_max[r];
      statistics[1] = softmax.row_sum[r];
    }
  }
}

// out and lse of one slot and head: one warp.
template <class P>
__global__ void __launch_bounds__(kWarpSize) global_merge_kernel(const Arguments a) {
  const AttentionParams& p = a.p;
  const int slot = static_cast<int>(blockIdx.x), head_dim = static_cast<int>(p.head_dim);
  const Sequence seq(p, static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y));
  const int num_splits = slot < seq.num_globals ? splits_in_use(a, seq) : 0;
  const float* rows = split_rows(a, seq, 0, 0, head_dim + 2) + static_cast<int64_t>(slot) * (head_dim + 2);
  const int64_t stride = p.mask.max_globals * (head_dim + 2);
  const int lane = lane_id();
  float row_max = kNoKey, row_sum = 0;  // first of this lane's splits
  for (int split = lane; split < num_splits; split += kWarpSize) {
    const float split_max = rows[split * stride + head_dim], split_sum = rows[split * stride + head_dim + 1];
    const float new_max = fmaxf(row_max, split_max);
    row_sum = row_sum * exp2_approx(row_max - new_max) + split_sum * exp2_approx(split_max - new_max);
    row_max = new_max;
  }
  const float lane_max = row_max;
  row_max = warp_max_of(row_max);
  row_sum = warp_sum_of(row_sum * exp2_approx(lane_max - row_max));

  const Target out = seq.target(p.out, p, 0);
  const float scale = num_splits > 0 ? a.keep_scale / row_sum : 0.0f;
  for (int d = 2 * lane; d < head_dim; d += 2 * static_cast<int>(kWarpSize)) {
    const bool is_pair = d + 1 < head_dim;
    float x0 = 0, x1 = 0;
#pragma unroll 8
    for (int split = 0; split < num_splits; ++split) {
      const float* row = rows + split * stride;
      const float factor = exp2_approx(row[head_dim] - row_max);
      x0 = fmaf(row[d], factor, x0);
      if (is_pair) x1 = fmaf(row[d + 1], factor, x1);
    }
    P::write_pair(out, slot, d, x0 * scale, x1 * scale);
  }
  if (lane == 0) {
    static_cast<float*>(p.lse.data)[seq.lse_offset(p.lse, slot)] =
        num_splits > 0 ? (row_max + log2f(row_sum)) * kLn2 : INFINITY;
  }
}

template <int kHeadDim>
void launch_global_forward(const Arguments& a, Unit unit) {
  choose_element<kHeadDim>(a, unit, [&](auto element) {
    using T = Tiles<decltype(element), kHeadDim>;
    const auto heads = static_cast<unsigned>(a.p.heads), batch = static_cast<unsigned>(a.p.batch);
    choose_warps<typename T::FewGlobalQueries, typename T::ManyGlobalQueries>(a, [&](auto products) {
      using P = decltype(products);
      const unsigned blocks = ceil_div(a.p.mask.max_globals, P::kRows) * static_cast<unsigned>(a.num_splits);
      launch(global_forward_kernel<P>, dim3(blocks, heads, batch), P::kThreads, SharedTiles<P, 1>::kBytes,
             a.p, a);
    });
    launch(global_merge_kernel<typename T::ManyGlobalQueries>,
           dim3(static_cast<unsigned>(a.p.mask.max_globals), heads, batch), kWarpSize, 0, a.p, a);
  });
}
template void launch_global_forward<LED_HEAD_DIM>(const Arguments&, Unit);

}  // namespace led::cuda
