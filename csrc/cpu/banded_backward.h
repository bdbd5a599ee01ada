// Banded attention, backward. Every chunk of queries writes its own dq and sums the gradients of the keys it
// sees in a workspace of its own; a second pass adds the chunks' sums in a fixed order, so that the result is
// deterministic.
#pragma once

#include "backward_tile.h"
#include "band.h"

namespace led {
namespace LED_ISA {

template <class T>
class BandedBackward {
  using G = Geometry<T>;

 public:
  explicit BandedBackward(const InterruptibleParams& p)
      : p_(p),
        width_(round_up(p.head_dim, G::kPanel)),
        chunks_(p, min_chunk(p), p.max_seqlen, G::kBlockM),
        key_slots_(key_slots<T>(p, chunks_.rows)),
        column_slots_(round_up(p.mask.max_globals, G::kBlockN)),
        band_{p.window_left, p.window_right},
        dropout_(p, kBandedStream) {}

  void run() {
    Arena thread_sizes(nullptr), task_sizes(nullptr);
    take(thread_sizes);
    take_gradients(task_sizes);
    const int64_t tasks = p_.batch * p_.heads * chunks_.per_head;
    Scratch scratch(thread_sizes.used() * p_.num_threads), workspace(task_sizes.used() * tasks);
    const auto gradients_of = [&](int64_t task) {
      Arena arena(workspace.at(task_sizes.used() * task));
      return take_gradients(arena);
    };
    parallel_tasks(tasks, p_, [&](int64_t task, int thread) {
      Arena arena(scratch.at(thread_sizes.used() * thread));
      Buffers buffers = take(arena);
      const int64_t batch_head = task / chunks_.per_head, begin = task % chunks_.per_head * chunks_.rows;
      const Sequence seq(p_, batch_head / p_.heads);
      run_chunk(buffers, gradients_of(task), seq, batch_head % p_.heads, begin,
                smaller(begin + chunks_.rows, seq.rows));
    });
    parallel_tasks(tasks, p_, [&](int64_t task, int thread) {
      Arena arena(scratch.at(thread_sizes.used() * thread));
      reduce_chunk(take(arena), task, gradients_of);
    });
  }

 private:
  struct Buffers {
    BackwardTile<T> tile;
    ScoreBlock<T> scores;
    PackedKeys<T> keys, columns;
  };
  struct Gradients {
    KeyGradients<T> keys, columns;
  };

  Buffers take(Arena& arena) const {
    return {BackwardTile<T>::take(arena, width_), ScoreBlock<T>::take(arena),
            PackedKeys<T>::take(arena, key_slots_, width_, true),
            PackedKeys<T>::take(arena, column_slots_, width_, true)};
  }

  Gradients take_gradients(Arena& arena) const {
    return {KeyGradients<T>::take(arena, key_slots_, width_),
            KeyGradients<T>::take(arena, column_slots_, width_)};
  }

  // Neighbouring chunks both hold the keys between them: chunks no shorter than the band keep the workspace
  // within twice dk and dv. A band as wide as the sequence is split in four all the same.
  static int64_t min_chunk(const AttentionParams& p) {
    return larger<int64_t>(512, smaller(p.window_left + p.window_right, ceil_div(p.max_seqlen, 4)));
  }

  int64_t chunk_key_begin(int64_t begin) const { return round_down(band_.first_key(begin), G::kPanel); }

