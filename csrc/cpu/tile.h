// Forward and backward share these: the register tile, packed keys, visibility, dropout, and the walk over
// tasks.
#pragma once

#include "../philox.h"
#include "memory.h"

#ifdef _OPENMP
  #include <omp.h>
#endif

namespace led {
namespace LED_ISA {

// Sizes of tiles. A register tile is kRows x kPanel numbers; a panel is kPanel neighboring keys, and a group
// kRows neighboring queries or keys.
template <class T>
struct Geometry {
  static constexpr int kRows = LED_TILE_ROWS;
  static constexpr int kPanel = 2 * kLanes<T>;
  static constexpr int kBlockM = LED_BLOCK_M;  // rows of a tile of queries
  static constexpr int kBlockN = LED_BLOCK_N;  // rows of a tile of keys
  static_assert(kBlockM % kRows == 0 && kBlockN % kRows == 0 && kBlockN % kPanel == 0,
                "register tiles must divide tiles");
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

// c[rows, kPanel] becomes a b, or grows by it, over `depth`. a is [rows, depth], or [depth, rows] when
// transposed; b is [depth, kPanel].
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

// The position of a key in its sequence is an integer as wide as T, so that it is compared lane by lane. A
// float would be exact to 2^24 only.
template <class T>
using Position = typename Scalar<T>::Bits;

// One sequence of the batch.
struct Sequence {
  int64_t batch, start, len, rows;  // rows are those of len and of the padding behind
  const uint8_t* kind;              // [rows]
  const int32_t* padding_before;    // [rows]
  const int32_t* global_index;      // [num_globals]
  const int32_t* global_position;   // [num_globals]
  int64_t num_globals, num_global_queries;
  int64_t position_offset;  // from a row to the position that dropout draws for

  Sequence(const AttentionCall& call, int64_t b)
      : batch(b), start(call.mask.seq_start[b]), len(call.mask.seq_len[b]) {
    const MaskRef& mask = call.mask;
    rows = mask.packed ? len : call.max_seqlen;
    kind = mask.token_kind + b * mask.batch_stride + start;
    padding_before = mask.padding_before + b * mask.batch_stride + start;
    global_index = mask.global_index + b * mask.max_globals;
    global_position = mask.global_position + b * mask.max_globals;
    num_globals = mask.num_globals[b];
    num_global_queries = len > 0 ? num_globals : 0;  // where all keys are padding, no slot has a result
    position_offset = mask.position_offset[b];
  }
  uint32_t position(int64_t row) const { return static_cast<uint32_t>(row + position_offset); }
  bool has_padding(int64_t begin, int64_t end) const {
    return padding_before[end - 1] + (kind[end - 1] == kPadding) != padding_before[begin];
  }
};

// Keys of one head, laid out for the register tile. Where no key is, there are zeros and the position -1.
template <class T>
struct PackedKeys {
  T* k_panels;             // [panels, block_d, kPanel]
  T* v_panels;             // [panels, block_d, kPanel], backward only
  T* k_rows;               // [keys, block_d], backward only
  T* v_rows;               // [keys, block_d], forward only
  Position<T>* positions;  // [keys]
  int64_t block_d;         // head_dim rounded up to a panel

  static PackedKeys take(Arena& arena, int64_t keys, int64_t block_d, bool backward) {
    PackedKeys p;
    p.block_d = block_d;
    p.k_panels = arena.take<T>(keys * block_d);
    p.v_panels = backward ? arena.take<T>(keys * block_d) : nullptr;
    p.k_rows = backward ? arena.take<T>(keys * block_d) : nullptr;
    p.v_rows = backward ? nullptr : arena.take<T>(keys * block_d);
    p.positions = arena.take<Position<T>>(keys);
    return p;
  }

