// Kernels of a decoding step: linear layers, residual and layer norm, attention, and the write into the
// cache. Such a step is bound by what it reads from memory once for a few rows, a weight or a document's keys
// and values. Matrix libraries pack or transpose such an operand first, and then read it at a half or a fifth
// of the bandwidth.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "forward_tile.h"

namespace led {
namespace LED_ISA {

// y[rows, columns] becomes x wᵀ: x is [rows, depth], readable and zero up to a whole vector; w is [columns,
// depth]. Meanwhile as many rows are prefetched from `soon`.
template <class T, int rows, int columns>
inline void gemv_tile(const T* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t depth, T* y,
                      int64_t y_stride, const T* soon, int64_t soon_stride) {
  Vec<T> sum[rows][columns];
  LED_UNROLL
  for (int r = 0; r < rows; ++r) {
    LED_UNROLL
    for (int c = 0; c < columns; ++c) sum[r][c] = broadcast<T>(0);
  }
  const auto add = [&](int64_t k, const T* w_at, int64_t stride) {
    Vec<T> row[columns];
    LED_UNROLL
    for (int c = 0; c < columns; ++c) row[c] = load(w_at + c * stride);
    LED_UNROLL
    for (int r = 0; r < rows; ++r) {
      const Vec<T> xr = load(x + r * x_stride + k);
      LED_UNROLL
      for (int c = 0; c < columns; ++c) sum[r][c] = sum[r][c] + xr * row[c];
    }
  };
  const int64_t whole = round_down(depth, kLanes<T>);
  for (int64_t k = 0; k < whole; k += kLanes<T>) {
    LED_UNROLL
    for (int c = 0; c < columns; ++c) prefetch(reinterpret_cast<const char*>(soon + c * soon_stride + k));
    add(k, w + k, w_stride);
  }
  if (whole < depth) {
    T rest[columns][kLanes<T>] = {};
    for (int c = 0; c < columns; ++c)
      memcpy(rest[c], w + c * w_stride + whole, static_cast<size_t>(depth - whole) * sizeof(T));
    add(whole, rest[0], kLanes<T>);
  }
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) y[r * y_stride + c] = reduce_sum<T>(sum[r][c]);
  }
}

// This does the same for any numbers of rows and columns; w comes from memory once.
template <class T>
LED_NOINLINE void gemv_block(const T* x, int64_t x_stride, int64_t rows, const T* w, int64_t w_stride,
                             int64_t columns, int64_t depth, T* y, int64_t y_stride, const T* soon,
                             int64_t soon_stride) {
  const auto tile = [&](auto of_rows, auto of_columns, int64_t r, int64_t c) {
    gemv_tile<T, of_rows(), of_columns()>(x + r * x_stride, x_stride, w + c * w_stride, w_stride, depth,
                                          y + r * y_stride + c, y_stride, soon + c * soon_stride,
                                          soon_stride);
  };
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  using Four = std::integral_constant<int, 4>;
  int64_t c = 0;
  for (; c + 4 <= columns; c += 4) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      tile(Four(), Two(), r, c);
      tile(Four(), Two(), r, c + 2);
    }
    for (; r + 2 <= rows; r += 2) tile(Two(), Four(), r, c);
    if (r < rows) tile(One(), Four(), r, c);
  }
  for (; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) tile(One(), One(), r, c);
  }
}

// A linear layer, y = x wᵀ + bias, for a few rows of x.
template <class T>
class Gemv {
  static constexpr int64_t kColumns = 64;  // columns of y, and so rows of w, that a task computes

 public:
  explicit Gemv(const GemvParams& p)
      : p_(p), width_(round_up(p.in_features, kLanes<T>)), in_place_(Scalar<T>::kDType == p.dtype) {}