  void run_chunk(Buffers& buffers, Gradients sums, const Sequence& seq, int64_t head, int64_t begin,
                 int64_t end) {
    const int64_t key_begin = chunk_key_begin(begin);
    if (begin < seq.len) {
      pack_keys(buffers.keys, p_, seq, head, key_begin, band_.last_key(seq, end - 1) + 1);
      pack_columns(buffers.columns, p_, seq, head);
      for (T* x : {sums.keys.dk, sums.keys.dv})
        memset(x, 0, static_cast<size_t>(key_slots_ * width_) * sizeof(T));
      for (T* x : {sums.columns.dk, sums.columns.dv}) {
        memset(x, 0, static_cast<size_t>(column_slots_ * width_) * sizeof(T));
      }
    }
    for (int64_t row = begin; row < end && !p_.stops(); row += G::kBlockM) {
      const int64_t tile_end = smaller(end, row + G::kBlockM);
      const LocalRows<T> local(seq, row, tile_end);
      if (local.any) {
        buffers.tile.load(p_, seq.batch, head,
                          [&](int i) { return local.row[i] ? seq.start + row + i : -1; });
        add_columns(buffers, sums.columns, seq, head, row);
        add_band(buffers, sums.keys, seq, head, row, key_begin);
      }
      for (int64_t i = row; i < tile_end; ++i) {
        buffers.tile.write_row(p_, static_cast<int>(i - row), seq.batch, seq.start + i, head,
                               local.row[i - row]);
      }
    }
  }

  void add_columns(Buffers& buffers, KeyGradients<T> sums, const Sequence& seq, int64_t head, int64_t begin) {
    ScoreBlock<T>& scores = buffers.scores;
    for (int64_t slot = 0; slot < seq.num_globals; slot += G::kBlockN) {
      const int64_t last = smaller<int64_t>(slot + G::kBlockN, seq.num_globals) - 1;
      const int64_t keys = round_up(last + 1 - slot, G::kPanel);
      const Position<T>* positions = buffers.columns.positions + slot;
      bool any = false;
      for (int g = 0; g < band_.kGroups; ++g) {
        const int64_t row = begin + g * G::kRows;
        if (band_.holds_columns(seq, row, slot, last)) {
          scores.clear(g, 0, G::kBlockN);
          continue;
        }
        any = true;
        Band<T> bands[G::kRows];
        band_.fill(row, bands);
        scores.score(buffers.tile, g, buffers.columns, slot, 0, keys);
        for (int64_t n = 0; n < keys; n += G::kPanel) {
          scores.template hide<Visible::kOutsideBand>(g, n, bands, positions);
        }
        scores.differentiate(buffers.tile, g, 0, keys, dropout_, [&](int i) {
          dropout_.factors(batch_head(seq, head), static_cast<uint32_t>(row + i), positions, keys,
                           scores.keep);
        });
        scores.add_to_queries(buffers.tile, g, buffers.columns, slot, 0, keys);
      }
      for (int64_t n = 0; any && n <= last - slot; n += G::kRows) {
        scores.add_to_keys(buffers.tile, n, 0, G::kBlockM, sums.dk + slot * width_, sums.dv + slot * width_);
      }
    }
  }

  void add_band(Buffers& buffers, KeyGradients<T> sums, const Sequence& seq, int64_t head, int64_t begin,
                int64_t key_begin) {
    ScoreBlock<T>& scores = buffers.scores;
    const int64_t last = band_.last_key(seq, begin + G::kBlockM - 1);
    for (int64_t block = round_down(band_.first_key(begin), G::kPanel); block <= last; block += G::kBlockN) {
      const int64_t slot = block - key_begin;
      for (int g = 0; g < band_.kGroups; ++g) {
        const int64_t row = begin + g * G::kRows;
        const PanelRange range = band_.panels(seq, row, block);
        scores.score(buffers.tile, g, buffers.keys, slot, range.begin, range.end);
        const bool plain = band_.is_plain(seq, row, block + range.begin, block + range.end);
        for (int64_t n = range.begin; n < range.end && !plain; n += G::kPanel) {
          if (band_.is_plain(seq, row, block + n, block + n + G::kPanel)) continue;
          Band<T> bands[G::kRows];
          band_.fill(row, bands);
          scores.template hide<Visible::kBand>(g, n, bands, buffers.keys.positions + slot);
        }
        scores.differentiate(buffers.tile, g, range.begin, range.end, dropout_, [&](int i) {
          dropout_.factors(batch_head(seq, head), static_cast<uint32_t>(row + i), block + range.begin,
                           range.end - range.begin, scores.keep);
        });
        scores.add_to_queries(buffers.tile, g, buffers.keys, slot, range.begin, range.end);
      }
      for (int64_t n = 0; n < G::kBlockN && block + n <= last; n += G::kRows) {
        // queries whose band meets the keys n .. n + kRows
        const int64_t first_row = larger<int64_t>(block + n - p_.window_right - begin, 0);
        const int64_t end_row = smaller<int64_t>(block + n + G::kRows + p_.window_left - begin, G::kBlockM);
        if (first_row >= end_row) continue;
        scores.add_to_keys(buffers.tile, n, first_row, end_row, sums.dk + slot * width_,
                           sums.dv + slot * width_);
      }
    }
  }

