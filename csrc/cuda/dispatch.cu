// Checks a call, lays out its workspace, and picks the launchers for its head_dim.
#include <algorithm>
#include <array>

#include "kernels.h"
#include "launch.h"
#include "launchers.h"

namespace led::cuda {
namespace {

// So many blocks roughly fill a GPU, which bounds the number of splits.
constexpr int64_t kEnoughBlocks = 1024;
// A split of the banded backward has at least so many queries.
constexpr int64_t kQueriesInSplit = 512;
constexpr int64_t kFewGlobals = 16;

int64_t round_up_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// How many elements lse spans, and what is laid out like it.
int64_t lse_size(const CudaAttentionParams& p) {
  const LseRef& lse = p.results.lse;
  return lse.batch_stride > 0 ? p.call.batch * lse.batch_stride : p.call.heads * lse.head_stride;
}

// Splits the tokens of a sequence.
void set_splits(Arguments& a, int64_t most_splits) {
  const int64_t units = std::max<int64_t>(1, round_up_div(a.call.max_seqlen, kSplitUnit));
  const int64_t units_in_split = round_up_div(units, std::max<int64_t>(1, most_splits));
  a.num_splits = static_cast<int>(round_up_div(units, units_in_split));
  a.split_size = static_cast<int>(units_in_split * kSplitUnit);
}

// Splits the keys of global attention, so that no more rows of partial results arise than a sequence has.
void split_keys(Arguments& a) {
  const AttentionCall& call = a.call;
  const int64_t globals = std::max<int64_t>(1, call.mask.max_globals);
  const int64_t row_tiles = globals <= kFewGlobals ? 1 : round_up_div(globals, 64);
  const int64_t row_blocks = std::max<int64_t>(1, call.batch * call.heads * row_tiles);
  set_splits(a, std::min(round_up_div(kEnoughBlocks, row_blocks), call.max_seqlen / globals));
}

// Splits the queries that gradients of global keys come from. The number is bounded also when every token is
// global.
void split_queries(Arguments& a) {
  const AttentionCall& call = a.call;
  const int64_t globals = std::max<int64_t>(1, call.mask.max_globals);
  set_splits(a, std::min(round_up_div(call.max_seqlen, kQueriesInSplit), call.max_seqlen / globals));
}

Arguments make_arguments(const CudaAttentionParams& p) {
  Arguments a{p};
  AttentionCall& call = a.call;
  call.window.left = std::min(call.window.left, call.max_seqlen);  // int32 in the kernels
  call.window.right = std::min(call.window.right, call.max_seqlen);
  a.softmax_scale = static_cast<float>(call.softmax_scale);
  a.qk_scale = static_cast<float>(call.softmax_scale * 1.4426950408889634);
  DropoutParams& dropout = call.dropout;
  const auto threshold = static_cast<uint64_t>(dropout.p * 4294967296.0 + 0.5);  // the first draw kept
  if (threshold == 0) dropout.device_seed = nullptr;
  a.last_dropped = static_cast<uint32_t>(std::max<uint64_t>(threshold, 1) - 1);
  a.keep_scale = dropout.p < 1 ? static_cast<float>(1 / (1 - dropout.p)) : 1.0f;
  return a;
}

bool is_aligned(const RowsRef& x) {
  const auto strides = x.batch_stride | x.row_stride | x.head_stride;
  return (reinterpret_cast<uintptr_t>(x.data) | static_cast<uintptr_t>(strides * 2)) % 16 == 0;
}

// Returns all tensors of rows; those that a forward leaves alone are empty.
std::array<RowsRef, 8> row_tensors(const CudaAttentionParams& p) {
  const AttentionGradients& grads = p.grads;
  return {p.call.q, p.call.k, p.call.v, p.results.out, grads.d_out, grads.dq, grads.dk, grads.dv};
}

// Tensor cores take head_dims that have tiles, and rows that start at multiples of 16 bytes.
Unit choose_unit(const CudaAttentionParams& p) {
  const int64_t head_dim = p.call.head_dim;
  if (p.call.dtype == DType::kFloat32 || (head_dim != 32 && head_dim != 64 && head_dim != 128))
    return Unit::kFma;
  for (const RowsRef& x : row_tensors(p)) {
    if (!is_aligned(x)) return Unit::kFma;
  }
  return Unit::kTensorCore;
}

void check_call(const CudaAttentionParams& p) {
  const Architectures built = architectures();
  const int device = p.execution.device;
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "tell the architecture");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "tell the architecture");
  const int capability = 10 * major + minor;
  int serving = built.ptx <= capability ? built.ptx : 0;  // the code that will run
  for (const int compiled : built.compiled) {
    if (compiled / 10 == major && compiled <= capability) serving = std::max(serving, compiled);
  }
  if (serving == 0) {
    throw std::runtime_error("This build has no code for compute capability " + std::to_string(major) + "." +
                             std::to_string(minor) + "; build with LED_KERNELS_CUDA_ARCHS that names it.");
  }
  if (p.call.dtype == DType::kBFloat16 && serving < 80) {
    throw std::runtime_error(
        "bfloat16 needs code for compute capability 8.0 or later, this device runs that for " +
        std::to_string(serving / 10) + "." + std::to_string(serving % 10) + "; cast to float16 or float32.");
  }
  for (const RowsRef& x : row_tensors(p)) {
    if (x.row_stride > INT32_MAX) {
      throw std::runtime_error("A tensor's rows are more than 2^31 elements apart; make it contiguous.");
    }
  }
}

