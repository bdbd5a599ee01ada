// Checks a call, lays out its workspace, and picks the launchers for its head_dim.
#include <algorithm>
#include <initializer_list>

#include "kernels.h"
#include "launch.h"
#include "launchers.h"

namespace led::cuda {
namespace {

// Blocks that fill a GPU, roughly, and so bound the number of splits.
constexpr int64_t kEnoughBlocks = 1024;
// Queries that a split of the banded backward has at least.
constexpr int64_t kQueriesInSplit = 512;
constexpr int64_t kFewGlobals = 16;

int64_t round_up_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Elements that lse, and what is laid out like it, spans.
int64_t lse_size(const AttentionParams& p) {
  return p.lse.batch_stride > 0 ? p.batch * p.lse.batch_stride : p.heads * p.lse.head_stride;
}

void set_splits(Arguments& a, int64_t columns, int64_t most_splits) {
  const int64_t units = std::max<int64_t>(1, round_up_div(columns, kSplitUnit));
  const int64_t units_in_split = round_up_div(units, std::max<int64_t>(1, most_splits));
  a.num_splits = static_cast<int>(round_up_div(units, units_in_split));
  a.split_size = static_cast<int>(units_in_split * kSplitUnit);
}

// The keys of global attention. No more rows of partial results than a sequence has.
void split_keys(Arguments& a) {
  const AttentionParams& p = a.p;
  const int64_t globals = std::max<int64_t>(1, p.mask.max_globals);
  const int64_t row_tiles = globals <= kFewGlobals ? 1 : round_up_div(globals, 64);
  const int64_t wanted = round_up_div(kEnoughBlocks, std::max<int64_t>(1, p.batch * p.heads * row_tiles));
  set_splits(a, p.max_seqlen, std::min(wanted, p.max_seqlen / globals));
}

// The queries of the gradients of global keys. Bounded also when every token is global.
void split_queries(Arguments& a) {
  const AttentionParams& p = a.p;
  const int64_t globals = std::max<int64_t>(1, p.mask.max_globals);
  set_splits(a, p.max_seqlen, std::min(round_up_div(p.max_seqlen, kQueriesInSplit), p.max_seqlen / globals));
}

Arguments make_arguments(const AttentionParams& p) {
  Arguments a;
  a.p = p;
  a.p.window_left = std::min(p.window_left, p.max_seqlen);  // int32 in the kernels
  a.p.window_right = std::min(p.window_right, p.max_seqlen);
  a.softmax_scale = static_cast<float>(p.softmax_scale);
  a.qk_scale = static_cast<float>(p.softmax_scale * 1.4426950408889634);
  const auto threshold =
      static_cast<uint64_t>(p.dropout_p * 4294967296.0 + 0.5);  // the first draw that is kept
  if (threshold == 0) a.p.device_seed = nullptr;
  a.last_dropped = static_cast<uint32_t>(std::max<uint64_t>(threshold, 1) - 1);
  a.keep_scale = p.dropout_p < 1 ? static_cast<float>(1 / (1 - p.dropout_p)) : 1.0f;
  return a;
}

bool is_aligned(const RowsRef& x) {
  const auto strides = x.batch_stride | x.row_stride | x.head_stride;
  return (reinterpret_cast<uintptr_t>(x.data) | static_cast<uintptr_t>(strides * 2)) % 16 == 0;
}

// Tensor cores take head_dims that have tiles, and rows that start at multiples of 16 bytes.
Unit choose_unit(const AttentionParams& p) {
  if (p.dtype == DType::kFloat32 || (p.head_dim != 32 && p.head_dim != 64 && p.head_dim != 128))
    return Unit::kFma;
  for (const RowsRef& x : {p.q, p.k, p.v, p.out, p.d_out, p.dq, p.dk, p.dv}) {
    if (!is_aligned(x)) return Unit::kFma;
  }
  return Unit::kTensorCore;
}

void check_call(const AttentionParams& p) {
  const Architectures built = architectures();
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, p.device), "tell the architecture");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, p.device), "tell the architecture");
  const int capability = 10 * major + minor;
  int serving = built.ptx <= capability ? built.ptx : 0;  // the code that will run
  for (const int compiled : built.compiled) {
    if (compiled / 10 == major && compiled <= capability) serving = std::max(serving, compiled);
  }
  if (serving == 0) {
    throw std::runtime_error("This build has no code for compute capability " + std::to_string(major) + "." +
                             std::to_string(minor) + "; build with LED_KERNELS_CUDA_ARCHS that names it.");
  }
  if (p.dtype == DType::kBFloat16 && serving < 80) {
    throw std::runtime_error(
        "bfloat16 needs code for compute capability 8.0 or later, this device runs that for " +
        std::to_string(serving / 10) + "." + std::to_string(serving % 10) + "; cast to float16 or float32.");
  }
  for (const RowsRef& x : {p.q, p.k, p.v, p.out, p.d_out, p.dq, p.dk, p.dv}) {
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

}  // namespace

int64_t banded_forward_workspace(const AttentionParams&) {
  return 0;
}

void banded_forward(const AttentionParams& p) {
  const DeviceGuard guard(p.device);
  check_call(p);
  const Arguments a = make_arguments(p);
  for_head_dim(p.head_dim, [&](auto d) { launch_banded_forward<d.value>(a, choose_unit(p)); });
}

// delta, then the partial dk and dv of global keys
int64_t banded_backward_workspace(const AttentionParams& p) {
  Arguments a = make_arguments(p);
  split_queries(a);
  return lse_size(p) + 2 * a.num_splits * p.batch * p.mask.max_globals * p.heads * p.head_dim;
}

void banded_backward(const AttentionParams& p) {
  const DeviceGuard guard(p.device);
  check_call(p);
  Arguments a = make_arguments(p);
  split_queries(a);
  a.delta = p.workspace;
  a.partials = p.workspace + lse_size(p);
  for_head_dim(p.head_dim, [&](auto d) { launch_banded_backward<d.value>(a, choose_unit(p)); });
}

int64_t global_forward_workspace(const AttentionParams& p) {
  Arguments a = make_arguments(p);
  split_keys(a);
  return p.batch * p.heads * a.num_splits * p.mask.max_globals * (p.head_dim + 2);
}

void global_forward(const AttentionParams& p) {
  const DeviceGuard guard(p.device);
  check_call(p);
  Arguments a = make_arguments(p);
  split_keys(a);
  a.partials = p.workspace;
  for_head_dim(p.head_dim, [&](auto d) { launch_global_forward<d.value>(a, choose_unit(p)); });
}

// delta, then the splits' dq
int64_t global_backward_workspace(const AttentionParams& p) {
  Arguments a = make_arguments(p);
  split_keys(a);
  return lse_size(p) + p.batch * p.heads * a.num_splits * p.mask.max_globals * p.head_dim;
}

void global_backward(const AttentionParams& p) {
  const DeviceGuard guard(p.device);
  check_call(p);
  Arguments a = make_arguments(p);
  split_keys(a);
  a.delta = p.workspace;
  a.partials = p.workspace + lse_size(p);
  for_head_dim(p.head_dim, [&](auto d) { launch_global_backward<d.value>(a, choose_unit(p)); });
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
