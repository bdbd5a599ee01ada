// Global attention, backward. Every split of the keys finishes its own dk and dv and sums dq in a workspace
// of its own; a second pass adds these sums in a fixed order, so that the result is deterministic.
#pragma once

#include "backward_tile.h"
#include "global_forward.h"

namespace led {
namespace LED_ISA {

template <class T>
class GlobalBackward {
  using G = Geometry<T>;

 public:
  explicit GlobalBackward(const CpuAttentionParams& p)
      : p_(p),
        call_(p.call),
        block_d_(round_up(call_.head_dim, G::kPanel)),
        tiles_(ceil_div(call_.mask.max_globals, G::kBlockM)),
        splits_(p, call_.batch * call_.heads),
        dropout_(call_.dropout, kGlobalStream) {}

  void run() {
    Arena thread_sizes(nullptr);
    take(thread_sizes);
    const int64_t heads = call_.batch * call_.heads, tasks = heads * splits_.per_head;
    const int64_t dq_size = tiles_ * G::kBlockM * block_d_,
                  dq_bytes = dq_size * static_cast<int64_t>(sizeof(T));
    Scratch scratch(thread_sizes.used() * p_.execution.num_threads), workspace(dq_bytes * tasks);
    parallel_tasks(tasks, p_.execution, [&](int64_t task, int thread) {
      Arena arena(scratch.at(thread_sizes.used() * thread));
      Buffers buffers = take(arena);
      buffers.tile.dq = reinterpret_cast<T*>(workspace.at(dq_bytes * task));
      const int64_t batch_head = task / splits_.per_head;
      run_split(buffers, Sequence(call_, batch_head / call_.heads), batch_head % call_.heads,
                task % splits_.per_head * splits_.keys);
    });
    parallel_tasks(heads, p_.execution, [&](int64_t batch_head, int) {
      T* dq = reinterpret_cast<T*>(workspace.at(dq_bytes * batch_head * splits_.per_head));
      for (int64_t split = 1; split < splits_.per_head; ++split) {
        for (int64_t i = 0; i < dq_size; ++i) dq[i] += dq[split * dq_size + i];
      }
      const Sequence seq(call_, batch_head / call_.heads);
      BackwardTile<T> tile = {};
      tile.block_d = block_d_;
      for (int64_t slot = 0; slot < call_.mask.max_globals; ++slot) {
        tile.dq = dq + slot * block_d_;
        tile.write_row(p_, 0, seq.batch, slot, batch_head % call_.heads, slot < seq.num_global_queries);
      }
    });
  }

 private:
  // All tiles of queries of one head lie one behind the other; `tile` is the first.
  struct Buffers {
    BackwardTile<T> tile;
    ScoreTile<T> scores;
    PackedKeys<T> keys;
    KeyGradients<T> sums;
  };

  Buffers take(Arena& arena) const {
    Buffers b = {};
    b.tile.block_d = block_d_;
    b.tile.q = arena.take<T>(tiles_ * G::kBlockM * block_d_);
    b.tile.d_out = arena.take<T>(tiles_ * G::kBlockM * block_d_);
    b.tile.lse = arena.take<T>(tiles_ * G::kBlockM);
    b.tile.delta = arena.take<T>(tiles_ * G::kBlockM);
    b.scores = ScoreTile<T>::take(arena);
    b.keys = PackedKeys<T>::take(arena, G::kBlockN, block_d_, true);
    b.sums = KeyGradients<T>::take(arena, G::kBlockN, block_d_);
    return b;
  }

  BackwardTile<T> tile_at(const Buffers& buffers, int64_t t) const {
    BackwardTile<T> tile = buffers.tile;
    const int64_t row = t * G::kBlockM;
    tile.q += row * block_d_, tile.d_out += row * block_d_, tile.dq += row * block_d_;
    tile.lse += row, tile.delta += row;
    return tile;
  }

