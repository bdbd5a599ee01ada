// Attention of the global tokens over all keys, backward. Every split of the keys finishes its own dk and dv
// and sums dq in a workspace of its own; a second pass adds these in a fixed order, so that the result is
// deterministic.
#pragma once

#include "backward_tile.h"
#include "global_forward.h"

namespace led {
namespace LED_ISA {

template <class T>
class GlobalBackward {
  using G = Geometry<T>;

 public:
  explicit GlobalBackward(const InterruptibleParams& p)
      : p_(p),
        width_(round_up(p.head_dim, G::kPanel)),
        tiles_(ceil_div(p.mask.max_globals, G::kBlockM)),
        splits_(p, p.batch * p.heads),
        dropout_(p, kGlobalStream) {}

  void run() {
    Arena thread_sizes(nullptr);
    take(thread_sizes);
    const int64_t heads = p_.batch * p_.heads, tasks = heads * splits_.per_head;
    const int64_t dq_size = tiles_ * G::kBlockM * width_,
                  dq_bytes = dq_size * static_cast<int64_t>(sizeof(T));
    Scratch scratch(thread_sizes.used() * p_.num_threads), workspace(dq_bytes * tasks);
    parallel_tasks(tasks, p_, [&](int64_t task, int thread) {
      Arena arena(scratch.at(thread_sizes.used() * thread));
      Buffers buffers = take(arena);
      buffers.tile.dq = reinterpret_cast<T*>(workspace.at(dq_bytes * task));
      run_split(buffers, Sequence(p_, task / splits_.per_head / p_.heads), task / splits_.per_head % p_.heads,
                task % splits_.per_head * splits_.keys);
    });
    parallel_tasks(heads, p_, [&](int64_t batch_head, int) {
      T* dq = reinterpret_cast<T*>(workspace.at(dq_bytes * batch_head * splits_.per_head));
      for (int64_t split = 1; split < splits_.per_head; ++split) {
        for (int64_t i = 0; i < dq_size; ++i) dq[i] += dq[split * dq_size + i];
      }
      const Sequence seq(p_, batch_head / p_.heads);
      BackwardTile<T> tile = {};
      tile.width = width_;
      for (int64_t slot = 0; slot < p_.mask.max_globals; ++slot) {
        tile.dq = dq + slot * width_;
        tile.write_row(p_, 0, seq.batch, slot, batch_head % p_.heads, slot < seq.num_globals);
      }
    });
  }

 private:
  // The tiles of one head lie one behind the other; `tile` is the first.
  struct Buffers {
    BackwardTile<T> tile;
    ScoreBlock<T> scores;
    PackedKeys<T> keys;
    KeyGradients<T> sums;
  };

  Buffers take(Arena& arena) const {
    Buffers b = {};
    b.tile.width = width_;
    b.tile.q = arena.take<T>(tiles_ * G::kBlockM * width_);
    b.tile.d_out = arena.take<T>(tiles_ * G::kBlockM * width_);
    b.tile.lse = arena.take<T>(tiles_ * G::kBlockM);
    b.tile.delta = arena.take<T>(tiles_ * G::kBlockM);
    b.scores = ScoreBlock<T>::take(arena);
    b.keys = PackedKeys<T>::take(arena, G::kBlockN, width_, true);
    b.sums = KeyGradients<T>::take(arena, G::kBlockN, width_);
    return b;
  }

  BackwardTile<T> tile_at(const Buffers& buffers, int64_t t) const {
    BackwardTile<T> tile = buffers.tile;
    const int64_t row = t * G::kBlockM;
    tile.q += row * width_, tile.d_out += row * width_, tile.dq += row * width_;
    tile.lse += row, tile.delta += row;
    return tile;
  }

