// Checks that a call stays inside of the memory that it was given. The kernels rely on that and cannot see
// it; a call that would not is refused with std::invalid_argument, which is ValueError in Python.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "attention_params.h"

namespace led {

constexpr int kMaxThreads = 1024;    // an OpenMP runtime that cannot start its threads ends the process
constexpr int64_t kMaxQueries = 16;  // of a decoding step
constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max();

// How many bytes lie from the address of each tensor to the end of its memory.
struct Bytes {
  int64_t q = 0, k = 0, v = 0, out = 0, lse = 0, d_out = 0, dq = 0, dk = 0, dv = 0, d_lse = 0;
  int64_t seq_start = 0, seq_len = 0, token_kind = 0, padding_before = 0, global_index = 0, num_globals = 0;
  int64_t position_offset = 0, global_position = 0;
  int64_t visible = 0, device_seed = 0, workspace = 0;
};

// A call of one of the four attention kernels as Python sets it, for the CPU or for a GPU. The mask has
// mask_rows rows: of each batch entry, or of all sequences when packed.
struct AttentionRequest {
  AttentionCall call;
  AttentionResults results;
  AttentionGradients grads;
  CpuExecution cpu;
  CudaExecution cuda;
  Bytes bytes;
  int64_t mask_rows = 0;

  CpuAttentionParams cpu_params() const { return {call, results, grads, cpu}; }
  CudaAttentionParams cuda_params() const { return {call, results, grads, cuda}; }
};

// A call of a decoding step's attention as Python sets it.
struct DecodeRequest {
  DecodeParams call;
  Bytes bytes;
};

// A tensor lies at an address that is no multiple of its element size: the caller may copy it and call again.
struct Misaligned : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

inline void require(bool good, const std::string& message) {
  if (!good) throw std::invalid_argument(message);
}

inline int64_t itemsize(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat64:
      return 8;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
  }
  throw std::invalid_argument("dtype is none of DType's.");
}

// Refuses memory that does not hold `count` numbers. Counts are in floating point, where no product wraps
// around.
inline void check_memory(const char* name, const void* data, int64_t bytes, double count, int64_t itemsize) {
  if (count <= 0) return;
  require(data != nullptr, std::string(name) + " was not set.");
  require(count * static_cast<double>(itemsize) <= static_cast<double>(bytes),
          std::string(name) + " is smaller than the call's sizes, strides and dtype say.");
  if (reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(itemsize) != 0)
    throw Misaligned(std::string(name) +
                     " lies at an address that is no multiple of its element size; call .clone() on it.");
}

inline void check_rows(const char* name, const RowsRef& x, int64_t bytes, DType dtype, int64_t batch,
                       int64_t rows, int64_t heads, int64_t head_dim) {
  require(x.batch_stride >= 0 && x.row_stride >= 0 && x.head_stride >= 0,
          std::string(name) + " has a negative stride.");
  if (batch == 0 || rows == 0 || heads == 0) return;
  const double last = static_cast<double>(batch - 1) * static_cast<double>(x.batch_stride) +
                      static_cast<double>(rows - 1) * static_cast<double>(x.row_stride) +
                      static_cast<double>(heads - 1) * static_cast<double>(x.head_stride);
  check_memory(name, x.data, bytes, last + static_cast<double>(head_dim), itemsize(dtype));
}

inline void check_sizes(const AttentionInputs& in, int num_threads) {
  itemsize(in.dtype);
  require(in.head_dim >= 1 && in.head_dim <= kMaxHeadDim, "head_dim is not 1 to 256.");
  require(in.batch >= 0 && in.heads >= 0 && in.max_seqlen >= 0, "a size is negative.");
  require(in.batch <= kMaxSize && in.heads <= kMaxSize && in.max_seqlen <= kMaxSize,
          "a size is over 2^31 - 1.");
  require(num_threads >= 1, "num_threads is below 1.");
  require(num_threads <= kMaxThreads, "num_threads is over 1024.");
}