  // dk and dv of the rows of one chunk: the sums of all chunks of that head that saw them.
  template <class GradientsOf>
  void reduce_chunk(const Buffers& buffers, int64_t task, const GradientsOf& gradients_of) {
    const int64_t batch_head = task / chunks_.per_head, head = batch_head % p_.heads;
    const int64_t first_task = batch_head * chunks_.per_head, begin = (task - first_task) * chunks_.rows;
    const Sequence seq(p_, batch_head / p_.heads);
    T *dk = buffers.tile.q, *dv = buffers.tile.dq;  // one row of each
    int64_t slot = 0;                               // of the next global token
    for (int64_t row = begin; row < smaller(begin + chunks_.rows, seq.rows); ++row) {
      char* dk_row = row_address(p_.dk, p_.dtype, seq.batch, seq.start + row, head);
      char* dv_row = row_address(p_.dv, p_.dtype, seq.batch, seq.start + row, head);
      if (row >= seq.len || seq.kind[row] == 0) {
        store_zero_row(dk_row, p_.dtype, p_.head_dim);
        store_zero_row(dv_row, p_.dtype, p_.head_dim);
        continue;
      }
      while (slot < seq.num_globals && seq.global_index[slot] < row) ++slot;
      const bool is_column = slot < seq.num_globals && seq.global_index[slot] == row;
      for (int64_t d = 0; d < width_; ++d) dk[d] = dv[d] = T(0);
      for (int64_t c = 0; c < chunks_.per_head && c * chunks_.rows < seq.len; ++c) {
        const int64_t key_begin = chunk_key_begin(c * chunks_.rows);
        const int64_t key_last = band_.last_key(seq, (c + 1) * chunks_.rows - 1);
        if (row < key_begin || row > key_last) {
          if (!is_column) continue;
        }
        const Gradients sums = gradients_of(first_task + c);
        if (row >= key_begin && row <= key_last) add_row(sums.keys, row - key_begin, dk, dv);
        if (is_column) add_row(sums.columns, slot, dk, dv);
      }
      store_row<T>(dk_row, p_.dtype, p_.head_dim, static_cast<T>(kLn2), dk);
      store_row<T>(dv_row, p_.dtype, p_.head_dim, T(1), dv);
    }
  }

  void add_row(const KeyGradients<T>& sums, int64_t slot, T* dk, T* dv) const {
    for (int64_t d = 0; d < width_; ++d) {
      dk[d] += sums.dk[slot * width_ + d];
      dv[d] += sums.dv[slot * width_ + d];
    }
  }

  uint32_t batch_head(const Sequence& seq, int64_t head) const {
    return static_cast<uint32_t>(seq.batch * p_.heads + head);
  }

  const InterruptibleParams& p_;
  int64_t width_;
  Chunks chunks_;
  int64_t key_slots_, column_slots_;
  BandGeometry<T> band_;
  DropoutRow<T> dropout_;
};

}  // namespace LED_ISA
}  // namespace led
