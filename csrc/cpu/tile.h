// What forward and backward share: the register tile, packed keys, visibility, dropout, and the walk over
// tasks.
#pragma once

#include "../philox.h"
#include "memory.h"

#ifdef _OPENMP
  #include <omp.h>
#endif

namespace led {
namespace LED_ISA {

// Sizes of the tiles. A register tile is kRows x kPanel numbers; a panel is kPanel neighbouring keys.
template <class T>
struct Geometry {
  static constexpr int kRows = LED_TILE_ROWS;
  static constexpr int kPanel = 2 * kLanes<T>;
  static constexpr int kBlockM = LED_BLOCK_M;  // queries of a tile
  static constexpr int kBlockN = LED_BLOCK_N;  // keys of a block
  static_assert(kBlockM % kRows == 0 && kBlockN % kRows == 0 && kBlockN % kPanel == 0,
                "tiles must divide blocks");
};

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453, kSqrtHalf = 0.7071067811865476;

inline int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}
inline int64_t round_down(int64_t x, int64_t multiple) {
  return x / multiple * multiple;
}
inline int64_t ceil_div(int64_t x, int64_t y) {
  return (x + y - 1) / y;
}

// c[rows, kPanel] (+)= a b over `depth`: a is [rows, depth], or [depth, rows] when transposed; b [depth,
// kPanel].
template <class T, bool transposed, bool accumulate, int rows = Geometry<T>::kRows>
LED_NOINLINE void multiply_tile(const T* a, int64_t a_stride, const T* b, int64_t b_stride, T* c,
                                int64_t c_stride, int64_t depth) {
  constexpr int lanes = kLanes<T>;
  Vec<T> sum[rows][2];
  LED_UNROLL
  for (int m = 0; m < rows; ++m) {
    sum[m][0] = accumulate ? load(c + m * c_stride) : broadcast<T>(0);
    sum[m][1] = accumulate ? load(c + m * c_stride + lanes) : broadcast<T>(0);
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Vec<T> b0 = load(b + k * b_stride), b1 = load(b + k * b_stride + lanes);
    LED_UNROLL
    for (int m = 0; m < rows; ++m) {
      const Vec<T> am = broadcast<T>(transposed ? a[k * a_stride + m] : a[m * a_stride + k]);
      sum[m][0] = sum[m][0] + am * b0;
      sum[m][1] = sum[m][1] + am * b1;
    }
  }
  LED_UNROLL
  for (int m = 0; m < rows; ++m) {
    store(c + m * c_stride, sum[m][0]);
    store(c + m * c_stride + lanes, sum[m][1]);
  }
}

// Of a key in its sequence: an integer as wide as T, to be compared lane by lane. A float is exact to 2^24
// only.
template <class T>
using Position = typename Scalar<T>::Bits;

// One sequence of the batch.
struct Sequence {
  int64_t batch, start, len, rows;  // rows: with the padding behind len
  const uint8_t* kind;              // [rows]
  const int32_t* padding_before;    // [rows]
  const int32_t* global_index;      // [num_globals]
  int64_t num_globals;

  Sequence(const AttentionParams& p, int64_t b)
      : batch(b), start(p.mask.seq_start[b]), len(p.mask.seq_len[b]) {
    rows = p.mask.packed ? len : p.max_seqlen;
    kind = p.mask.token_kind + b * p.mask.batch_stride + start;
    padding_before = p.mask.padding_before + b * p.mask.batch_stride + start;
    global_index = p.mask.global_index + b * p.mask.max_globals;
    num_globals = p.mask.num_globals[b];
  }
  bool has_padding(int64_t begin, int64_t end) const {
    return padding_before[end - 1] + (kind[end - 1] == 0) != padding_before[begin];
  }
};

// Keys of one head, laid out for the register tile. Slots without a key hold zeros and the position -1.
template <class T>
struct PackedKeys {
  T* k_panels;             // [panels, width, kPanel]
  T* v_panels;             // [panels, width, kPanel], backward only
  T* k_rows;               // [keys, width], backward only
  T* v_rows;               // [keys, width], forward only
  Position<T>* positions;  // [keys]
  int64_t width;           // head_dim rounded up to a panel

  static PackedKeys take(Arena& arena, int64_t keys, int64_t width, bool backward) {
    PackedKeys p;
    p.width = width;
    p.k_panels = arena.take<T>(keys * width);
    p.v_panels = backward ? arena.take<T>(keys * width) : nullptr;
    p.k_rows = backward ? arena.take<T>(keys * width) : nullptr;
    p.v_rows = backward ? nullptr : arena.take<T>(keys * width);
    p.positions = arena.take<Position<T>>(keys);
    return p;
  }

  // Fills the panel of slots slot .. slot + kPanel; key_at(i) is the position of slot i's key, or -1.
  template <class KeyAt>
  void pack_panel(const AttentionParams& p, const Sequence& seq, int64_t head, int64_t slot, KeyAt key_at) {
    constexpr int panel = Geometry<T>::kPanel;
    T row[kMaxHeadDim + panel];
    for (int j = 0; j < panel; ++j) {
      const int64_t key = key_at(slot + j);
      if (key < 0) continue;
      prefetch_row(row_address(p.k, p.dtype, seq.batch, seq.start + key, head), p.dtype, p.head_dim);
      prefetch_row(row_address(p.v, p.dtype, seq.batch, seq.start + key, head), p.dtype, p.head_dim);
    }
    for (int j = 0; j < panel; ++j) {
      int64_t key = key_at(slot + j);
      if (key >= 0 && seq.kind[key] == 0) key = -1;
      positions[slot + j] = static_cast<Position<T>>(key);
      pack_row(p, p.k, seq, head, key, k_rows ? k_rows + (slot + j) * width : row);
      scatter(k_rows ? k_rows + (slot + j) * width : row, k_panels + slot * width + j);
      pack_row(p, p.v, seq, head, key, v_rows ? v_rows + (slot + j) * width : row);
      if (v_panels) scatter(row, v_panels + slot * width + j);
    }
  }