  void run() {
    Arena shared_sizes(nullptr), thread_sizes(nullptr);
    shared_sizes.take<T>(p_.rows * width_);
    thread_sizes.take<T>(kColumns * width_);
    thread_sizes.take<T>(p_.rows * kColumns);
    Scratch scratch(shared_sizes.used() + thread_sizes.used() * p_.num_threads);
    T* x = Arena(scratch.at(0)).take<T>(p_.rows * width_);
    for (int64_t r = 0; r < p_.rows; ++r)
      load_row<T>(at(p_.x, r * p_.x_stride), p_.dtype, p_.in_features, width_, T(1), x + r * width_);
    parallel_tasks(ceil_div(p_.out_features, kColumns), p_.num_threads, [&](int64_t task, int thread) {
      Arena arena(scratch.at(shared_sizes.used() + thread_sizes.used() * thread));
      T *widened = arena.take<T>(kColumns * width_), *y = arena.take<T>(p_.rows * kColumns);
      const int64_t begin = task * kColumns, columns = smaller(p_.out_features - begin, kColumns);
      const char* w = at(p_.weight, begin * p_.weight_stride);
      if (in_place_) {
        gemv_block<T>(x, width_, p_.rows, reinterpret_cast<const T*>(w), p_.weight_stride, columns,
                      p_.in_features, y, kColumns, reinterpret_cast<const T*>(w) + 4 * p_.weight_stride,
                      p_.weight_stride);
      } else {
        for (int64_t c = 0; c < columns; ++c)
          load_row<T>(at(w, c * p_.weight_stride), p_.dtype, p_.in_features, width_, T(1),
                      widened + c * width_);
        gemv_block<T>(x, width_, p_.rows, widened, width_, columns, width_, y, kColumns, widened, width_);
      }
      T bias[kColumns] = {};
      if (p_.bias != nullptr) load_row<T>(at(p_.bias, begin), p_.dtype, columns, columns, T(1), bias);
      for (int64_t r = 0; r < p_.rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) {
          const T value = y[r * kColumns + c] + bias[c];
          y[r * kColumns + c] = p_.gelu ? value * T(0.5) * (T(1) + erf_scalar(value * T(kSqrtHalf))) : value;
        }
        store_row<T>(const_cast<char*>(at(p_.y, r * p_.out_features + begin)), p_.dtype, columns, T(1),
                     y + r * kColumns);
      }
    });
  }

 private:
  const char* at(const void* base, int64_t element) const {
    return static_cast<const char*>(base) + element * bytes_of(p_.dtype);
  }

  const GemvParams& p_;
  int64_t width_;  // in_features rounded up to a vector
  bool in_place_;  // whether weights are of the type that is computed in
};

// Residual and layer norm run on the caller's thread, as their rows are a few kilobytes.
template <class T>
class AddNorm {
 public:
  explicit AddNorm(const AddNormParams& p) : p_(p) {}

  void run() {
    Arena sizes(nullptr);
    for (int i = 0; i < 4; ++i) sizes.take<T>(p_.features);
    Scratch scratch(sizes.used());
    Arena arena(scratch.at(0));
    T *sum = arena.take<T>(p_.features), *block = arena.take<T>(p_.features);
    T *weight = arena.take<T>(p_.features), *bias = arena.take<T>(p_.features);
    read(p_.weight, 0, weight);
    read(p_.bias, 0, bias);
    for (int64_t row = 0; row < p_.rows; ++row) {
      read(p_.residual, row, sum);
      read(p_.block, row, block);
      T mean = 0, variance = 0;
      for (int64_t i = 0; i < p_.features; ++i) mean += sum[i] += block[i];
      mean /= static_cast<T>(p_.features);
      for (int64_t i = 0; i < p_.features; ++i) variance += (sum[i] - mean) * (sum[i] - mean);
      const T scale = T(1) / sqrt_scalar(variance / static_cast<T>(p_.features) + static_cast<T>(p_.eps));
      for (int64_t i = 0; i < p_.features; ++i) sum[i] = (sum[i] - mean) * scale * weight[i] + bias[i];
      store_row<T>(at(p_.y, row), p_.dtype, p_.features, T(1), sum);
    }
  }

