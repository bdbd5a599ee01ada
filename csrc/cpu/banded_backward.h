// Banded attention, backward. Every chunk of queries writes its own dq and sums the gradients of the keys
// that it sees in a workspace of its own; a second pass adds the chunks' sums in a fixed order, so that the
// result is deterministic.
#pragma once

#include "backward_tile.h"
#include "band.h"

namespace led {
namespace LED_ISA {

template <class T>
class BandedBackward {
  using G = Geometry<T>;

 public:
  explicit BandedBackward(const CpuAttentionParams& p)
      : p_(p),
        call_(p.call),
        block_d_(round_up(call_.head_dim, G::kPanel)),
        chunks_(p, min_chunk(call_), call_.max_seqlen, G::kBlockM),
        key_capacity_(packed_key_capacity<T>(call_, chunks_.rows)),
        global_key_capacity_(round_up(call_.mask.max_globals, G::kBlockN)),
        band_{call_.window.left, call_.window.right},
        dropout_(call_.dropout, kBandedStream) {}

  void run() {
    Arena thread_sizes(nullptr), task_sizes(nullptr);
    take(thread_sizes);
    take_gradients(task_sizes);
    const int64_t tasks = call_.batch * call_.heads * chunks_.per_head;
    Scratch scratch(thread_sizes.used() * p_.execution.num_threads), workspace(task_sizes.used() * tasks);
    const auto gradients_of = [&](int64_t task) {
      Arena arena(workspace.at(task_sizes.used() * task));
      return take_gradients(arena);
    };
    parallel_tasks(tasks, p_.execution, [&](int64_t task, int thread) {
      Arena arena(scratch.at(thread_sizes.used() * thread));
      Buffers buffers = take(arena);
      const int64_t batch_head = task / chunks_.per_head, begin = task % chunks_.per_head * chunks_.rows;
      const Sequence seq(call_, batch_head / call_.heads);
      run_chunk(buffers, gradients_of(task), seq, batch_head % call_.heads, begin,
                smaller(begin + chunks_.rows, seq.rows));
    });
    parallel_tasks(tasks, p_.execution, [&](int64_t task, int thread) {
      Arena arena(scratch.at(thread_sizes.used() * thread));
      reduce_chunk(take(arena), task, gradients_of);
    });
  }

 private:
  struct Buffers {
    BackwardTile<T> tile;
    ScoreTile<T> scores;
    PackedKeys<T> keys, global_keys;
  };
  struct Gradients {
    KeyGradients<T> keys, global_keys;
  };

  Buffers take(Arena& arena) const {
    return {BackwardTile<T>::take(arena, block_d_), ScoreTile<T>::take(arena),
            PackedKeys<T>::take(arena, key_capacity_, block_d_, true),
            PackedKeys<T>::take(arena, global_key_capacity_, block_d_, true)};
  }

  Gradients take_gradients(Arena& arena) const {
    return {KeyGradients<T>::take(arena, key_capacity_, block_d_),
            KeyGradients<T>::take(arena, global_key_capacity_, block_d_)};
  }

  // Neighboring chunks both hold the keys between them: chunks no shorter than the band keep the workspace
  // within twice dk and dv. A band as wide as the sequence is cut in four all the same.
  static int64_t min_chunk(const AttentionCall& call) {
    const int64_t band = call.window.left + call.window.right;
    return larger<int64_t>(512, smaller(band, ceil_div(call.max_seqlen, 4)));
  }

  int64_t chunk_key_begin(int64_t begin) const { return round_down(band_.first_key(begin), G::kPanel); }

