// Which probabilities dropout keeps: the bits of led_kernels/philox.py, of a lane's share of a fragment.
#pragma once

#include "../philox.h"
#include "arguments.h"
#include "fragment.cuh"
#include "tile_walk.cuh"

namespace led::cuda {

class Dropout {
 public:
  __device__ __forceinline__ Dropout(const Arguments& a, const Sequence& seq, uint32_t stream)
      : last_dropped_(a.last_dropped),
        head_(static_cast<uint32_t>(seq.batch * a.call.heads + seq.head)),
        stream_(stream),
        offset_(a.call.mask.position_offset[seq.batch]) {
    const auto seed = static_cast<uint64_t>(*a.call.dropout.device_seed);
    k0_ = static_cast<uint32_t>(seed);
    k1_ = static_cast<uint32_t>(seed >> 32);
  }

  // Where a row stands in the whole sequence: draws are made for these positions.
  __device__ __forceinline__ int position(int row) const { return row + offset_; }

  // Rows are queries at the positions query(r); columns are the keys of the rows from key_start, a multiple
  // of 4, on. Neighboring lanes see the two halves of a draw of four keys, so each draws for one of two
  // blocks of columns.
  template <int kColumns, int kRowsPerLane, class QueryAt>
  __device__ __forceinline__ ElementBits of_keys(int key_start, QueryAt query) const {
    ElementBits keep = 0;
    const int t = lane_in_group();
#pragma unroll 1
    for (int n = 0; n < kColumns / 8; n += 2) {
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r) {
        const uint32_t mine = draw(((position(key_start) + 8 * (n + t % 2)) >> 2) + t / 2, query(r));
        const uint32_t other = __shfl_xor_sync(kAllLanes, mine, 1);
        const uint32_t first = t % 2 == 0 ? mine & 3 : other >> 2,
                       second = t % 2 == 0 ? other & 3 : mine >> 2;
        keep |= static_cast<ElementBits>(first) << ((n * kRowsPerLane + r) * 2);
        keep |= static_cast<ElementBits>(second) << (((n + 1) * kRowsPerLane + r) * 2);
      }
    }
    return keep;
  }

  // Rows are keys, of which row 0 of the warp is key_start, a multiple of 8; columns are queries at the
  // positions query(column). The four lanes that see a draw's four keys each draw for one of four columns.
  template <int kColumns, int kRowsPerLane, class QueryAt>
  __device__ __forceinline__ ElementBits of_queries(int key_start, QueryAt query) const {
    ElementBits keep = 0;
    const int key = lane_group() % 4;
#pragma unroll 1
    for (int n = 0; n < kColumns / 8; n += 2) {
      const int my_query = query(8 * (n + key / 2) + 2 * lane_in_group() + key % 2);
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r) {
        const uint32_t mine = draw((position(key_start) >> 2) + 2 * r + lane_group() / 4, my_query);
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          const uint32_t draws = step == 0 ? mine : __shfl_xor_sync(kAllLanes, mine, 4 * step);
          const int column = key ^ step;  // of the four: block n + column / 2, element column % 2
          keep |= static_cast<ElementBits>(draws >> key & 1)
                  << (((n + column / 2) * kRowsPerLane + r) * 2 + column % 2);
        }
      }
    }
    return keep;
  }

  // Elements are of keys and queries at any positions, key(n, r, e) and query(n, r, e).
  template <int kColumns, int kRowsPerLane, class KeyAt, class QueryAt>
  __device__ __forceinline__ ElementBits of_pairs(KeyAt key, QueryAt query) const {
    ElementBits keep = 0;
#pragma unroll 1
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r) {
#pragma unroll 1
        for (int e = 0; e < 2; ++e) {
          const int k = key(n, r, e);
          const uint32_t bit = draw(k >> 2, query(n, r, e)) >> (k & 3) & 1;
          keep |= static_cast<ElementBits>(bit) << ((n * kRowsPerLane + r) * 2 + e);
        }
      }
    }
    return keep;
  }

 private:
  // Bit i says whether key 4 * group + i of the query is kept.
  __device__ __forceinline__ uint32_t draw(int group, int query) const {
    uint32_t c[4] = {static_cast<uint32_t>(group), static_cast<uint32_t>(query), head_, stream_};
    uint32_t k0 = k0_, k1 = k1_;
#pragma unroll
    for (int round = 0; round < 10; ++round, philox_next_key(k0, k1))
      philox_round(c[0], c[1], c[2], c[3], k0, k1);
    uint32_t keep = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) keep |= static_cast<uint32_t>(c[i] > last_dropped_) << i;
    return keep;
  }

  uint32_t k0_, k1_, last_dropped_, head_, stream_;
  int offset_;
};

// The bits of banded attention, for a tile of keys under the queries of the rows query(r).
template <class P, class QueryAt>
__device__ __forceinline__ ElementBits keep_of_tile(const Arguments& a, const Sequence& seq, const Tile& tile,
                                                    QueryAt query) {
  const Dropout dropout(a, seq, kBandedStream);
  auto query_position = [&](int r) { return dropout.position(query(r)); };
  if (!tile.is_global) return dropout.of_keys<P::kColumns, P::kRowsPerLane>(tile.start, query_position);
  return dropout.of_pairs<P::kColumns, P::kRowsPerLane>(
      [&](int n, int, int e) { return seq.dropout_position(tile.start + 8 * n + 2 * lane_in_group() + e); },
      [&](int, int r, int) { return query_position(r); });
}

}  // namespace led::cuda
