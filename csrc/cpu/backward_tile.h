// A tile of queries in the backward recomputes its probabilities from lse, and five products share one pass
// (Dao et al., "FlashAttention", 2022, appendix B.4).
#pragma once

#include "tile.h"

namespace led {
namespace LED_ISA {

// Gradients of packed keys, in the units of the tile's products: dk is to be multiplied by ln 2.
template <class T>
struct KeyGradients {
  T* dk;  // [keys, block_d]
  T* dv;  // [keys, block_d]

  static KeyGradients take(Arena& arena, int64_t keys, int64_t block_d) {
    KeyGradients g;
    g.dk = arena.take<T>(keys * block_d);
    g.dv = arena.take<T>(keys * block_d);
    return g;
  }
};

// Scores are logarithms to base 2, as q carries softmax_scale * log2(e).
template <class T>
struct BackwardTile {
  using G = Geometry<T>;
  T* q;      // [kBlockM, block_d]
  T* d_out;  // [kBlockM, block_d]
  T* dq;     // [kBlockM, block_d], to be multiplied by softmax_scale
  T* lse;    // [kBlockM], base 2
  T* delta;  // [kBlockM], sum(out * d_out) - d_lse
  int64_t block_d;

  static BackwardTile take(Arena& arena, int64_t block_d) {
    BackwardTile t;
    t.block_d = block_d;
    t.q = arena.take<T>(G::kBlockM * block_d);
    t.d_out = arena.take<T>(G::kBlockM * block_d);
    t.dq = arena.take<T>(G::kBlockM * block_d);
    t.lse = arena.take<T>(G::kBlockM);
    t.delta = arena.take<T>(G::kBlockM);
    return t;
  }

  // Query i is the row row_at(i) of call.q, or none if that is -1. Such a query has zeros everywhere: its
  // probabilities are 1, but they meet a d_out of 0 and a ds of 0.
  template <class RowAt>
  void load(const CpuAttentionParams& params, int64_t batch, int64_t head, RowAt row_at) {
    const AttentionCall& call = params.call;
    const AttentionResults& results = params.results;
    const AttentionGradients& grads = params.grads;
    load_tile<T>(call, call.q, batch, head, row_at, static_cast<T>(call.softmax_scale * kLog2E), block_d, q);
    load_tile<T>(call, grads.d_out, batch, head, row_at, T(1), block_d, d_out);
    memset(dq, 0, static_cast<size_t>(G::kBlockM * block_d) * sizeof(T));
    T out[kMaxHeadDim + G::kPanel];
    for (int i = 0; i < G::kBlockM; ++i) {
      const int64_t row = row_at(i);
      lse[i] = delta[i] = T(0);
      if (row < 0) continue;
      load_row<T>(row_address(results.out, call.dtype, batch, row, head), call.dtype, call.head_dim, block_d,
                  T(1), out);
      Vec<T> sum = broadcast<T>(0);
      for (int64_t d = 0; d < block_d; d += kLanes<T>) {
        sum = sum + led::LED_ISA::load(out + d) * led::LED_ISA::load(d_out + i * block_d + d);
      }
      delta[i] = reduce_sum<T>(sum);
      if (grads.d_lse.data) delta[i] -= *lse_address<T>(grads.d_lse, batch, row, head);
      lse[i] = *lse_address<T>(results.lse, batch, row, head) * static_cast<T>(kLog2E);
    }
  }

  // Writes query i's dq to (batch, row, head); zeros if it is none.
  void write_row(const CpuAttentionParams& params, int i, int64_t batch, int64_t row, int64_t head,
                 bool exists) const {
    const AttentionCall& call = params.call;
    char* address = row_address(params.grads.dq, call.dtype, batch, row, head);
    if (exists) {
      store_row<T>(address, call.dtype, call.head_dim, static_cast<T>(call.softmax_scale), dq + i * block_d);
    } else {
      store_zero_row(address, call.dtype, call.head_dim);
    }
  }
};

// Probabilities and their gradients between a tile of queries and a tile of keys.
template <class T>
struct ScoreTile {
  using G = Geometry<T>;
  T* p;     // [kBlockM, kBlockN], scores, then probabilities
  T* ds;    // [kBlockM, kBlockN], gradients of probabilities, then of scores
  T* keep;  // [kBlockN], dropout factors of one query

  static ScoreTile take(Arena& arena) {
    ScoreTile s;
    s.p = arena.take<T>(G::kBlockM * G::kBlockN);
    s.ds = arena.take<T>(G::kBlockM * G::kBlockN);
    s.keep = arena.take<T>(G::kBlockN);
    return s;
  }