  void run_chunk(Buffers& buffers, Gradients sums, const Sequence& seq, int64_t head, int64_t begin,
                 int64_t end) {
    const int64_t key_begin = chunk_key_begin(begin);
    if (begin < seq.len) {
      pack_keys(buffers.keys, call_, seq, head, key_begin, band_.last_key(seq, end - 1) + 1);
      pack_global_keys(buffers.global_keys, call_, seq, head);
      for (T* x : {sums.keys.dk, sums.keys.dv})
        memset(x, 0, static_cast<size_t>(key_capacity_ * block_d_) * sizeof(T));
      for (T* x : {sums.global_keys.dk, sums.global_keys.dv}) {
        memset(x, 0, static_cast<size_t>(global_key_capacity_ * block_d_) * sizeof(T));
      }
    }
    for (int64_t row = begin; row < end && !p_.execution.stops(); row += G::kBlockM) {
      const int64_t tile_end = smaller(end, row + G::kBlockM);
      const LocalRows<T> local(seq, row, tile_end);
      if (local.any) {
        buffers.tile.load(p_, seq.batch, head,
                          [&](int i) { return local.row[i] ? seq.start + row + i : -1; });
        accumulate_global_keys(buffers, sums.global_keys, seq, head, row, local);
        accumulate_band(buffers, sums.keys, seq, head, row, key_begin, local);
      }
      for (int64_t i = row; i < tile_end; ++i) {
        buffers.tile.write_row(p_, static_cast<int>(i - row), seq.batch, seq.start + i, head,
                               local.row[i - row]);
      }
    }
  }

  void accumulate_global_keys(Buffers& buffers, KeyGradients<T> sums, const Sequence& seq, int64_t head,
                              int64_t begin, const LocalRows<T>& local) {
    ScoreTile<T>& scores = buffers.scores;
    for (int64_t slot = 0; slot < seq.num_globals; slot += G::kBlockN) {
      const int64_t last = smaller<int64_t>(slot + G::kBlockN, seq.num_globals) - 1;
      const int64_t keys = round_up(last + 1 - slot, G::kPanel);
      const Position<T>* positions = buffers.global_keys.positions + slot;
      bool any = false;
      for (int g = 0; g < band_.kGroups; ++g) {
        const int64_t row = begin + g * G::kRows;
        if (!local.group[g] || band_.holds_global_keys(seq, row, slot, last)) {
          scores.clear(g, 0, G::kBlockN);
          continue;
        }
        any = true;
        Band<T> bands[G::kRows];
        band_.fill(row, bands);
        scores.score(buffers.tile, g, buffers.global_keys, slot, 0, keys);
        for (int64_t n = 0; n < keys; n += G::kPanel) {
          scores.template mask<Visible::kOutsideBand>(g, n, bands, positions);
        }
        scores.differentiate(buffers.tile, g, 0, keys, dropout_, [&](int i) {
          dropout_.factors(batch_head(seq, head), seq.position(row + i), seq.global_position + slot,
                           last + 1 - slot, keys, scores.keep);
        });
        scores.accumulate_dq(buffers.tile, g, buffers.global_keys, slot, 0, keys);
      }
      for (int64_t n = 0; any && n <= last - slot; n += G::kRows) {
        scores.accumulate_dkdv(buffers.tile, n, 0, G::kBlockM, sums.dk + slot * block_d_,
                               sums.dv + slot * block_d_);
      }
    }
  }

  void accumulate_band(Buffers& buffers, KeyGradients<T> sums, const Sequence& seq, int64_t head,
                       int64_t begin, int64_t key_begin, const LocalRows<T>& local) {
    ScoreTile<T>& scores = buffers.scores;
    const int64_t last = band_.last_key(seq, begin + G::kBlockM - 1);
    for (int64_t start = round_down(band_.first_key(begin), G::kPanel); start <= last; start += G::kBlockN) {
      const int64_t offset = start - key_begin;
      for (int g = 0; g < band_.kGroups; ++g) {
        const int64_t row = begin + g * G::kRows;
        if (!local.group[g]) {
          scores.clear(g, 0, G::kBlockN);
          continue;
        }
        const PanelRange range = band_.panels(seq, row, start);
        scores.score(buffers.tile, g, buffers.keys, offset, range.begin, range.end);
        const bool interior = band_.is_interior(seq, row, start + range.begin, start + range.end);
        for (int64_t n = range.begin; n < range.end && !interior; n += G::kPanel) {
          if (band_.is_interior(seq, row, start + n, start + n + G::kPanel)) continue;
          Band<T> bands[G::kRows];
          band_.fill(row, bands);
          scores.template mask<Visible::kBand>(g, n, bands, buffers.keys.positions + offset);
        }
        scores.differentiate(buffers.tile, g, range.begin, range.end, dropout_, [&](int i) {
          dropout_.factors(batch_head(seq, head), seq.position(row + i),
                           start + range.begin + seq.position_offset, range.end - range.begin, scores.keep);
        });
        scores.accumulate_dq(buffers.tile, g, buffers.keys, offset, range.begin, range.end);
      }
      for (int64_t n = 0; n < G::kBlockN && start + n <= last; n += G::kRows) {
        // These queries have a band that meets the keys n .. n + kRows.
        const int64_t first_row = larger<int64_t>(start + n - band_.right - begin, 0);
        const int64_t end_row = smaller<int64_t>(start + n + G::kRows + band_.left - begin, G::kBlockM);
        if (first_row >= end_row) continue;
        scores.accumulate_dkdv(buffers.tile, n, first_row, end_row, sums.dk + offset * block_d_,
                               sums.dv + offset * block_d_);
      }
    }
  }