 private:
  char* at(const void* base, int64_t row) const {
    return const_cast<char*>(static_cast<const char*>(base)) + row * p_.features * bytes_of(p_.dtype);
  }
  void read(const void* base, int64_t row, T* to) const {
    load_row<T>(at(base, row), p_.dtype, p_.features, p_.features, T(1), to);
  }

  const AddNormParams& p_;
};

// Writes rows into a cache. Throws std::out_of_range for a position that the cache does not have.
inline void write_rows(const WriteRowsParams& p) {
  for (int64_t i = 0; i < p.rows; ++i) {
    if (p.position[i] < 0 || p.position[i] >= p.capacity)
      throw std::out_of_range("position lies outside of the cache's capacity; give a longer cache.");
  }
  const size_t bytes = static_cast<size_t>(p.head_dim * bytes_of(p.dtype));
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    for (int64_t head = 0; head < p.heads; ++head) {
      for (int64_t i = 0; i < p.rows; ++i)
        memmove(row_address(p.to, p.dtype, batch, p.position[i], head),  // rows may be the cache's own
                row_address(p.from, p.dtype, batch, i, head), bytes);
    }
  }
}

// Softmax attention of a few queries over all visible keys, which are split so that one document employs
// every thread.
template <class T>
class DecodeAttention {
  using G = Geometry<T>;
  static constexpr int64_t kKeys = 32;  // of a tile, whose keys and values stay in the first-level cache

 public:
  explicit DecodeAttention(const DecodeParams& p)
      : p_(p),
        block_d_(round_up(p.head_dim, G::kPanel)),
        split_(round_up(ceil_div(p.max_seqlen, ceil_div(2 * p.num_threads, p.batch * p.heads)), kKeys)),
        splits_(ceil_div(p.max_seqlen, split_)) {}

  void run() {
    Arena thread_sizes(nullptr), partial_sizes(nullptr);
    take(thread_sizes);
    ForwardTile<T>::take(partial_sizes, block_d_);
    const int64_t outputs = p_.batch * p_.heads;
    Scratch scratch(thread_sizes.used() * p_.num_threads), partials(partial_sizes.used() * outputs * splits_);
    const auto tile_of = [&](int64_t task) {
      Arena arena(partials.at(partial_sizes.used() * task));
      return ForwardTile<T>::take(arena, block_d_);
    };
    parallel_tasks(outputs * splits_, p_.num_threads, [&](int64_t task, int thread) {
      Arena arena(scratch.at(thread_sizes.used() * thread));
      const Widened widened = take(arena);
      ForwardTile<T> tile = tile_of(task);
      const int64_t output = task / splits_;
      attend_split(tile, widened, output / p_.heads, output % p_.heads, task % splits_ * split_);
    });
    for (int64_t output = 0; output < outputs; ++output) {
      ForwardTile<T> merged = tile_of(output * splits_);
      for (int64_t split = 1; split < splits_; ++split) merged.merge(tile_of(output * splits_ + split));
      for (int i = 0; i < p_.queries; ++i) {
        const T sum = reduce_sum<T>(load(merged.row_sum + i * kLanes<T>));
        store_row<T>(row_address(p_.out, p_.dtype, output / p_.heads, i, output % p_.heads), p_.dtype,
                     p_.head_dim, sum > 0 ? T(1) / sum : sum, merged.acc + i * block_d_);
      }
    }
  }

 private:
  struct Widened {
    T *k, *v;  // [kKeys, block_d]
  };
  struct Rows {
    const T* data;
    int64_t stride;
  };

  Widened take(Arena& arena) const {
    return {arena.take<T>(kKeys * block_d_), arena.take<T>(kKeys * block_d_)};
  }

