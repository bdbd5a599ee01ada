// A tile of queries attends to packed keys with an online softmax (Milakov and Gimelshein, 2018).
#pragma once

#include "tile.h"

namespace led {
namespace LED_ISA {

// Scores are logarithms to base 2, as q carries softmax_scale * log2(e).
template <class T>
struct ForwardTile {
  using G = Geometry<T>;
  static constexpr T kSlack = 8;
  T* q;        // [kBlockM, block_d]
  T* acc;      // [kBlockM, block_d], sum of p v
  T* row_max;  // [kBlockM]
  T* row_sum;  // [kBlockM, kLanes]
  T* p;        // [kRows, kBlockN], scores, then probabilities of one group
  T* keep;     // [kBlockN], dropout factors of one query
  int64_t block_d;

  static ForwardTile take(Arena& arena, int64_t block_d) {
    ForwardTile t;
    t.block_d = block_d;
    t.q = arena.take<T>(G::kBlockM * block_d);
    t.acc = arena.take<T>(G::kBlockM * block_d);
    t.row_max = arena.take<T>(G::kBlockM);
    t.row_sum = arena.take<T>(G::kBlockM * kLanes<T>);
    t.p = arena.take<T>(G::kRows * G::kBlockN);
    t.keep = arena.take<T>(G::kBlockN);
    return t;
  }

  // Query i is the row row_at(i) of in.q, or none if that is -1.
  template <class RowAt>
  void load(const AttentionInputs& in, int64_t batch, int64_t head, RowAt row_at) {
    load_tile<T>(in, in.q, batch, head, row_at, static_cast<T>(in.softmax_scale * kLog2E), block_d, q);
    for (int i = 0; i < G::kBlockM; ++i) row_max[i] = -kInfinity<T>;
    memset(acc, 0, static_cast<size_t>(G::kBlockM * block_d) * sizeof(T));
    memset(row_sum, 0, static_cast<size_t>(G::kBlockM * kLanes<T>) * sizeof(T));
  }

  // p becomes q kᵀ of a group and the packed keys from `offset` on.
  void score(int group, const PackedKeys<T>& packed, int64_t offset, int64_t keys) {
    for (int64_t n = 0; n < keys; n += G::kPanel) {
      multiply_tile<T, false, false>(q + group * G::kRows * block_d, block_d,
                                     packed.k_panels + (offset + n) * block_d, G::kPanel, p + n, G::kBlockN,
                                     block_d);
    }
  }

  // Scores of the panel at n become -inf where the query does not see its key.
  template <Visible visible>
  void mask(int64_t n, const Band<T>* bands, const Position<T>* positions) {
    for (int i = 0; i < G::kRows; ++i) {
      for (int64_t lane = n; lane < n + G::kPanel; lane += kLanes<T>) {
        T* score = p + i * G::kBlockN + lane;
        const BitsVec<T> seen = sees<T, visible>(bands[i], led::LED_ISA::load(positions + lane));
        store(score, select<T>(seen, led::LED_ISA::load(score), broadcast<T>(-kInfinity<T>)));
      }
    }
  }

  // The group attends to the keys that were scored: acc grows by softmax(p) v, by way of new maxima. draw(i)
  // fills `keep` for query i of the group.
  template <class Draw>
  void attend(int group, const PackedKeys<T>& packed, int64_t offset, int64_t keys,
              const DropoutRow<T>& dropout, Draw draw) {
    for (int i = 0; i < G::kRows; ++i) {
      online_softmax_update(group * G::kRows + i, p + i * G::kBlockN, keys);
      if (dropout.active()) {
        draw(i);
        T* row = p + i * G::kBlockN;
        for (int64_t n = 0; n < keys; n += kLanes<T>) {
          store(row + n, led::LED_ISA::load(row + n) * led::LED_ISA::load(keep + n));
        }
      }
    }
    for (int64_t d = 0; d < block_d; d += G::kPanel) {
      multiply_tile<T, false, true>(p, G::kBlockN, packed.v_rows + offset * block_d + d, block_d,
                                    acc + group * G::kRows * block_d + d, block_d, keys);
    }
  }

