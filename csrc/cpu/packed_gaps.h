// Some rows of packed tensors belong to no sequence, so that no kernel writes them: they become zeros, and
// +inf in lse.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "../call_checks.h"

namespace led {

// Calls clear(first, end) for the rows between the sequences, which ascend, and behind them.
template <class Clear>
inline void for_each_gap(const AttentionCall& call, int64_t total_rows, const Clear& clear) {
  const MaskRef& mask = call.mask;
  int64_t end = 0;
  for (int64_t b = 0; b < call.batch; ++b) {
    if (mask.seq_start[b] > end) clear(end, mask.seq_start[b]);
    end = mask.seq_start[b] + mask.seq_len[b];
  }
  if (total_rows > end) clear(end, total_rows);
}

inline void clear_rows(const RowsRef& x, const AttentionCall& call, int64_t first, int64_t end) {
  const int64_t bytes = itemsize(call.dtype);
  for (int64_t row = first; row < end; ++row) {
    for (int64_t head = 0; head < call.heads; ++head) {
      memset(static_cast<char*>(x.data) + bytes * (row * x.row_stride + head * x.head_stride), 0,
             static_cast<size_t>(bytes * call.head_dim));
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

// Clears those results of a kernel that have a row per token.
inline void clear_gaps(const CpuAttentionParams& params, int64_t total_rows, KernelKind kind) {
  const AttentionCall& call = params.call;
  for_each_gap(call, total_rows, [&](int64_t first, int64_t end) {
    const auto clear = [&](const RowsRef& x) { clear_rows(x, call, first, end); };
    if (kind.is_backward) {
      clear(params.grads.dk), clear(params.grads.dv);
      if (!kind.is_global) clear(params.grads.dq);
    } else if (!kind.is_global) {
      clear(params.results.out);
      if (call.dtype == DType::kFloat64) {
        clear_lse<double>(params.results.lse, call.heads, first, end);
      } else {
        clear_lse<float>(params.results.lse, call.heads, first, end);
      }
    }
  });
}

}  // namespace led
