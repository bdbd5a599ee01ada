// The plain structs that every kernel takes: shapes, strides in elements, and pointers. They own nothing and
// know nothing of torch.
#pragma once

#include <cstdint>

namespace led {

constexpr int64_t kMaxHeadDim = 256;

enum class DType : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

// A tensor [batch, rows, heads, head_dim] whose last dimension is contiguous. For packed sequences
// batch_stride is 0, and rows count from the sequence's start.
struct RowsRef {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
};

// A tensor [batch, heads, rows] whose rows are contiguous: fp64 for fp64 inputs, else fp32. For packed
// sequences batch_stride is 0.
struct LseRef {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
};

constexpr uint8_t kPadding = 0, kLocal = 1, kGlobal = 2, kHalo = 3;

// Python's LongformerMask; its positions are relative to their sequence.
struct MaskRef {
  const int32_t* seq_start = nullptr;        // [batch]
  const int32_t* seq_len = nullptr;          // [batch]
  const uint8_t* token_kind = nullptr;       // [batch, rows] or [total_rows]
  const int32_t* padding_before = nullptr;   // [batch, rows] or [total_rows]
  const int32_t* global_index = nullptr;     // [batch, max_globals], ascending, -1 filled
  const int32_t* num_globals = nullptr;      // [batch]
  const int32_t* position_offset = nullptr;  // [batch], of dropout's positions, multiples of 4
  const int32_t* global_position = nullptr;  // [batch, max_globals], dropout's positions of global tokens
  int64_t batch_stride = 0;                  // of token_kind and padding_before; 0 when packed
  int64_t max_globals = 0;
  bool packed = false;
};

// Query i of banded attention sees the keys i - left ... i + right. Global attention has no window.
struct Window {
  int64_t left = 0, right = 0;
};

// Dropout of probabilities. CPU kernels read `seed`; CUDA kernels read `device_seed`, which lies in the
// memory of the device so that nothing waits for its value, and is null without dropout.
struct DropoutParams {
  double p = 0;
  uint64_t seed = 0;
  const int64_t* device_seed = nullptr;
};

// What all attention takes. The longest sequence of keys that the shapes admit has max_seqlen positions; in a
// padded batch every entry has as many rows.
struct AttentionInputs {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t max_seqlen = 0;
  int64_t heads = 0;
  int64_t head_dim = 0;
  RowsRef q, k, v;
  double softmax_scale = 1;
};

// Python's AttentionCall. q has a row per token in banded attention, and a row per slot of global_index in
// global attention; out, d_out and dq are like it.
struct AttentionCall : AttentionInputs {
  MaskRef mask;
  Window window;
  DropoutParams dropout;
};

struct AttentionResults {
  RowsRef out;
  LseRef lse;
};

// What a backward takes and gives. d_lse.data is null when lse has no gradient.
struct AttentionGradients {
  RowsRef d_out;
  LseRef d_lse;
  RowsRef dq, dk, dv;
};

class Interruption;

// Where a CPU kernel runs. It runs to its end if there is no interruption; interruption.h defines stops().
struct CpuExecution {
  int num_threads = 1;
  Interruption* interruption = nullptr;

  bool stops() const;
};

// Where a CUDA kernel runs: `stream` is a cudaStream_t, and the workspace lies on the device.
struct CudaExecution {
  int device = 0;
  uintptr_t stream = 0;
  float* workspace = nullptr;
};

// One call of one kernel. A forward leaves `grads` alone.
template <class Execution>
struct AttentionParams {
  AttentionCall call;
  AttentionResults results;
  AttentionGradients grads;
  Execution execution;
};
using CpuAttentionParams = AttentionParams<CpuExecution>;
using CudaAttentionParams = AttentionParams<CudaExecution>;

// Which of the four kernels a call is of.
struct KernelKind {
  bool is_global, is_backward;
};

// A byte for each query and key says whether the query sees the key; without data it sees all. Strides may
// be 0.
struct VisibleRef {
  const uint8_t* data = nullptr;
  int64_t batch_stride = 0;
  int64_t query_stride = 0;
};

// Attention of a decoding step: `queries` rows of q and out against max_seqlen keys.
struct DecodeParams : AttentionInputs {
  int64_t queries = 0;
  VisibleRef visible;
  RowsRef out;
  int num_threads = 1;
};

// y = x weightᵀ + bias for a few rows of x, then GELU if asked for. x [rows, in_features] and weight
// [out_features, in_features] have a contiguous last dimension; y is [rows, out_features]; bias may be null.
struct GemvParams {
  DType dtype = DType::kFloat32;
  int64_t rows = 0, in_features = 0, out_features = 0;
  const void *x = nullptr, *weight = nullptr, *bias = nullptr;
  void* y = nullptr;
  int64_t x_stride = 0, weight_stride = 0;  // of rows
  bool gelu = false;                        // x Φ(x), by erf
  int num_threads = 1;
};

// to[b, position[i], head] = from[b, i, head]; both are [batch, rows, heads, head_dim] with strides, and
// the cache `to` holds `capacity` rows.
struct WriteRowsParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, heads = 0, rows = 0, head_dim = 0;
  int64_t capacity = 0;
  const int64_t* position = nullptr;
  RowsRef from, to;
};

// y = weight * (s - mean(s)) / sqrt(var(s) + eps) + bias for s = residual + block, row by row. All are
// contiguous and of one dtype, [rows, features] or [features].
struct AddNormParams {
  DType dtype = DType::kFloat32;
  int64_t rows = 0, features = 0;
  const void *residual = nullptr, *block = nullptr, *weight = nullptr, *bias = nullptr;
  void* y = nullptr;
  double eps = 0;
};

}  // namespace led