  void run_split(Buffers& buffers, const Sequence& seq, int64_t head, int64_t begin) {
    const int64_t tiles = ceil_div(seq.num_global_queries, G::kBlockM);
    for (int64_t t = 0; t < tiles_; ++t) {
      tile_at(buffers, t).load(p_, seq.batch, head, [&](int i) {
        return t * G::kBlockM + i < seq.num_global_queries ? t * G::kBlockM + i : -1;
      });
    }
    const int64_t end = smaller(begin + splits_.keys, seq.rows);
    for (int64_t start = begin; start < end && !p_.execution.stops(); start += G::kBlockN) {
      const int64_t stop = smaller<int64_t>(start + G::kBlockN, end);
      if (tiles > 0 && start < seq.len)
        accumulate_tile(buffers, seq, head, tiles, start, smaller(stop, seq.len));
      for (int64_t row = start; row < stop; ++row) {
        const bool exists = tiles > 0 && row < seq.len && seq.kind[row] != kPadding;
        write_row(p_.grads.dk, seq, row, head, exists, static_cast<T>(kLn2),
                  buffers.sums.dk + (row - start) * block_d_);
        write_row(p_.grads.dv, seq, row, head, exists, T(1), buffers.sums.dv + (row - start) * block_d_);
      }
    }
  }

  // Gradients between the tile of keys start .. end and all tiles of queries.
  void accumulate_tile(Buffers& buffers, const Sequence& seq, int64_t head, int64_t tiles, int64_t start,
                       int64_t end) {
    const int64_t keys = round_up(end - start, G::kPanel);
    const auto key_at = [&](int64_t i) { return start + i < end ? start + i : -1; };
    for (int64_t offset = 0; offset < keys; offset += G::kPanel)
      buffers.keys.pack_panel(call_, seq, head, offset, key_at);
    for (T* x : {buffers.sums.dk, buffers.sums.dv})
      memset(x, 0, static_cast<size_t>(G::kBlockN * block_d_) * sizeof(T));
    const bool interior = start + keys <= end && !seq.has_padding(start, start + keys);
    const Band<T> bands[G::kRows] = {};
    ScoreTile<T>& scores = buffers.scores;
    for (int64_t t = 0; t < tiles; ++t) {
      BackwardTile<T> tile = tile_at(buffers, t);
      // Only these groups hold a query: the last tile may be nearly empty.
      const int64_t queries = smaller<int64_t>(seq.num_globals - t * G::kBlockM, G::kBlockM);
      const int groups = static_cast<int>(ceil_div(queries, G::kRows));
      for (int g = 0; g < groups; ++g) {
        scores.score(tile, g, buffers.keys, 0, 0, keys);
        for (int64_t n = 0; !interior && n < keys; n += G::kPanel) {
          scores.template mask<Visible::kAll>(g, n, bands, buffers.keys.positions);
        }
        scores.differentiate(tile, g, 0, keys, dropout_, [&](int i) {
          const int64_t slot = smaller<int64_t>(t * G::kBlockM + g * G::kRows + i, seq.num_globals - 1);
          dropout_.factors(static_cast<uint32_t>(seq.batch * call_.heads + head),
                           static_cast<uint32_t>(seq.global_position[slot]), start + seq.position_offset,
                           keys, scores.keep);
        });
        scores.accumulate_dq(tile, g, buffers.keys, 0, 0, keys);
      }
      for (int64_t n = 0; n < keys; n += G::kRows) {
        scores.accumulate_dkdv(tile, n, 0, groups * G::kRows, buffers.sums.dk, buffers.sums.dv);
      }
    }
  }

  void write_row(const RowsRef& x, const Sequence& seq, int64_t row, int64_t head, bool exists, T scale,
                 const T* src) {
    char* address = row_address(x, call_.dtype, seq.batch, seq.start + row, head);
    if (exists) {
      store_row<T>(address, call_.dtype, call_.head_dim, scale, src);
    } else {
      store_zero_row(address, call_.dtype, call_.head_dim);
    }
  }

  const CpuAttentionParams& p_;
  const AttentionCall& call_;
  int64_t block_d_, tiles_;
  KeySplits<T> splits_;
  DropoutRow<T> dropout_;
};

}  // namespace LED_ISA
}  // namespace led
