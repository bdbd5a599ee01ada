// The plain structs that every kernel takes: shapes, strides in elements, pointers. No torch, no ownership.
#pragma once

#include <cstdint>

namespace led {

constexpr int64_t kMaxHeadDim = 256;

enum class DType : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

// [batch, rows, heads, head_dim] with a contiguous last dimension. Packed sequences: batch_stride is 0, and
// rows count from the sequence's start.
struct RowsRef {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
};

// [batch, heads, rows] with contiguous rows: fp32, fp64 for fp64 inputs. Packed: batch_stride is 0.
struct LseRef {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
};

constexpr uint8_t kPadding = 0, kLocal = 1, kGlobal = 2;

// LongformerMask; positions are relative to their sequence.
struct MaskRef {
  const int32_t* seq_start = nullptr;       // [batch]
  const int32_t* seq_len = nullptr;         // [batch]
  const uint8_t* token_kind = nullptr;      // [batch, rows] or [total_rows]
  const int32_t* padding_before = nullptr;  // same shape
  const int32_t* global_index = nullptr;    // [batch, max_globals], ascending, -1 filled
  const int32_t* num_globals = nullptr;     // [batch]
  int64_t batch_stride = 0;                 // of token_kind and padding_before; 0 when packed
  int64_t max_globals = 0;
  bool packed = false;
};

// One call of one kernel. Banded: q, out, d_out and dq have a row per token; global: a row per slot of
// global_index.
struct AttentionParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t max_seqlen = 0;  // longest sequence the shapes admit; padded: rows of a batch entry
  int64_t heads = 0;
  int64_t head_dim = 0;
  int64_t window_left = 0;  // query i sees keys i - left ... i + right
  int64_t window_right = 0;
  double softmax_scale = 1;
  double dropout_p = 0;
  uint64_t dropout_seed = 0;
  int num_threads = 1;
  MaskRef mask;
  RowsRef q, k, v, out;
  LseRef lse;
  RowsRef d_out, dq, dk, dv;
  LseRef d_lse;  // data is null when lse has no gradient

  // The CUDA kernels' alone; pointers are to memory of the device.
  int device = 0;
  uintptr_t stream = 0;                  // a cudaStream_t
  const int64_t* device_seed = nullptr;  // in place of dropout_seed; null without dropout
  float* workspace = nullptr;
};

// Which keys a query sees, a byte each; without data, all. Strides may be 0.
struct VisibleRef {
  const uint8_t* data = nullptr;
  int64_t batch_stride = 0;
  int64_t query_stride = 0;
};

// Attention of a decoding step, which has no mask: `queries` rows of q and out, max_seqlen keys.
struct DecodeParams : AttentionParams {
  int64_t queries = 0;
  VisibleRef visible;
};

// y = x weightᵀ + bias for a few rows, then GELU if asked for: x [rows, in_features], weight [out_features,
// in_features], both with a contiguous last dimension; y [rows, out_features]. bias may be null.
struct LinearParams {
  DType dtype = DType::kFloat32;
  int64_t rows = 0, in_features = 0, out_features = 0;
  const void *x = nullptr, *weight = nullptr, *bias = nullptr;
  void* y = nullptr;
  int64_t x_stride = 0, weight_stride = 0;  // of rows
  bool gelu = false;                        // x Φ(x), by erf
  int num_threads = 1;
};

// to[b, head, position[i]] = from[b, head, i]; both [batch, rows, heads, head_dim] with strides, in elements.
struct WriteRowsParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, heads = 0, rows = 0, head_dim = 0;
  int64_t slots = 0;  // rows of `to`
  const int64_t* position = nullptr;
  RowsRef from, to;
};

// y = weight * (s - mean(s)) / sqrt(var(s) + eps) + bias for s = residual + block, row by row; all
// contiguous, of one dtype, [rows, features] or [features].
struct AddNormParams {
  DType dtype = DType::kFloat32;
  int64_t rows = 0, features = 0;
  const void *residual = nullptr, *block = nullptr, *weight = nullptr, *bias = nullptr;
  void* y = nullptr;
  double eps = 0;
};

}  // namespace led
