// Where the band lies: chunks of rows for the threads, panels that a group of queries sees, and panels that
// need no mask.
#pragma once

#include "tile.h"

namespace led {
namespace LED_ISA {

// Panels of a tile of keys: those between these offsets from its start.
struct PanelRange {
  int64_t begin, end;
};

// Every head's rows are cut into equal chunks of min_rows to max_rows, so that there is work for all threads.
struct Chunks {
  int64_t rows, per_head;
  Chunks(const CpuAttentionParams& params, int64_t min_rows, int64_t max_rows, int64_t multiple) {
    const AttentionCall& call = params.call;
    const int64_t batch_heads = larger<int64_t>(call.batch * call.heads, 1);
    const int64_t wanted = ceil_div(4 * params.execution.num_threads, batch_heads);
    rows = round_up(larger(smaller(ceil_div(call.max_seqlen, wanted), max_rows), min_rows), multiple);
    per_head = ceil_div(call.max_seqlen, rows);
  }
};

template <class T>
struct BandGeometry {
  using G = Geometry<T>;
  static constexpr int kGroups = G::kBlockM / G::kRows;
  int64_t left, right;

  int64_t first_key(int64_t row) const { return larger<int64_t>(row - left, 0); }
  int64_t last_key(const Sequence& seq, int64_t row) const { return smaller(row + right, seq.len - 1); }

  // Which panels of the tile of keys at `key` any query of the group at `row` sees.
  PanelRange panels(const Sequence& seq, int64_t row, int64_t key) const {
    const int64_t begin = larger<int64_t>(first_key(row) - key, 0);
    const int64_t end = smaller<int64_t>(last_key(seq, row + G::kRows - 1) + 1 - key, G::kBlockN);
    if (end <= begin) return {0, 0};
    return {round_down(begin, G::kPanel), round_up(end, G::kPanel)};
  }

  // Whether every query of the group at `row` sees all the keys begin .. end.
  bool is_interior(const Sequence& seq, int64_t row, int64_t begin, int64_t end) const {
    return begin >= row + G::kRows - 1 - left && end - 1 <= row + right && end <= seq.len &&
           !seq.has_padding(begin, end);
  }

  // Whether every query of the group at `row` has the global keys of the slots slot .. last in its band.
  bool holds_global_keys(const Sequence& seq, int64_t row, int64_t slot, int64_t last) const {
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

// Which of the rows begin .. begin + kBlockM are local tokens, and which groups hold one.
template <class T>
struct LocalRows {
  using G = Geometry<T>;
  bool row[G::kBlockM], group[BandGeometry<T>::kGroups], any;

  LocalRows(const Sequence& seq, int64_t begin, int64_t end) : any(false) {
    for (int g = 0; g < BandGeometry<T>::kGroups; ++g) {
      group[g] = false;
      for (int i = g * G::kRows; i < (g + 1) * G::kRows; ++i) {
        row[i] = begin + i < smaller(end, seq.len) && seq.kind[begin + i] == kLocal;
        group[g] = group[g] || row[i];
      }
      any = any || group[g];
    }
  }
};

// Packs the keys key_begin .. key_end of a sequence, and zeros for a tile behind them.
template <class T>
inline void pack_keys(PackedKeys<T>& keys, const AttentionInputs& in, const Sequence& seq, int64_t head,
                      int64_t key_begin, int64_t key_end) {
  const auto key_at = [&](int64_t i) { return key_begin + i < key_end ? key_begin + i : -1; };
  const int64_t count = key_end - key_begin + Geometry<T>::kBlockN;
  for (int64_t offset = 0; offset < count; offset += Geometry<T>::kPanel)
    keys.pack_panel(in, seq, head, offset, key_at);
}

// Packs the global keys of a sequence, in the order of their slots.
template <class T>
inline void pack_global_keys(PackedKeys<T>& global_keys, const AttentionInputs& in, const Sequence& seq,
                             int64_t head) {
  const auto key_at = [&](int64_t slot) -> int64_t {
    return slot < seq.num_globals ? seq.global_index[slot] : -1;
  };
  const int64_t count = round_up(seq.num_globals, Geometry<T>::kBlockN);
  for (int64_t slot = 0; slot < count; slot += Geometry<T>::kPanel)
    global_keys.pack_panel(in, seq, head, slot, key_at);
}

// How many keys pack_keys may lay out for a chunk of `rows` queries.
template <class T>
inline int64_t packed_key_capacity(const AttentionCall& call, int64_t rows) {
  using G = Geometry<T>;
  const int64_t seen = smaller(call.max_seqlen, rows + call.window.left + call.window.right);
  return round_up(seen + G::kPanel, G::kPanel) + G::kBlockN;
}

}  // namespace LED_ISA
}  // namespace led