// Checks sizes and memory of a call of this kind. It does not look at the values of the mask, as these may
// lie on a GPU.
inline void check_call(const AttentionRequest& request, KernelKind kind) {
  const AttentionCall& call = request.call;
  const MaskRef& mask = call.mask;
  const Window& window = call.window;
  const Bytes& bytes = request.bytes;
  check_sizes(call, request.cpu.num_threads);
  require(window.left >= 0 && window.right >= 0, "a side of the window is negative.");
  require(window.left <= kMaxSize && window.right <= kMaxSize, "a side of the window is over 2^31 - 1.");
  require(call.dropout.p >= 0 && call.dropout.p <= 1, "dropout_p is not 0 to 1.");
  const int64_t rows = request.mask_rows;
  require(rows >= 0 && rows <= kMaxSize && mask.max_globals >= 0 && mask.max_globals <= kMaxSize,
          "a size of the mask is negative or over 2^31 - 1.");
  require(mask.packed || rows == call.max_seqlen || call.batch == 0, "the mask's rows are not max_seqlen.");
  const int64_t batch = mask.packed ? (call.batch > 0 ? 1 : 0) : call.batch;
  const auto per_token = [&](const char* name, const RowsRef& x, int64_t size) {
    check_rows(name, x, size, call.dtype, batch, rows, call.heads, call.head_dim);
  };
  const auto per_query = [&](const char* name, const RowsRef& x, int64_t size) {
    if (!kind.is_global) return per_token(name, x, size);
    check_rows(name, x, size, call.dtype, call.batch, mask.max_globals, call.heads, call.head_dim);
  };
  const auto statistics = [&](const char* name, const LseRef& x, int64_t size) {
    const RowsRef heads_first = {x.data, x.batch_stride, x.head_stride, 0};
    check_rows(name, heads_first, size, call.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32,
               kind.is_global ? call.batch : batch, call.heads, 1, kind.is_global ? mask.max_globals : rows);
  };
  per_token("k", call.k, bytes.k);
  per_token("v", call.v, bytes.v);
  per_query("q", call.q, bytes.q);
  per_query("out", request.results.out, bytes.out);
  statistics("lse", request.results.lse, bytes.lse);
  if (kind.is_backward) {
    const AttentionGradients& grads = request.grads;
    per_token("dk", grads.dk, bytes.dk);
    per_token("dv", grads.dv, bytes.dv);
    per_query("dq", grads.dq, bytes.dq);
    per_query("d_out", grads.d_out, bytes.d_out);
    if (grads.d_lse.data != nullptr) statistics("d_lse", grads.d_lse, bytes.d_lse);
  }
  const double sequences = static_cast<double>(call.batch);
  const double tokens = static_cast<double>(batch) * static_cast<double>(rows);
  check_memory("seq_start of the mask", mask.seq_start, bytes.seq_start, sequences, 4);
  check_memory("seq_len of the mask", mask.seq_len, bytes.seq_len, sequences, 4);
  check_memory("num_globals of the mask", mask.num_globals, bytes.num_globals, sequences, 4);
  check_memory("token_kind of the mask", mask.token_kind, bytes.token_kind, tokens, 1);
  check_memory("padding_before of the mask", mask.padding_before, bytes.padding_before, tokens, 4);
  check_memory("position_offset of the mask", mask.position_offset, bytes.position_offset, sequences, 4);
  const double slots = sequences * static_cast<double>(mask.max_globals);
  check_memory("global_index of the mask", mask.global_index, bytes.global_index, slots, 4);
  check_memory("global_position of the mask", mask.global_position, bytes.global_position, slots, 4);
}

// Checks the values of a mask that lies where the host can read it. Global attention reads no rows at
// global_index, whose tokens may lie elsewhere.
inline void check_mask_values(const AttentionRequest& request, KernelKind kind) {
  const AttentionCall& call = request.call;
  const MaskRef& mask = call.mask;
  int64_t end = 0;  // of the sequence before: two that overlap would both write a row
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t start = mask.seq_start[b], len = mask.seq_len[b], count = mask.num_globals[b];
    require(len >= 0 && len <= call.max_seqlen, "seq_len of the mask is not 0 to max_seqlen.");
    require(start >= 0 && start + len <= request.mask_rows && (mask.packed || start == 0),
            "seq_start of the mask lies outside its rows.");
    require(!mask.packed || start >= end, "seq_start of the mask lies in the sequence before.");
    end = start + len;
    require(count >= 0 && count <= mask.max_globals, "num_globals of the mask is not 0 to max_globals.");
    const int32_t* index = mask.global_index + b * mask.max_globals;
    for (int64_t slot = 0; slot < count && !kind.is_global; ++slot) {
      require(index[slot] >= 0 && index[slot] < len && (slot == 0 || index[slot] > index[slot - 1]),
              "global_index of the mask does not ascend inside its sequence.");
    }
  }
}