  void attend_split(ForwardTile<T>& tile, const Widened& widened, int64_t batch, int64_t head,
                    int64_t begin) {
    tile.load(p_, batch, head, [&](int i) { return i < p_.queries ? i : -1; });
    const int64_t end = smaller(begin + split_, p_.max_seqlen);
    for (int64_t key = begin; key < end; key += kKeys) {
      const KeyTile keys(p_, batch, key, smaller(end - key, kKeys));
      if (keys.seen == 0) continue;
      const Rows k = rows_of(p_.k, batch, head, keys, widened.k),
                 v = rows_of(p_.v, batch, head, keys, widened.v);
      for (int64_t query = 0; query < p_.queries; query += G::kRows) {
        const int64_t queries = smaller<int64_t>(p_.queries - query, G::kRows);
        gemv_block<T>(tile.q + query * block_d_, block_d_, queries, k.data, k.stride, keys.count, p_.head_dim,
                      tile.p, G::kBlockN, v.data, v.stride);
        for (int64_t i = 0; i < queries; ++i) {
          T* scores = tile.p + i * G::kBlockN;
          const int64_t padded = round_up(keys.count, G::kPanel);
          for (int64_t j = 0; j < padded; ++j) {
            if (j >= keys.count || !sees(p_, batch, query + i, key + j)) scores[j] = -kInfinity<T>;
          }
          tile.online_softmax_update(static_cast<int>(query + i), scores, padded);
        }
        const T* p = tile.p;
        T* acc = tile.acc + query * block_d_;
        for (int64_t left = queries; left > 0;) {
          const int64_t rows = left >= 4 ? 4 : left >= 2 ? 2 : 1;
          const auto add = rows == 4   ? multiply_tile<T, false, true, 4>
                           : rows == 2 ? multiply_tile<T, false, true, 2>
                                       : multiply_tile<T, false, true, 1>;
          for (int64_t d = 0; d < block_d_; d += G::kPanel)
            add(p, G::kBlockN, v.data + d, v.stride, acc + d, block_d_, keys.count);
          left -= rows, p += rows * G::kBlockN, acc += rows * block_d_;
        }
      }
    }
  }

  static bool sees(const DecodeParams& p, int64_t batch, int64_t query, int64_t key) {
    return p.visible.data == nullptr ||
           p.visible.data[batch * p.visible.batch_stride + query * p.visible.query_stride + key] != 0;
  }

  // The keys key .. key + count, and which of them any query sees.
  struct KeyTile {
    int64_t key, count, seen = 0;
    bool is_seen[kKeys];
    KeyTile(const DecodeParams& p, int64_t batch, int64_t key, int64_t count) : key(key), count(count) {
      for (int64_t j = 0; j < count; ++j) {
        is_seen[j] = false;
        for (int64_t i = 0; i < p.queries && !is_seen[j]; ++i)
          is_seen[j] = DecodeAttention::sees(p, batch, i, key + j);
        seen += is_seen[j];
      }
    }
  };

  // A tile's rows of x: where they lie if they can be read there, else widened, with zeros in place of those
  // that no query sees.
  Rows rows_of(const RowsRef& x, int64_t batch, int64_t head, const KeyTile& keys, T* widened) const {
    if (Scalar<T>::kDType == p_.dtype && p_.head_dim == block_d_ && keys.seen == keys.count)
      return {reinterpret_cast<const T*>(row_address(x, p_.dtype, batch, keys.key, head)), x.row_stride};
    for (int64_t j = 0; j < keys.count; ++j) {
      if (keys.is_seen[j]) {
        load_row<T>(row_address(x, p_.dtype, batch, keys.key + j, head), p_.dtype, p_.head_dim, block_d_,
                    T(1), widened + j * block_d_);
      } else {
        memset(widened + j * block_d_, 0, static_cast<size_t>(block_d_) * sizeof(T));
      }
    }
    return {widened, block_d_};
  }

  const DecodeParams& p_;
  int64_t block_d_, split_, splits_;
};

}  // namespace LED_ISA
}  // namespace led
