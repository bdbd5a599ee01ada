// Where the band lies: chunks of rows for the threads, panels that a group of queries sees, panels that need
// no mask.
#pragma once

#include "tile.h"

namespace led {
namespace LED_ISA {

// Panels of a key block, as slots from the block's start.
struct PanelRange {
  int64_t begin, end;
};

// Every head's rows in equal chunks of min_rows to max_rows, so that there is work for all threads.
struct Chunks {
  int64_t rows, per_head;
  Chunks(const AttentionParams& p, int64_t min_rows, int64_t max_rows, int64_t multiple) {
    const int64_t wanted = ceil_div(4 * p.num_threads, larger<int64_t>(p.batch * p.heads, 1));
    rows = round_up(larger(smaller(ceil_div(p.max_seqlen, wanted), max_rows), min_rows), multiple);
    per_head = ceil_div(p.max_seqlen, rows);
  }
};

// A group is kRows neighbouring queries, the height of a register tile.
template <class T>
struct BandGeometry {
  using G = Geometry<T>;
  static constexpr int kGroups = G::kBlockM / G::kRows;
  int64_t left, right;

  int64_t first_key(int64_t row) const { return larger<int64_t>(row - left, 0); }
  int64_t last_key(const Sequence& seq, int64_t row) const { return smaller(row + right, seq.len - 1); }

  // Panels of the block that any query of the group at `row` sees.
  PanelRange panels(const Sequence& seq, int64_t row, int64_t block) const {
    const int64_t begin = larger<int64_t>(first_key(row) - block, 0);
    const int64_t end = smaller<int64_t>(last_key(seq, row + G::kRows - 1) + 1 - block, G::kBlockN);
    if (end <= begin) return {0, 0};
    return {round_down(begin, G::kPanel), round_up(end, G::kPanel)};
  }

  // Whether every query of the group at `row` sees all the keys begin .. end.
  bool is_plain(const Sequence& seq, int64_t row, int64_t begin, int64_t end) const {
    return begin >= row + G::kRows - 1 - left && end - 1 <= row + right && end <= seq.len &&
           !seq.has_padding(begin, end);
  }

  // Whether every query of the group at `row` has the columns slot .. last in its band.
  bool holds_columns(const Sequence& seq, int64_t row, int64_t slot, int64_t last) const {
    return seq.global_index[slot] >= row + G::kRows - 1 - left && seq.global_index[last] <= row + right;
  }

  void fill(int64_t row, Band<T>* bands) const {
    constexpr int64_t last = std::numeric_limits<Position<T>>::max();
    for (int i = 0; i < G::kRows; ++i) {
      bands[i] = {static_cast<Position<T>>(first_key(row + i)),
                  static_cast<Position<T>>(smaller(row + i + right, last))};
    }
  }
};

// The rows begin .. begin + kBlockM that are local, and the groups that hold one.
template <class T>
struct LocalRows {
  using G = Geometry<T>;
  bool row[G::kBlockM], group[BandGeometry<T>::kGroups], any;

  LocalRows(const Sequence& seq, int64_t begin, int64_t end) : any(false) {
    for (int g = 0; g < BandGeometry<T>::kGroups; ++g) {
      group[g] = false;
      for (int i = g * G::kRows; i < (g + 1) * G::kRows; ++i) {
        row[i] = begin + i < smaller(end, seq.len) && seq.kind[begin + i] == 1;
        group[g] = group[g] || row[i];
      }
      any = any || group[g];
    }
  }
};

// Keys key_begin .. key_end of a sequence, and zeros for a block behind them.
template <class T>
inline void pack_keys(PackedKeys<T>& keys, const AttentionParams& p, const Sequence& seq, int64_t head,
                      int64_t key_begin, int64_t key_end) {
  const auto key_at = [&](int64_t i) { return key_begin + i < key_end ? key_begin + i : -1; };
  for (int64_t slot = 0; slot < key_end - key_begin + Geometry<T>::kBlockN; slot += Geometry<T>::kPanel) {
    keys.pack_panel(p, seq, head, slot, key_at);
  }
}

// The keys of a sequence's global tokens.
template <class T>
inline void pack_columns(PackedKeys<T>& columns, const AttentionParams& p, const Sequence& seq,
                         int64_t head) {
  const auto key_at = [&](int64_t i) -> int64_t { return i < seq.num_globals ? seq.global_index[i] : -1; };
  for (int64_t slot = 0; slot < round_up(seq.num_globals, Geometry<T>::kBlockN);
       slot += Geometry<T>::kPanel) {
    columns.pack_panel(p, seq, head, slot, key_at);
  }
}

// Slots that pack_keys may fill for a chunk of `rows` queries.
template <class T>
inline int64_t key_slots(const AttentionParams& p, int64_t rows) {
  using G = Geometry<T>;
  return round_up(smaller(p.max_seqlen, rows + p.window_left + p.window_right) + G::kPanel, G::kPanel) +
         G::kBlockN;
}

}  // namespace LED_ISA
}  // namespace led