  // p becomes q kᵀ and ds becomes d_out vᵀ of a group and the panels begin .. end of the tile of packed keys
  // at `offset`; zeros elsewhere.
  void score(const BackwardTile<T>& tile, int group, const PackedKeys<T>& packed, int64_t offset,
             int64_t begin, int64_t end) {
    const int64_t row = group * G::kRows, block_d = tile.block_d;
    for (int64_t n = begin; n < end; n += G::kPanel) {
      multiply_tile<T, false, false>(tile.q + row * block_d, block_d,
                                     packed.k_panels + (offset + n) * block_d, G::kPanel,
                                     p + row * G::kBlockN + n, G::kBlockN, block_d);
      multiply_tile<T, false, false>(tile.d_out + row * block_d, block_d,
                                     packed.v_panels + (offset + n) * block_d, G::kPanel,
                                     ds + row * G::kBlockN + n, G::kBlockN, block_d);
    }
    clear(group, 0, begin);
    clear(group, end, G::kBlockN);
  }

  void clear(int group, int64_t begin, int64_t end) {
    if (begin >= end) return;
    for (int64_t i = group * G::kRows; i < (group + 1) * G::kRows; ++i) {
      memset(p + i * G::kBlockN + begin, 0, static_cast<size_t>(end - begin) * sizeof(T));
      memset(ds + i * G::kBlockN + begin, 0, static_cast<size_t>(end - begin) * sizeof(T));
    }
  }

  // Where a query does not see a key of the panel at n, its score becomes -inf and its gradient 0.
  template <Visible visible>
  void mask(int group, int64_t n, const Band<T>* bands, const Position<T>* positions) {
    using led::LED_ISA::load;
    for (int i = 0; i < G::kRows; ++i) {
      const int64_t row = (group * G::kRows + i) * G::kBlockN;
      for (int64_t lane = n; lane < n + G::kPanel; lane += kLanes<T>) {
        const BitsVec<T> seen = sees<T, visible>(bands[i], load(positions + lane));
        store(p + row + lane, select<T>(seen, load(p + row + lane), broadcast<T>(-kInfinity<T>)));
        store(ds + row + lane, select<T>(seen, load(ds + row + lane), broadcast<T>(0)));
      }
    }
  }

  // p becomes exp2(p - lse), and ds becomes p (ds - delta). draw(i) fills `keep` for query i of the group.
  template <class Draw>
  void differentiate(const BackwardTile<T>& tile, int group, int64_t begin, int64_t end,
                     const DropoutRow<T>& dropout, Draw draw) {
    using led::LED_ISA::load;
    for (int i = 0; i < G::kRows; ++i) {
      const int row = group * G::kRows + i;
      T *p_row = p + row * G::kBlockN, *ds_row = ds + row * G::kBlockN;
      const T lse = tile.lse[row], delta = tile.delta[row];
      if (dropout.active()) {
        draw(i);
        for (int64_t n = begin; n < end; n += kLanes<T>) {
          const Vec<T> probability = exp2_vec<T>(load(p_row + n) - lse), factor = load(keep + n - begin);
          store(p_row + n, probability * factor);
          store(ds_row + n, probability * (load(ds_row + n) * factor - delta));
        }
      } else {
        for (int64_t n = begin; n < end; n += kLanes<T>) {
          const Vec<T> probability = exp2_vec<T>(load(p_row + n) - lse);
          store(p_row + n, probability);
          store(ds_row + n, probability * (load(ds_row + n) - delta));
        }
      }
    }
  }

  // dv grows by pᵀ d_out and dk by dsᵀ q, of the keys n .. n + kRows of their tile and over the queries
  // begin .. end of theirs.
  void accumulate_dkdv(const BackwardTile<T>& tile, int64_t n, int64_t begin, int64_t end, T* dk,
                       T* dv) const {
    const int64_t block_d = tile.block_d;
    for (int64_t d = 0; d < block_d; d += G::kPanel) {
      multiply_tile<T, true, true>(p + begin * G::kBlockN + n, G::kBlockN, tile.d_out + begin * block_d + d,
                                   block_d, dv + n * block_d + d, block_d, end - begin);
      multiply_tile<T, true, true>(ds + begin * G::kBlockN + n, G::kBlockN, tile.q + begin * block_d + d,
                                   block_d, dk + n * block_d + d, block_d, end - begin);
    }
  }

  // dq of a group grows by ds k, over the keys begin .. end of the tile at `offset`.
  void accumulate_dq(BackwardTile<T>& tile, int group, const PackedKeys<T>& packed, int64_t offset,
                     int64_t begin, int64_t end) const {
    const int64_t row = group * G::kRows, block_d = tile.block_d;
    for (int64_t d = 0; d < block_d; d += G::kPanel) {
      multiply_tile<T, false, true>(ds + row * G::kBlockN + begin, G::kBlockN,
                                    packed.k_rows + (offset + begin) * block_d + d, block_d,
                                    tile.dq + row * block_d + d, block_d, end - begin);
    }
  }
};

}  // namespace LED_ISA
}  // namespace led