 private:
  void pack_row(const AttentionParams& p, const RowsRef& x, const Sequence& seq, int64_t head, int64_t key,
                T* dst) {
    if (key < 0) {
      memset(dst, 0, static_cast<size_t>(width) * sizeof(T));
    } else {
      load_row<T>(row_address(x, p.dtype, seq.batch, seq.start + key, head), p.dtype, p.head_dim, width, T(1),
                  dst);
    }
  }
  void scatter(const T* row, T* column) const {
    for (int64_t d = 0; d < width; ++d) column[d * Geometry<T>::kPanel] = row[d];
  }
};

// dst[kBlockM, width] = scale * the rows row_at(i) of x; zeros where row_at(i) is -1.
template <class T, class RowAt>
inline void load_tile(const AttentionParams& p, const RowsRef& x, int64_t batch, int64_t head, RowAt row_at,
                      T scale, int64_t width, T* dst) {
  for (int i = 0; i < Geometry<T>::kBlockM; ++i, dst += width) {
    const int64_t row = row_at(i);
    if (row < 0) {
      memset(dst, 0, static_cast<size_t>(width) * sizeof(T));
    } else {
      load_row<T>(row_address(x, p.dtype, batch, row, head), p.dtype, p.head_dim, width, scale, dst);
    }
  }
}

// Which keys a query at position i sees: those of its band, those outside of it (global columns), or all.
enum class Visible { kBand, kOutsideBand, kAll };

// Range of positions that is one query's band; low is not negative.
template <class T>
struct Band {
  Position<T> low, high;
};

template <class T, Visible visible>
inline BitsVec<T> sees(const Band<T>& band, Vec<Position<T>> position) {
  constexpr Position<T> first = 0;
  if (visible == Visible::kBand) return (position >= band.low) & (position <= band.high);
  if (visible == Visible::kOutsideBand)
    return ((position < band.low) | (position > band.high)) & (position >= first);
  return position >= first;
}

// Dropout of one query's probabilities: factors[i] is 0 or 1 / (1 - p).
template <class T>
struct DropoutRow {
  uint64_t threshold;  // smallest draw that is kept
  T scale;
  uint32_t key0, key1, stream;

  DropoutRow(const AttentionParams& p, uint32_t stream)
      : threshold(static_cast<uint64_t>(p.dropout_p * 4294967296.0 + 0.5)),
        scale(p.dropout_p < 1 ? static_cast<T>(1 / (1 - p.dropout_p)) : T(1)),
        key0(static_cast<uint32_t>(p.dropout_seed)),
        key1(static_cast<uint32_t>(p.dropout_seed >> 32)),
        stream(stream) {}
  bool active() const { return threshold != 0; }

  // Neighbouring keys from `first`, a multiple of 4: one draw serves four of them.
  void factors(uint32_t batch_head, uint32_t query, int64_t first, int64_t count, T* out) const {
    constexpr int groups = Geometry<T>::kBlockN / 4;
    uint32_t c0[groups], c1[groups], c2[groups], c3[groups];
    for (int g = 0; g < groups; ++g) {
      c0[g] = static_cast<uint32_t>(first / 4 + g), c1[g] = query, c2[g] = batch_head, c3[g] = stream;
    }
    uint32_t k0 = key0, k1 = key1;
    for (int round = 0; round < 10; ++round) {
      for (int g = 0; g < groups; ++g) philox_round(c0[g], c1[g], c2[g], c3[g], k0, k1);
      philox_next_key(k0, k1);
    }
    for (int64_t i = 0; i < count; i += 4) {
      out[i] = keep(c0[i / 4]), out[i + 1] = keep(c1[i / 4]), out[i + 2] = keep(c2[i / 4]),
      out[i + 3] = keep(c3[i / 4]);
    }
  }

  // Keys at any positions; those without one (-1) are never read.
  void factors(uint32_t batch_head, uint32_t query, const Position<T>* positions, int64_t count,
               T* out) const {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t key = positions[i] < 0 ? 0 : static_cast<uint32_t>(positions[i]);
      uint32_t c[4] = {key / 4, query, batch_head, stream}, k0 = key0, k1 = key1;
      for (int round = 0; round < 10; ++round, philox_next_key(k0, k1))
        philox_round(c[0], c[1], c[2], c[3], k0, k1);
      out[i] = keep(c[key % 4]);
    }
  }

 private:
  T keep(uint32_t draw) const { return draw >= threshold ? scale : T(0); }
};

// Runs task(index, thread) for every index on the caller's OpenMP pool.
template <class Task>
inline void parallel_tasks(int64_t count, int num_threads, const Task& task) {
#ifdef _OPENMP
  #pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
  for (int64_t i = 0; i < count; ++i) task(i, omp_get_thread_num());
#else
  (void)num_threads;
  for (int64_t i = 0; i < count; ++i) task(i, 0);
#endif
}
// Those that have not begun when a call is interrupted are left out.
template <class Task>
inline void parallel_tasks(int64_t count, const InterruptibleParams& p, const Task& task) {
  parallel_tasks(count, p.num_threads, [&](int64_t index, int thread) {
    if (!p.stops()) task(index, thread);
  });
}

}  // namespace LED_ISA
}  // namespace led
