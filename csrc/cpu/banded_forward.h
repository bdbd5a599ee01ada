// Banded attention, forward: every local query over the global columns outside its band, then over its band.
#pragma once

#include "band.h"
#include "forward_tile.h"

namespace led {
namespace LED_ISA {

template <class T>
class BandedForward {
  using G = Geometry<T>;

 public:
  explicit BandedForward(const InterruptibleParams& p)
      : p_(p),
        width_(round_up(p.head_dim, G::kPanel)),
        chunks_(p, 512, 2048, G::kBlockM),  // at most 2048: a chunk's keys stay in cache
        band_{p.window_left, p.window_right},
        dropout_(p, kBandedStream) {}

  void run() {
    Arena sizes(nullptr);
    take(sizes);
    Scratch scratch(sizes.used() * p_.num_threads);
    parallel_tasks(p_.batch * p_.heads * chunks_.per_head, p_, [&](int64_t task, int thread) {
      Arena arena(scratch.at(sizes.used() * thread));
      Buffers buffers = take(arena);
      const int64_t batch_head = task / chunks_.per_head, begin = task % chunks_.per_head * chunks_.rows;
      const Sequence seq(p_, batch_head / p_.heads);
      run_chunk(buffers, seq, batch_head % p_.heads, begin, smaller(begin + chunks_.rows, seq.rows));
    });
  }

 private:
  struct Buffers {
    ForwardTile<T> tile;
    PackedKeys<T> keys, columns;
  };

  Buffers take(Arena& arena) const {
    return {ForwardTile<T>::take(arena, width_),
            PackedKeys<T>::take(arena, key_slots<T>(p_, chunks_.rows), width_, false),
            PackedKeys<T>::take(arena, round_up(p_.mask.max_globals, G::kBlockN), width_, false)};
  }

  void run_chunk(Buffers& buffers, const Sequence& seq, int64_t head, int64_t begin, int64_t end) {
    const int64_t key_begin = round_down(band_.first_key(begin), G::kPanel);
    if (begin < seq.len) {
      pack_keys(buffers.keys, p_, seq, head, key_begin, band_.last_key(seq, end - 1) + 1);
      pack_columns(buffers.columns, p_, seq, head);
    }
    for (int64_t row = begin; row < end && !p_.stops(); row += G::kBlockM) {
      run_tile(buffers, seq, head, row, smaller(end, row + G::kBlockM), key_begin);
    }
  }

  void run_tile(Buffers& buffers, const Sequence& seq, int64_t head, int64_t begin, int64_t end,
                int64_t key_begin) {
    const LocalRows<T> local(seq, begin, end);
    if (local.any) {
      buffers.tile.load(p_, seq.batch, head,
                        [&](int i) { return local.row[i] ? seq.start + begin + i : -1; });
      attend_columns(buffers, seq, head, begin, local);
      attend_band(buffers, seq, head, begin, key_begin, local);
    }
    for (int64_t row = begin; row < end; ++row) {
      buffers.tile.write_row(p_, static_cast<int>(row - begin), seq.batch, seq.start + row, head,
                             local.row[row - begin]);
    }
  }

  void attend_columns(Buffers& buffers, const Sequence& seq, int64_t head, int64_t begin,
                      const LocalRows<T>& local) {
    ForwardTile<T>& tile = buffers.tile;
    for (int64_t slot = 0; slot < seq.num_globals; slot += G::kBlockN) {
      const int64_t last = smaller<int64_t>(slot + G::kBlockN, seq.num_globals) - 1;
      const int64_t keys = round_up(last + 1 - slot, G::kPanel);
      const Position<T>* positions = buffers.columns.positions + slot;
      for (int g = 0; g < band_.kGroups; ++g) {
        const int64_t row = begin + g * G::kRows;
        if (!local.group[g] || band_.holds_columns(seq, row, slot, last)) continue;
        Band<T> bands[G::kRows];
        band_.fill(row, bands);
        tile.score(g, buffers.columns, slot, keys);
        for (int64_t n = 0; n < keys; n += G::kPanel)
          tile.template hide<Visible::kOutsideBand>(n, bands, positions);
        tile.update(g, buffers.columns, slot, keys, dropout_, [&](int i) {
          dropout_.factors(batch_head(seq, head), static_cast<uint32_t>(row + i), positions, keys, tile.keep);
        });
      }
    }
  }

  void attend_band(Buffers& buffers, const Sequence& seq, int64_t head, int64_t begin, int64_t key_begin,
                   const LocalRows<T>& local) {
    ForwardTile<T>& tile = buffers.tile;
    const int64_t last = band_.last_key(seq, begin + G::kBlockM - 1);
    for (int64_t block = round_down(band_.first_key(begin), G::kPanel); block <= last; block += G::kBlockN) {
      for (int g = 0; g < band_.kGroups; ++g) {
        const int64_t row = begin + g * G::kRows;
        const PanelRange range = band_.panels(seq, row, block);
        if (!local.group[g] || range.begin == range.end) continue;
        const int64_t key = block + range.begin, slot = key - key_begin, keys = range.end - range.begin;
        const bool plain = band_.is_plain(seq, row, key, key + keys);
        tile.score(g, buffers.keys, slot, keys);
        for (int64_t n = 0; n < keys && !plain; n += G::kPanel) {
          if (band_.is_plain(seq, row, key + n, key + n + G::kPanel)) continue;
          Band<T> bands[G::kRows];
          band_.fill(row, bands);
          tile.template hide<Visible::kBand>(n, bands, buffers.keys.positions + slot);
        }
        tile.update(g, buffers.keys, slot, keys, dropout_, [&](int i) {
          dropout_.factors(batch_head(seq, head), static_cast<uint32_t>(row + i), key, keys, tile.keep);
        });
      }
    }
  }

  uint32_t batch_head(const Sequence& seq, int64_t head) const {
    return static_cast<uint32_t>(seq.batch * p_.heads + head);
  }

  const InterruptibleParams& p_;
  int64_t width_;
  Chunks chunks_;
  BandGeometry<T> band_;
  DropoutRow<T> dropout_;
};

}  // namespace LED_ISA
}  // namespace led
