// What kernels are launched with, and what their thread blocks derive from it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../attention_params.h"

namespace led::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// All splits but the last consist of a multiple of so many tokens.
constexpr int kSplitUnit = 64;

// The one parameter of every kernel. Scores are in units of log2: the exponential is then one instruction.
struct Arguments : CudaAttentionParams {
  float qk_scale = 0;  // softmax_scale * log2(e)
  float softmax_scale = 0;
  float keep_scale = 1;       // 1 / (1 - dropout_p)
  uint32_t last_dropped = 0;  // draws up to this one are dropped
  float* delta = nullptr;     // laid out as lse: (sum(out * d_out) - d_lse) / keep_scale
  float* partials = nullptr;  // results of splits
  int num_splits = 1;
  int split_size = 0;  // tokens of a split

  __host__ __device__ bool has_dropout() const { return call.dropout.device_seed != nullptr; }
};

// The rows of one head of one sequence: a Source is read, a Target written.
template <class Data>
struct HeadRows {
  Data* data;
  int row_stride;  // in elements
  DType dtype;
  int head_dim;

  __device__ __forceinline__ int64_t offset(int row) const { return static_cast<int64_t>(row) * row_stride; }
};
using Source = HeadRows<const void>;
using Target = HeadRows<void>;

// The sequence and head of a thread block, which blockIdx.z and blockIdx.y are.
struct Sequence {
  int batch, head;
  int64_t first_row;  // in its batch entry
  int length;         // positions from here on are padding
  int num_rows;       // positions that exist; results of all of them are this sequence's to write
  int num_globals;
  const int32_t* global_index;     // ascending
  const int32_t* global_position;  // by slot, as global_index; in the whole sequence, for dropout
  const uint8_t* token_kind;       // by position, as padding_before
  const int32_t* padding_before;   // counts up to `length`

  __device__ __forceinline__ explicit Sequence(const AttentionCall& call)
      : batch(static_cast<int>(blockIdx.z)), head(static_cast<int>(blockIdx.y)) {
    const MaskRef& mask = call.mask;
    first_row = mask.seq_start[batch];
    length = mask.seq_len[batch];
    num_rows = mask.packed ? length : static_cast<int>(call.max_seqlen);
    num_globals = mask.max_globals > 0 ? mask.num_globals[batch] : 0;
    global_index = mask.global_index + batch * mask.max_globals;
    global_position = mask.global_position + batch * mask.max_globals;
    const int64_t mask_row = batch * mask.batch_stride + first_row;
    token_kind = mask.token_kind + mask_row;
    padding_before = mask.padding_before + mask_row;
  }

  // Whether one of the positions start ... stop - 1, of which there is one or more below length, is padding.
  __device__ __forceinline__ bool has_padding(int start, int stop) const {
    return padding_before[stop - 1] + (token_kind[stop - 1] == kPadding) > padding_before[start];
  }

  // The position of the token in a slot of global_index; `otherwise` where the slot is not in use.
  __device__ __forceinline__ int position(int slot, int otherwise) const {
    return slot < num_globals ? global_index[slot] : otherwise;
  }
  // The position that dropout draws for of the token in a slot; 0 where the slot is not in use.
  __device__ __forceinline__ int dropout_position(int slot) const {
    return slot < num_globals ? global_position[slot] : 0;
  }

  // Row 0 of the result is row `first` of the tensor's batch entry.
  __device__ __forceinline__ Source source(const RowsRef& x, const AttentionCall& call, int64_t first) const {
    return {address(x, call, first), static_cast<int>(x.row_stride), call.dtype,
            static_cast<int>(call.head_dim)};
  }
  __device__ __forceinline__ Target target(const RowsRef& x, const AttentionCall& call, int64_t first) const {
    return {address(x, call, first), static_cast<int>(x.row_stride), call.dtype,
            static_cast<int>(call.head_dim)};
  }
  // Where row `first` is in lse and what is laid out like it.
  __device__ __forceinline__ int64_t lse_offset(const LseRef& x, int64_t first) const {
    return batch * x.batch_stride + head * x.head_stride + first;
  }

 private:
  __device__ __forceinline__ char* address(const RowsRef& x, const AttentionCall& call, int64_t first) const {
    const int64_t element = batch * x.batch_stride + first * x.row_stride + head * x.head_stride;
    return static_cast<char*>(x.data) + element * (call.dtype == DType::kFloat32 ? 4 : 2);
  }
};

// The inputs of one head. Row 0 of q is row `first` of the batch entry: the sequence's first token in banded
// attention, its first slot in global attention.
struct HeadInputs {
  Source q, k, v;

  __device__ __forceinline__ HeadInputs(const AttentionCall& call, const Sequence& seq, int64_t first)
      : q(seq.source(call.q, call, first)),
        k(seq.source(call.k, call, seq.first_row)),
        v(seq.source(call.v, call, seq.first_row)) {}
};

}  // namespace led::cuda