  // Fills the panel from `offset` on; key_at(i) is the position of the packed key i, or -1.
  template <class KeyAt>
  void pack_panel(const AttentionInputs& in, const Sequence& seq, int64_t head, int64_t offset,
                  KeyAt key_at) {
    constexpr int panel = Geometry<T>::kPanel;
    T row[kMaxHeadDim + panel];
    for (int j = 0; j < panel; ++j) {
      const int64_t key = key_at(offset + j);
      if (key < 0) continue;
      prefetch_row(row_address(in.k, in.dtype, seq.batch, seq.start + key, head), in.dtype, in.head_dim);
      prefetch_row(row_address(in.v, in.dtype, seq.batch, seq.start + key, head), in.dtype, in.head_dim);
    }
    for (int j = 0; j < panel; ++j) {
      int64_t key = key_at(offset + j);
      if (key >= 0 && seq.kind[key] == kPadding) key = -1;
      positions[offset + j] = static_cast<Position<T>>(key);
      pack_row(in, in.k, seq, head, key, k_rows ? k_rows + (offset + j) * block_d : row);
      scatter(k_rows ? k_rows + (offset + j) * block_d : row, k_panels + offset * block_d + j);
      pack_row(in, in.v, seq, head, key, v_rows ? v_rows + (offset + j) * block_d : row);
      if (v_panels) scatter(row, v_panels + offset * block_d + j);
    }
  }

 private:
  void pack_row(const AttentionInputs& in, const RowsRef& x, const Sequence& seq, int64_t head, int64_t key,
                T* dst) {
    if (key < 0) {
      memset(dst, 0, static_cast<size_t>(block_d) * sizeof(T));
    } else {
      load_row<T>(row_address(x, in.dtype, seq.batch, seq.start + key, head), in.dtype, in.head_dim, block_d,
                  T(1), dst);
    }
  }
  void scatter(const T* row, T* column) const {
    for (int64_t d = 0; d < block_d; ++d) column[d * Geometry<T>::kPanel] = row[d];
  }
};

// dst[kBlockM, block_d] becomes scale times the rows row_at(i) of x, and zeros where row_at(i) is -1.
template <class T, class RowAt>
inline void load_tile(const AttentionInputs& in, const RowsRef& x, int64_t batch, int64_t head, RowAt row_at,
                      T scale, int64_t block_d, T* dst) {
  for (int i = 0; i < Geometry<T>::kBlockM; ++i, dst += block_d) {
    const int64_t row = row_at(i);
    if (row < 0) {
      memset(dst, 0, static_cast<size_t>(block_d) * sizeof(T));
    } else {
      load_row<T>(row_address(x, in.dtype, batch, row, head), in.dtype, in.head_dim, block_d, scale, dst);
    }
  }
}

// Which keys a query sees: those of its band, those outside of it (global keys), or all.
enum class Visible { kBand, kOutsideBand, kAll };

// The positions low .. high are one query's band; low is not negative.
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

// Dropout of one query's probabilities: their factors are 0 or 1 / (1 - p).
template <class T>
struct DropoutRow {
  uint64_t threshold;  // smallest draw that is kept
  T scale;
  uint32_t key0, key1, stream;

  DropoutRow(const DropoutParams& dropout, uint32_t stream)
      : threshold(static_cast<uint64_t>(dropout.p * 4294967296.0 + 0.5)),
        scale(dropout.p < 1 ? static_cast<T>(1 / (1 - dropout.p)) : T(1)),
        key0(static_cast<uint32_t>(dropout.seed)),
        key1(static_cast<uint32_t>(dropout.seed >> 32)),
        stream(stream) {}
  bool active() const { return threshold != 0; }

  // Factors of keys at neighboring positions from `first`, a multiple of 4, on: one draw serves four of them.
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

  // Factors of `count` keys at any positions, and zeros behind them up to `end`.
  void factors(uint32_t batch_head, uint32_t query, const int32_t* positions, int64_t count, int64_t end,
               T* out) const {
    for (int64_t i = count; i < end; ++i) out[i] = T(0);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t key = static_cast<uint32_t>(positions[i]);
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
// Tasks that have not begun when a call is interrupted are left out.
template <class Task>
inline void parallel_tasks(int64_t count, const CpuExecution& execution, const Task& task) {
  parallel_tasks(count, execution.num_threads, [&](int64_t index, int thread) {
    if (!execution.stops()) task(index, thread);
  });
}

}  // namespace LED_ISA
}  // namespace led
