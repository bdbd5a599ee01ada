// A tile of queries in the backward pass: probabilities are recomputed from lse, and five products share one
// pass (Dao et al., "FlashAttention", 2022, appendix B.4).
#pragma once

#include "tile.h"

namespace led {
namespace LED_ISA {

// Gradients of the packed keys, in the units of the tile's products: dk is to be multiplied by ln 2.
template <class T>
struct KeyGradients {
  T* dk;  // [keys, width]
  T* dv;  // [keys, width]

  static KeyGradients take(Arena& arena, int64_t keys, int64_t width) {
    KeyGradients g;
    g.dk = arena.take<T>(keys * width);
    g.dv = arena.take<T>(keys * width);
    return g;
  }
};

// Scores are logarithms to base 2: q carries softmax_scale * log2(e). A group is kRows neighbouring queries
// or keys.
template <class T>
struct BackwardTile {
  using G = Geometry<T>;
  T* q;      // [kBlockM, width]
  T* d_out;  // [kBlockM, width]
  T* dq;     // [kBlockM, width], to be multiplied by softmax_scale
  T* lse;    // [kBlockM], base 2
  T* delta;  // [kBlockM], sum of out d_out, less d_lse
  int64_t width;

  static BackwardTile take(Arena& arena, int64_t width) {
    BackwardTile t;
    t.width = width;
    t.q = arena.take<T>(G::kBlockM * width);
    t.d_out = arena.take<T>(G::kBlockM * width);
    t.dq = arena.take<T>(G::kBlockM * width);
    t.lse = arena.take<T>(G::kBlockM);
    t.delta = arena.take<T>(G::kBlockM);
    return t;
  }

  // row_at(i) is the row of query i in params.q, or -1. A query that is none has zeros everywhere: its
  // probabilities are 1, but they meet a d_out of 0 and a dS of 0.
  template <class RowAt>
  void load(const AttentionParams& params, int64_t batch, int64_t head, RowAt row_at) {
    load_tile<T>(params, params.q, batch, head, row_at, static_cast<T>(params.softmax_scale * kLog2E), width,
                 q);
    load_tile<T>(params, params.d_out, batch, head, row_at, T(1), width, d_out);
    memset(dq, 0, static_cast<size_t>(G::kBlockM * width) * sizeof(T));
    T out[kMaxHeadDim + G::kPanel];
    for (int i = 0; i < G::kBlockM; ++i) {
      const int64_t row = row_at(i);
      lse[i] = delta[i] = T(0);
      if (row < 0) continue;
      load_row<T>(row_address(params.out, params.dtype, batch, row, head), params.dtype, params.head_dim,
                  width, T(1), out);
      Vec<T> sum = broadcast<T>(0);
      for (int64_t d = 0; d < width; d += kLanes<T>) {
        sum = sum + led::LED_ISA::load(out + d) * led::LED_ISA::load(d_out + i * width + d);
      }
      delta[i] = reduce_sum<T>(sum);
      if (params.d_lse.data) delta[i] -= *lse_address<T>(params.d_lse, batch, row, head);
      lse[i] = *lse_address<T>(params.lse, batch, row, head) * static_cast<T>(kLog2E);
    }
  }

  void write_row(const AttentionParams& params, int i, int64_t batch, int64_t row, int64_t head,
                 bool exists) const {
    char* address = row_address(params.dq, params.dtype, batch, row, head);
    if (exists) {
      store_row<T>(address, params.dtype, params.head_dim, static_cast<T>(params.softmax_scale),
                   dq + i * width);
    } else {
      store_zero_row(address, params.dtype, params.head_dim);
    }
  }
};

// Probabilities and their gradients between one tile of queries and one block of keys.
template <class T>
struct ScoreBlock {
  using G = Geometry<T>;
  T* p;     // [kBlockM, kBlockN], scores, then probabilities
  T* ds;    // [kBlockM, kBlockN], gradients of probabilities, then of scores
  T* keep;  // [kBlockN], dropout factors of one query

  static ScoreBlock take(Arena& arena) {
    ScoreBlock s;
    s.p = arena.take<T>(G::kBlockM * G::kBlockN);
    s.ds = arena.take<T>(G::kBlockM * G::kBlockN);
    s.keep = arena.take<T>(G::kBlockN);
    return s;
  }

  // p = q kᵀ and ds = d_out vᵀ of a group and the panels begin .. end of the block at `slot`; zeros
  // elsewhere.
  void score(const BackwardTile<T>& tile, int group, const PackedKeys<T>& packed, int64_t slot, int64_t begin,
             int64_t end) {
    const int64_t row = group * G::kRows, width = tile.width;
    for (int64_t n = begin; n < end; n += G::kPanel) {
      multiply_tile<T, false, false>(tile.q + row * width, width, packed.k_panels + (slot + n) * width,
                                     G::kPanel, p + row * G::kBlockN + n, G::kBlockN, width);
      multiply_tile<T, false, false>(tile.d_out + row * width, width, packed.v_panels + (slot + n) * width,
                                     G::kPanel, ds + row * G::kBlockN + n, G::kBlockN, width);
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

  // Where the keys of the panel at n are not visible, probabilities and gradients become 0.
  template <Visible visible>
  void hide(int group, int64_t n, const Band<T>* bands, const Position<T>* positions) {
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

  // p = exp2(p - lse), ds = p (ds - delta); draw(i) fills `keep` for query i of the group.
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

  // dv += pᵀ d_out and dk += dsᵀ q of the keys n .. n + kRows of the block, over the queries begin .. end of
  // the tile.
  void add_to_keys(const BackwardTile<T>& tile, int64_t n, int64_t begin, int64_t end, T* dk, T* dv) const {
    const int64_t width = tile.width;
    for (int64_t d = 0; d < width; d += G::kPanel) {
      multiply_tile<T, true, true>(p + begin * G::kBlockN + n, G::kBlockN, tile.d_out + begin * width + d,
                                   width, dv + n * width + d, width, end - begin);
      multiply_tile<T, true, true>(ds + begin * G::kBlockN + n, G::kBlockN, tile.q + begin * width + d, width,
                                   dk + n * width + d, width, end - begin);
    }
  }

  // dq += ds k of a group, over the keys begin .. end of the block at `slot`.
  void add_to_queries(BackwardTile<T>& tile, int group, const PackedKeys<T>& packed, int64_t slot,
                      int64_t begin, int64_t end) const {
    const int64_t row = group * G::kRows, width = tile.width;
    for (int64_t d = 0; d < width; d += G::kPanel) {
      multiply_tile<T, false, true>(ds + row * G::kBlockN + begin, G::kBlockN,
                                    packed.k_rows + (slot + begin) * width + d, width,
                                    tile.dq + row * width + d, width, end - begin);
    }
  }
};

}  // namespace LED_ISA
}  // namespace led