  void run_split(Buffers& buffers, const Sequence& seq, int64_t head, int64_t begin) {
    const int64_t tiles = ceil_div(seq.num_globals, G::kBlockM);
    for (int64_t t = 0; t < tiles_; ++t) {
      tile_at(buffers, t).load(p_, seq.batch, head, [&](int i) {
        return t * G::kBlockM + i < seq.num_globals ? t * G::kBlockM + i : -1;
      });
    }
    const int64_t end = smaller(begin + splits_.keys, seq.rows);
    for (int64_t block = begin; block < end && !p_.stops(); block += G::kBlockN) {
      const int64_t block_end = smaller<int64_t>(block + G::kBlockN, end);
      if (tiles > 0 && block < seq.len)
        run_block(buffers, seq, head, tiles, block, smaller(block_end, seq.len));
      for (int64_t row = block; row < block_end; ++row) {
        const bool exists = tiles > 0 && row < seq.len && seq.kind[row] != 0;
        write_row(p_.dk, seq, row, head, exists, static_cast<T>(kLn2),
                  buffers.sums.dk + (row - block) * width_);
        write_row(p_.dv, seq, row, head, exists, T(1), buffers.sums.dv + (row - block) * width_);
      }
    }
  }

  void run_block(Buffers& buffers, const Sequence& seq, int64_t head, int64_t tiles, int64_t block,
                 int64_t end) {
    const int64_t keys = round_up(end - block, G::kPanel);
    const auto key_at = [&](int64_t i) { return block + i < end ? block + i : -1; };
    for (int64_t slot = 0; slot < keys; slot += G::kPanel)
      buffers.keys.pack_panel(p_, seq, head, slot, key_at);
    for (T* x : {buffers.sums.dk, buffers.sums.dv})
      memset(x, 0, static_cast<size_t>(G::kBlockN * width_) * sizeof(T));
    const bool plain = block + keys <= end && !seq.has_padding(block, block + keys);
    const Band<T> bands[G::kRows] = {};
    ScoreBlock<T>& scores = buffers.scores;
    for (int64_t t = 0; t < tiles; ++t) {
      BackwardTile<T> tile = tile_at(buffers, t);
      // groups that hold a query; the last tile may be nearly empty
      const int64_t queries = smaller<int64_t>(seq.num_globals - t * G::kBlockM, G::kBlockM);
      const int groups = static_cast<int>(ceil_div(queries, G::kRows));
      for (int g = 0; g < groups; ++g) {
        scores.score(tile, g, buffers.keys, 0, 0, keys);
        for (int64_t n = 0; !plain && n < keys; n += G::kPanel) {
          scores.template hide<Visible::kAll>(g, n, bands, buffers.keys.positions);
        }
        scores.differentiate(tile, g, 0, keys, dropout_, [&](int i) {
          const int64_t slot = smaller<int64_t>(t * G::kBlockM + g * G::kRows + i, seq.num_globals - 1);
          dropout_.factors(static_cast<uint32_t>(seq.batch * p_.heads + head),
                           static_cast<uint32_t>(seq.global_index[slot]), block, keys, scores.keep);
        });
        scores.add_to_queries(tile, g, buffers.keys, 0, 0, keys);
      }
      for (int64_t n = 0; n < keys; n += G::kRows) {
        scores.add_to_keys(tile, n, 0, groups * G::kRows, buffers.sums.dk, buffers.sums.dv);
      }
    }
  }

  void write_row(const RowsRef& x, const Sequence& seq, int64_t row, int64_t head, bool exists, T scale,
                 const T* src) {
    char* address = row_address(x, p_.dtype, seq.batch, seq.start + row, head);
    if (exists) {
      store_row<T>(address, p_.dtype, p_.head_dim, scale, src);
    } else {
      store_zero_row(address, p_.dtype, p_.head_dim);
    }
  }

  const InterruptibleParams& p_;
  int64_t width_, tiles_;
  KeySplits<T> splits_;
  DropoutRow<T> dropout_;
};

}  // namespace LED_ISA
}  // namespace led
