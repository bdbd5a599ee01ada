// Rows of packed tensors that belong to no sequence, and that the kernels therefore do not write: zeros, and
// +inf in lse.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "../attention_params.h"

namespace led {

// Calls clear(first, end) for the rows between the sequences, which ascend, and behind them.
template <class Clear>
inline void for_each_gap(const AttentionParams& p, int64_t total_rows, const Clear& clear) {
  int64_t end = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.mask.seq_start[b] > end) clear(end, p.mask.seq_start[b]);
    end = p.mask.seq_start[b] + p.mask.seq_len[b];
  }
  if (total_rows > end) clear(end, total_rows);
}

inline void clear_rows(const RowsRef& x, const AttentionParams& p, int64_t itemsize, int64_t first,
                       int64_t end) {
  for (int64_t row = first; row < end; ++row) {
    for (int64_t head = 0; head < p.heads; ++head) {
      memset(static_cast<char*>(x.data) + itemsize * (row * x.row_stride + head * x.head_stride), 0,
             static_cast<size_t>(itemsize * p.head_dim));
    }
  }
}

template <class T>
inline void clear_lse(const LseRef& x, int64_t heads, int64_t first, int64_t end) {
  for (int64_t head = 0; head < heads; ++head) {
    T* row = static_cast<T*>(x.data) + head * x.head_stride;
    std::fill(row + first, row + end, std::numeric_limits<T>::infinity());
  }
}

// Of the results of one of the attention kernels those that have a row per token.
inline void clear_gaps(const AttentionParams& p, int64_t total_rows, int64_t itemsize, bool is_global,
                       bool is_backward) {
  for_each_gap(p, total_rows, [&](int64_t first, int64_t end) {
    const auto clear = [&](const RowsRef& x) { clear_rows(x, p, itemsize, first, end); };
    if (is_backward) {
      clear(p.dk), clear(p.dv);
      if (!is_global) clear(p.dq);
    } else if (!is_global) {
      clear(p.out);
      if (p.dtype == DType::kFloat64) {
        clear_lse<double>(p.lse, p.heads, first, end);
      } else {
        clear_lse<float>(p.lse, p.heads, first, end);
      }
    }
  });
}

}  // namespace led