  // Writes dk and dv of the rows of one chunk: the sums of all chunks of that head that saw them.
  template <class GradientsOf>
  void reduce_chunk(const Buffers& buffers, int64_t task, const GradientsOf& gradients_of) {
    const int64_t batch_head = task / chunks_.per_head, head = batch_head % call_.heads;
    const int64_t first_task = batch_head * chunks_.per_head, begin = (task - first_task) * chunks_.rows;
    const Sequence seq(call_, batch_head / call_.heads);
    T *dk = buffers.tile.q, *dv = buffers.tile.dq;  // one row of each
    int64_t slot = 0;                               // of the next global token
    for (int64_t row = begin; row < smaller(begin + chunks_.rows, seq.rows); ++row) {
      char* dk_row = row_address(p_.grads.dk, call_.dtype, seq.batch, seq.start + row, head);
      char* dv_row = row_address(p_.grads.dv, call_.dtype, seq.batch, seq.start + row, head);
      if (row >= seq.len || seq.kind[row] == kPadding) {
        store_zero_row(dk_row, call_.dtype, call_.head_dim);
        store_zero_row(dv_row, call_.dtype, call_.head_dim);
        continue;
      }
      while (slot < seq.num_globals && seq.global_index[slot] < row) ++slot;
      const bool is_global = slot < seq.num_globals && seq.global_index[slot] == row;
      for (int64_t d = 0; d < block_d_; ++d) dk[d] = dv[d] = T(0);
      for (int64_t c = 0; c < chunks_.per_head && c * chunks_.rows < seq.len; ++c) {
        const int64_t key_begin = chunk_key_begin(c * chunks_.rows);
        const int64_t key_last = band_.last_key(seq, (c + 1) * chunks_.rows - 1);
        if (row < key_begin || row > key_last) {
          if (!is_global) continue;
        }
        const Gradients sums = gradients_of(first_task + c);
        if (row >= key_begin && row <= key_last) add_row(sums.keys, row - key_begin, dk, dv);
        if (is_global) add_row(sums.global_keys, slot, dk, dv);
      }
      store_row<T>(dk_row, call_.dtype, call_.head_dim, static_cast<T>(kLn2), dk);
      store_row<T>(dv_row, call_.dtype, call_.head_dim, T(1), dv);
    }
  }

  void add_row(const KeyGradients<T>& sums, int64_t offset, T* dk, T* dv) const {
    for (int64_t d = 0; d < block_d_; ++d) {
      dk[d] += sums.dk[offset * block_d_ + d];
      dv[d] += sums.dv[offset * block_d_ + d];
    }
  }

  uint32_t batch_head(const Sequence& seq, int64_t head) const {
    return static_cast<uint32_t>(seq.batch * call_.heads + head);
  }

  const CpuAttentionParams& p_;
  const AttentionCall& call_;
  int64_t block_d_;
  Chunks chunks_;
  int64_t key_capacity_, global_key_capacity_;
  BandGeometry<T> band_;
  DropoutRow<T> dropout_;
};

}  // namespace LED_ISA
}  // namespace led