template <class Launch>
void for_head_dim(int64_t head_dim, Launch launch) {
  if (head_dim <= 32) {
    launch(std::integral_constant<int, 32>{});
  } else if (head_dim <= 64) {
    launch(std::integral_constant<int, 64>{});
  } else if (head_dim <= 128) {
    launch(std::integral_constant<int, 128>{});
  } else {
    launch(std::integral_constant<int, 256>{});
  }
}

// How many rows of partial results the splits have of one operand.
int64_t partial_rows(const Arguments& a) {
  return a.call.batch * a.call.heads * a.num_splits * a.call.mask.max_globals;
}

}  // namespace

int64_t banded_forward_workspace(const CudaAttentionParams&) {
  return 0;
}

void banded_forward(const CudaAttentionParams& p) {
  const DeviceGuard guard(p.execution.device);
  check_call(p);
  const Arguments a = make_arguments(p);
  for_head_dim(p.call.head_dim, [&](auto d) { launch_banded_forward<d.value>(a, choose_unit(p)); });
}

// The workspace holds delta, then the splits' dk and dv of global keys.
int64_t banded_backward_workspace(const CudaAttentionParams& p) {
  Arguments a = make_arguments(p);
  split_queries(a);
  return lse_size(p) + 2 * partial_rows(a) * p.call.head_dim;
}

void banded_backward(const CudaAttentionParams& p) {
  const DeviceGuard guard(p.execution.device);
  check_call(p);
  Arguments a = make_arguments(p);
  split_queries(a);
  a.delta = p.execution.workspace;
  a.partials = p.execution.workspace + lse_size(p);
  for_head_dim(p.call.head_dim, [&](auto d) { launch_banded_backward<d.value>(a, choose_unit(p)); });
}

int64_t global_forward_workspace(const CudaAttentionParams& p) {
  Arguments a = make_arguments(p);
  split_keys(a);
  return partial_rows(a) * (p.call.head_dim + 2);
}

void global_forward(const CudaAttentionParams& p) {
  const DeviceGuard guard(p.execution.device);
  check_call(p);
  Arguments a = make_arguments(p);
  split_keys(a);
  a.partials = p.execution.workspace;
  for_head_dim(p.call.head_dim, [&](auto d) { launch_global_forward<d.value>(a, choose_unit(p)); });
}

// The workspace holds delta, then the splits' dq.
int64_t global_backward_workspace(const CudaAttentionParams& p) {
  Arguments a = make_arguments(p);
  split_keys(a);
  return lse_size(p) + partial_rows(a) * p.call.head_dim;
}

void global_backward(const CudaAttentionParams& p) {
  const DeviceGuard guard(p.execution.device);
  check_call(p);
  Arguments a = make_arguments(p);
  split_keys(a);
  a.delta = p.execution.workspace;
  a.partials = p.execution.workspace + lse_size(p);
  for_head_dim(p.call.head_dim, [&](auto d) { launch_global_backward<d.value>(a, choose_unit(p)); });
}

Architectures architectures() {
  return {{LED_CUDA_ARCHS}, LED_CUDA_PTX};
}

const char* device_type() {
#if defined(LED_HOST_CUDA)
  return "cpu";
#else
  return "cuda";
#endif
}

}  // namespace led::cuda