  // Adds what another tile of the same queries has summed over other keys.
  void merge(const ForwardTile& other) {
    for (int i = 0; i < G::kBlockM; ++i) {
      const T new_max = larger(row_max[i], other.row_max[i]),
              reference = new_max == -kInfinity<T> ? T(0) : new_max;
      const T mine = exp2_scalar(row_max[i] - reference), theirs = exp2_scalar(other.row_max[i] - reference);
      for (int64_t n = i * kLanes<T>; n < (i + 1) * kLanes<T>; ++n) {
        row_sum[n] = row_sum[n] * mine + other.row_sum[n] * theirs;
      }
      for (int64_t d = i * block_d; d < (i + 1) * block_d; ++d)
        acc[d] = acc[d] * mine + other.acc[d] * theirs;
      row_max[i] = new_max;
    }
  }

  // Writes query i's out and lse to (batch, row, head) of the results; zeros and +inf if it is none.
  void write_row(const CpuAttentionParams& params, int i, int64_t batch, int64_t row, int64_t head,
                 bool exists) const {
    const AttentionCall& call = params.call;
    char* out = row_address(params.results.out, call.dtype, batch, row, head);
    T& lse = *lse_address<T>(params.results.lse, batch, row, head);
    if (!exists) {
      store_zero_row(out, call.dtype, call.head_dim);
      lse = kInfinity<T>;
      return;
    }
    const T sum = reduce_sum<T>(led::LED_ISA::load(row_sum + i * kLanes<T>));
    store_row<T>(out, call.dtype, call.head_dim, T(1) / sum, acc + i * block_d);
    lse = (row_max[i] + log2_scalar(sum)) * static_cast<T>(kLn2);
  }

  // Does one query's step of the online softmax: scores become exp2(score - maximum), and what was summed
  // moves to the new maximum.
  void online_softmax_update(int row, T* scores, int64_t keys) {
    using led::LED_ISA::load;
    Vec<T> max0 = load(scores), max1 = load(scores + kLanes<T>);
    for (int64_t n = G::kPanel; n < keys; n += G::kPanel) {
      max0 = maximum<T>(load(scores + n), max0);
      max1 = maximum<T>(load(scores + n + kLanes<T>), max1);
    }
    // A maximum that is a little too low does no harm (probabilities grow to 2^kSlack at most), and keeping
    // it saves nearly every rescaling of what was summed.
    const T block_max = reduce_max<T>(maximum<T>(max0, max1));
    if (block_max > row_max[row] + kSlack) {
      scale_row(row, exp2_scalar(row_max[row] - block_max));
      row_max[row] = block_max;
    }
    const T reference =
        row_max[row] == -kInfinity<T> ? T(0) : row_max[row];  // nothing was seen yet, and inf - inf is NaN
    Vec<T> sum0 = load(row_sum + row * kLanes<T>), sum1 = broadcast<T>(0);
    for (int64_t n = 0; n < keys; n += G::kPanel) {
      const Vec<T> p0 = exp2_vec<T>(load(scores + n) - reference);
      const Vec<T> p1 = exp2_vec<T>(load(scores + n + kLanes<T>) - reference);
      store(scores + n, p0);
      store(scores + n + kLanes<T>, p1);
      sum0 = sum0 + p0;
      sum1 = sum1 + p1;
    }
    store(row_sum + row * kLanes<T>, sum0 + sum1);
  }

  void scale_row(int row, T factor) {
    using led::LED_ISA::load;
    T* sum = row_sum + row * kLanes<T>;
    store(sum, load(sum) * factor);
    for (int64_t d = row * block_d; d < (row + 1) * block_d; d += kLanes<T>)
      store(acc + d, load(acc + d) * factor);
  }
};

}  // namespace LED_ISA
}  // namespace led
