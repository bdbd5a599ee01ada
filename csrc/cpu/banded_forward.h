// Banded attention, forward: every local query attends to the global keys outside its band, then to its band.
#pragma once

#include "band.h"
#include "forward_tile.h"

namespace led {
namespace LED_ISA {

template <class T>
class BandedForward {
  using G = Geometry<T>;

 public:
  explicit BandedForward(const CpuAttentionParams& p)
      : p_(p),
        call_(p.call),
        block_d_(round_up(call_.head_dim, G::kPanel)),
        chunks_(p, 512, 2048, G::kBlockM),  // at most 2048: a chunk's keys stay in cache
        band_{call_.window.left, call_.window.right},
        dropout_(call_.dropout, kBandedStream) {}

  void run() {
    Arena sizes(nullptr);
    take(sizes);
    Scratch scratch(sizes.used() * p_.execution.num_threads);
    const int64_t tasks = call_.batch * call_.heads * chunks_.per_head;
    parallel_tasks(tasks, p_.execution, [&](int64_t task, int thread) {
      Arena arena(scratch.at(sizes.used() * thread));
      Buffers buffers = take(arena);
      const int64_t batch_head = task / chunks_.per_head, begin = task % chunks_.per_head * chunks_.rows;
      const Sequence seq(call_, batch_head / call_.heads);
      run_chunk(buffers, seq, batch_head % call_.heads, begin, smaller(begin + chunks_.rows, seq.rows));
    });
  }

 private:
  struct Buffers {
    ForwardTile<T> tile;
    PackedKeys<T> keys, global_keys;
  };

  Buffers take(Arena& arena) const {
    return {ForwardTile<T>::take(arena, block_d_),
            PackedKeys<T>::take(arena, packed_key_capacity<T>(call_, chunks_.rows), block_d_, false),
            PackedKeys<T>::take(arena, round_up(call_.mask.max_globals, G::kBlockN), block_d_, false)};
  }

  void run_chunk(Buffers& buffers, const Sequence& seq, int64_t head, int64_t begin, int64_t end) {
    const int64_t key_begin = round_down(band_.first_key(begin), G::kPanel);
    if (begin < seq.len) {
      pack_keys(buffers.keys, call_, seq, head, key_begin, band_.last_key(seq, end - 1) + 1);
      pack_global_keys(buffers.global_keys, call_, seq, head);
    }
    for (int64_t row = begin; row < end && !p_.execution.stops(); row += G::kBlockM) {
      run_tile(buffers, seq, head, row, smaller(end, row + G::kBlockM), key_begin);
    }
  }

  void run_tile(Buffers& buffers, const Sequence& seq, int64_t head, int64_t begin, int64_t end,
                int64_t key_begin) {
    const LocalRows<T> local(seq, begin, end);
    if (local.any) {
      buffers.tile.load(call_, seq.batch, head,
                        [&](int i) { return local.row[i] ? seq.start + begin + i : -1; });
      attend_global_keys(buffers, seq, head, begin, local);
      attend_band(buffers, seq, head, begin, key_begin, local);
    }
    for (int64_t row = begin; row < end; ++row) {
      buffers.tile.write_row(p_, static_cast<int>(row - begin), seq.batch, seq.start + row, head,
                             local.row[row - begin]);
    }
  }

  void attend_global_keys(Buffers& buffers, const Sequence& seq, int64_t head, int64_t begin,
                          const LocalRows<T>& local) {
    ForwardTile<T>& tile = buffers.tile;
    for (int64_t slot = 0; slot < seq.num_globals; slot += G::kBlockN) {
      const int64_t last = smaller<int64_t>(slot + G::kBlockN, seq.num_globals) - 1;
      const int64_t keys = round_up(last + 1 - slot, G::kPanel);
      const Position<T>* positions = buffers.global_keys.positions + slot;
      for (int g = 0; g < band_.kGroups; ++g) {
        const int64_t row = begin + g * G::kRows;
        if (!local.group[g] || band_.holds_global_keys(seq, row, slot, last)) continue;
        Band<T> bands[G::kRows];
        band_.fill(row, bands);
        tile.score(g, buffers.global_keys, slot, keys);
        for (int64_t n = 0; n < keys; n += G::kPanel)
          tile.template mask<Visible::kOutsideBand>(n, bands, positions);
        tile.attend(g, buffers.global_keys, slot, keys, dropout_, [&](int i) {
          dropout_.factors(batch_head(seq, head), seq.position(row + i), seq.global_position + slot,
                           last + 1 - slot, keys, tile.keep);
        });
      }
    }
  }

  void attend_band(Buffers& buffers, const Sequence& seq, int64_t head, int64_t begin, int64_t key_begin,
                   const LocalRows<T>& local) {
    ForwardTile<T>& tile = buffers.tile;
    const int64_t last = band_.last_key(seq, begin + G::kBlockM - 1);
    for (int64_t start = round_down(band_.first_key(begin), G::kPanel); start <= last; start += G::kBlockN) {
      for (int g = 0; g < band_.kGroups; ++g) {
        const int64_t row = begin + g * G::kRows;
        const PanelRange range = band_.panels(seq, row, start);
        if (!local.group[g] || range.begin == range.end) continue;
        const int64_t key = start + range.begin, offset = key - key_begin, keys = range.end - range.begin;
        const bool interior = band_.is_interior(seq, row, key, key + keys);
        tile.score(g, buffers.keys, offset, keys);
        for (int64_t n = 0; n < keys && !interior; n += G::kPanel) {
          if (band_.is_interior(seq, row, key + n, key + n + G::kPanel)) continue;
          Band<T> bands[G::kRows];
          band_.fill(row, bands);
          tile.template mask<Visible::kBand>(n, bands, buffers.keys.positions + offset);
        }
        tile.attend(g, buffers.keys, offset, keys, dropout_, [&](int i) {
          dropout_.factors(batch_head(seq, head), seq.position(row + i), key + seq.position_offset, keys,
                           tile.keep);
        });
      }
    }
  }

  uint32_t batch_head(const Sequence& seq, int64_t head) const {
    return static_cast<uint32_t>(seq.batch * call_.heads + head);
  }

  const CpuAttentionParams& p_;
  const AttentionCall& call_;
  int64_t block_d_;
  Chunks chunks_;
  BandGeometry<T> band_;
  DropoutRow<T> dropout_;
};

}  // namespace LED_ISA
}  // namespace led
