// Global attention, forward: each global query attends to every key of its sequence. The keys are split among
// thread blocks, as there are few queries; a second kernel merges what they found.
#include "configs.cuh"
#include "forward.cuh"
#include "splits.cuh"

namespace led::cuda {

// A row of partial results is acc [head_dim], row_max, row_sum.
template <class P>
__global__ void __launch_bounds__(P::kThreads, 1) global_forward_kernel(const Arguments a) {
  const AttentionCall& call = a.call;
  const Sequence seq(call);
  const SplitBlock<P> block(a, seq);
  if (block.is_empty(seq)) return;
  auto slot = [&](int r) { return block.slot(r); };
  auto query = [&](int r) { return seq.dropout_position(slot(r)); };

  const HeadInputs in(call, seq, 0);
  OnlineSoftmax<P> softmax;
  attend_tiles<P, true>(softmax, a, seq, in, block.slot_start, seq.num_globals, block.bands(), block.tiles(),
                        [&](const Tile& tile) {
                          const Dropout dropout(a, seq, kGlobalStream);
                          return dropout.of_keys<P::kColumns, P::kRowsPerLane>(tile.start, query);
                        });

  softmax.finish();
  const int head_dim = static_cast<int>(call.head_dim);
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

// Writes out and lse of one slot and head; a thread block is one warp.
template <class P>
__global__ void __launch_bounds__(kWarpSize) global_merge_kernel(const Arguments a) {
  const AttentionCall& call = a.call;
  const int slot = static_cast<int>(blockIdx.x), head_dim = static_cast<int>(call.head_dim);
  const Sequence seq(call);
  const SlotPartials partials(a, seq, 0, slot, head_dim + 2);
  const int num_splits = partials.num_splits, lane = lane_id();
  float row_max = kNoKey, row_sum = 0;  // first of this lane's splits
  for (int split = lane; split < num_splits; split += kWarpSize) {
    const float* statistics = partials.rows + split * partials.stride + head_dim;
    const float split_max = statistics[0], split_sum = statistics[1];
    const float new_max = fmaxf(row_max, split_max);
    row_sum = row_sum * exp2_approx(row_max - new_max) + split_sum * exp2_approx(split_max - new_max);
    row_max = new_max;
  }
  const float lane_max = row_max;
  row_max = warp_max_of(row_max);
  row_sum = warp_sum_of(row_sum * exp2_approx(lane_max - row_max));

  sum_splits<P>(partials, seq.target(a.results.out, call, 0), slot,
                num_splits > 0 ? a.keep_scale / row_sum : 0.0f,
                [&](const float* partial) { return exp2_approx(partial[head_dim] - row_max); });
  if (lane == 0) {
    static_cast<float*>(a.results.lse.data)[seq.lse_offset(a.results.lse, slot)] =
        num_splits > 0 ? (row_max + log2f(row_sum)) * kLn2 : INFINITY;
  }
}

template <int kBlockD>
void launch_global_forward(const Arguments& a, Unit unit) {
  choose_element<kBlockD>(a, unit, [&](auto element) {
    using T = Tiles<decltype(element), kBlockD>;
    choose_warps<typename T::FewGlobalQueries, typename T::ManyGlobalQueries>(a, [&](auto products) {
      using P = decltype(products);
      launch(global_forward_kernel<P>, split_grid<P>(a), P::kThreads, SharedTiles<P, 1>::kBytes, a);
    });
    launch(global_merge_kernel<typename T::ManyGlobalQueries>, slot_grid(a), kWarpSize, 0, a);
  });
}
template void launch_global_forward<LED_HEAD_DIM>(const Arguments&, Unit);

}  // namespace led::cuda