inline void check_call(const DecodeRequest& request) {
  const DecodeParams& call = request.call;
  const Bytes& bytes = request.bytes;
  check_sizes(call, call.num_threads);
  require(call.queries >= 0 && call.queries <= kMaxQueries, "queries are not 0 to 16.");
  require(call.max_seqlen >= 1, "there are no keys.");
  const auto rows = [&](const char* name, const RowsRef& x, int64_t size, int64_t count) {
    check_rows(name, x, size, call.dtype, call.batch, count, call.heads, call.head_dim);
  };
  rows("k", call.k, bytes.k, call.max_seqlen);
  rows("v", call.v, bytes.v, call.max_seqlen);
  rows("q", call.q, bytes.q, call.queries);
  rows("out", call.out, bytes.out, call.queries);
  if (call.visible.data == nullptr) return;
  const VisibleRef& visible = call.visible;
  require(visible.batch_stride >= 0 && visible.query_stride >= 0, "visible has a negative stride.");
  if (call.batch == 0 || call.queries == 0) return;
  const double last = static_cast<double>(call.batch - 1) * static_cast<double>(visible.batch_stride) +
                      static_cast<double>(call.queries - 1) * static_cast<double>(visible.query_stride);
  check_memory("visible", visible.data, bytes.visible, last + static_cast<double>(call.max_seqlen), 1);
}

// In this and the following checks the numbers behind the parameters are the bytes of their tensors.
inline void check_call(const GemvParams& p, int64_t x, int64_t weight, int64_t bias, int64_t y) {
  const int64_t size = itemsize(p.dtype);
  require(p.rows >= 0 && p.rows <= kMaxSize && p.out_features >= 0 && p.weight_stride >= 0,
          "a size is negative or over 2^31 - 1.");
  require(p.in_features >= 1 && p.in_features <= kMaxSize, "in_features is not 1 to 2^31 - 1.");
  require(p.num_threads >= 1 && p.num_threads <= kMaxThreads, "num_threads is not 1 to 1024.");
  const auto rows = static_cast<double>(p.rows), in = static_cast<double>(p.in_features),
             out = static_cast<double>(p.out_features);
  check_memory("x", p.x, x, rows * in, size);
  check_memory("y", p.y, y, rows * out, size);
  const double last = (out - 1) * static_cast<double>(p.weight_stride);
  if (p.out_features > 0) check_memory("weight", p.weight, weight, last + in, size);
  if (p.bias != nullptr) check_memory("bias", p.bias, bias, out, size);
}

inline void check_call(const AddNormParams& p, int64_t residual, int64_t block, int64_t weight, int64_t bias,
                       int64_t y) {
  const int64_t size = itemsize(p.dtype);
  require(p.rows >= 0 && p.features >= 1, "a size is negative or zero.");
  const double features = static_cast<double>(p.features), all = features * static_cast<double>(p.rows);
  check_memory("residual", p.residual, residual, all, size);
  check_memory("block", p.block, block, all, size);
  check_memory("y", p.y, y, all, size);
  check_memory("weight", p.weight, weight, features, size);
  check_memory("bias", p.bias, bias, features, size);
}

inline void check_call(const WriteRowsParams& p, int64_t position, int64_t from, int64_t to) {
  require(p.batch >= 0 && p.heads >= 0 && p.rows >= 0 && p.head_dim >= 0 && p.capacity >= 0,
          "a size is negative.");
  check_memory("position", p.position, position, static_cast<double>(p.rows), 8);
  check_rows("rows", p.from, from, p.dtype, p.batch, p.rows, p.heads, p.head_dim);
  check_rows("cache", p.to, to, p.dtype, p.batch, p.capacity, p.heads, p.head_dim);
}

}  // namespace led
