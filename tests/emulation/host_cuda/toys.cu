// Small kernels for test_harness.py: each uses one thing that the shim emulates, or breaks one of its rules.
#include <cstring>
#include <exception>

#include "../../../csrc/cuda/primitives.cuh"

namespace led::cuda {
namespace {

struct Toy {
  const void* in;
  void* out;
  int option;

  template <class T>
  const T* input() const {
    return static_cast<const T*>(in);
  }
  template <class T>
  T* output() const {
    return static_cast<T*>(out);
  }
};

__device__ int lane_of_thread() {
  return threadIdx.x % kWarpSize;
}

// out: uint32 [threads, 6] of one block, the last one that ran
__global__ void indices(Toy toy) {
  const unsigned thread = threadIdx.x + blockDim.x * threadIdx.y;
  const unsigned values[] = {threadIdx.x, threadIdx.y, blockIdx.x, blockIdx.y, blockIdx.z, gridDim.y};
  for (int i = 0; i < 6; ++i) toy.output<unsigned>()[6 * thread + i] = values[i];
}

// in: [32] of T; out: [2, 32]
template <class T>
__global__ void shuffle(Toy toy) {
  const int lane = lane_of_thread();
  const T value = toy.input<T>()[lane];
  toy.output<T>()[lane] = __shfl_sync(kAllLanes, value, lane / 4 * 4);
  toy.output<T>()[kWarpSize + lane] = __shfl_xor_sync(kAllLanes, value, toy.option);
}

// in: int [32]; out: uint32 [3, 32]
__global__ void votes(Toy toy) {
  const int lane = lane_of_thread();
  const int predicate = toy.input<int>()[lane];
  toy.output<unsigned>()[lane] = __ballot_sync(kAllLanes, predicate);
  toy.output<unsigned>()[kWarpSize + lane] = __any_sync(kAllLanes, predicate);
  toy.output<unsigned>()[2 * kWarpSize + lane] = __all_sync(kAllLanes, predicate);
}

// in: int [threads]; out: int [threads]
__global__ void block_votes(Toy toy) {
  toy.output<int>()[threadIdx.x] = __syncthreads_or(toy.input<int>()[threadIdx.x]);
}

// in: a [16, 16], b [16, 8] of T; out: fp32 [16, 8], added to
template <class T>
__global__ void product(Toy toy) {
  const int g = lane_of_thread() / 4, t = lane_of_thread() % 4;
  const auto* a = toy.input<uint16_t>();
  const uint16_t* b = a + 16 * 16;
  auto* out = toy.output<float>();
  const auto pair = [](uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; };
  uint32_t a_fragment[4], b_fragment[2];
  for (int i = 0; i < 4; ++i) {
    const uint16_t* at = a + 16 * (g + i % 2 * 8) + 2 * t + i / 2 * 8;
    a_fragment[i] = pair(at[0], at[1]);
  }
  for (int i = 0; i < 2; ++i) {
    const uint16_t* at = b + 8 * (2 * t + 8 * i) + g;
    b_fragment[i] = pair(at[0], at[8]);
  }
  float d[4];
  const auto row = [&](int i) { return out + 8 * (g + i / 2 * 8) + 2 * t + i % 2; };
  for (int i = 0; i < 4; ++i) d[i] = *row(i);
  mma<T>(d, a_fragment, b_fragment[0], b_fragment[1], d);
  for (int i = 0; i < 4; ++i) *row(i) = d[i];
}

// in: uint16 [32, 8]; out: uint32 [4, 32]. Option: 1 transposes.
__global__ void matrices(Toy toy) {
  unsigned char* row = dynamic_shared_memory() + 16 * lane_of_thread();
  std::memcpy(row, toy.input<unsigned char>() + 16 * lane_of_thread(), 16);
  __syncwarp();
  uint32_t r[4];
  if (toy.option == 1) {
    ldmatrix_transposed(r, row);
  } else {
    ldmatrix(r, row);
  }
  for (int i = 0; i < 4; ++i) toy.output<uint32_t>()[kWarpSize * i + lane_of_thread()] = r[i];
}

// in: fp32 [threads, 2]; out: uint32 [threads, 4]: both rounded, the pair, and back
template <class T>
__global__ void conversions(Toy toy) {
  const float* x = toy.input<float>() + 2 * (threadIdx.x + blockIdx.x * blockDim.x);
  auto* out = toy.output<uint32_t>() + 4 * (threadIdx.x + blockIdx.x * blockDim.x);
  const T rounded = from_float<T>(x[0]);
  out[0] = rounded.bits;
  out[1] = from_float<T>(x[1]).bits;
  out[2] = pack<T>(x[0], x[1]);
  out[3] = __float_as_uint(to_float(rounded));
}

// in: fp32 [threads]; out: fp32 [2, threads]
__global__ void exponentials(Toy toy) {
  const float x = toy.input<float>()[threadIdx.x];
  toy.output<float>()[threadIdx.x] = exp2_approx(x);
  toy.output<float>()[blockDim.x + threadIdx.x] = __uint_as_float(__umulhi(__float_as_uint(x), 0x89ABCDEFu));
}

// in, out: fp32 [threads], reversed through shared memory. Option: 1 leaves the barrier out.
__global__ void reverse(Toy toy) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared_memory());
  shared[threadIdx.x] = toy.input<float>()[threadIdx.x];
  if (toy.option != 1) __syncthreads();
  toy.output<float>()[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

// in: fp32 [2, 4 * threads]; out: the same. Each thread's two copies are two groups; option: how many the
// first read leaves under way. The second half is not copied but zeros where the thread's number is odd.
__global__ void copies(Toy toy) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared_memory());
  const int at = 4 * threadIdx.x, second = 4 * blockDim.x;
  copy_async(shared + at, toy.input<float>() + at, true);
  commit_copies();
  copy_async(shared + second + at, toy.input<float>() + second + at, threadIdx.x % 2 == 0);
  commit_copies();
  if (toy.option == 0) wait_for_copies<0>();
  if (toy.option == 1) wait_for_copies<1>();
  for (int i = 0; i < 4; ++i) {
    toy.output<float>()[at + i] = shared[at + i];
    toy.output<float>()[second + at + i] = shared[second + at + i];
  }
}

// out: fp32 [threads], the shared memory that a block starts with
__global__ void fresh_memory(Toy toy) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared_memory());
  toy.output<float>()[threadIdx.x] = shared[threadIdx.x];
  shared[threadIdx.x] = 1.0f;
}

// Every warp but the first ends before the barrier.
__global__ void early_end(Toy toy) {
  if (threadIdx.x >= kWarpSize) return;
  __syncthreads();
  toy.output<int>()[threadIdx.x] = 1;
}

// Option: bytes by which the address is off
__global__ void misplaced_matrices(Toy toy) {
  uint32_t r[4];
  ldmatrix(r, dynamic_shared_memory() + 16 * lane_of_thread() + toy.option);
}

__global__ void misplaced_copy(Toy toy) {
  copy_async(dynamic_shared_memory() + toy.option, toy.in, true);
}

__global__ void misaligned_source(Toy toy) {
  copy_async(dynamic_shared_memory(), toy.input<char>() + toy.option, true);
}

__global__ void store_behind(Toy toy) {
  dynamic_shared_memory()[toy.option] = 1;
}

__global__ void two_shuffles_that_meet(Toy toy) {
  const int lane = lane_of_thread();
  int value = 0;
  if (lane < 16) {
    value = __shfl_sync(kAllLanes, lane, 0);
  } else {
    value = __shfl_sync(kAllLanes, lane, 1);
  }
  toy.output<int>()[lane] = value;
}

__global__ void half_a_warp(Toy) {
  if (lane_of_thread() < 16) __syncwarp();
}

__global__ void barrier_in_half_a_warp(Toy) {
  if (lane_of_thread() < 16) __syncthreads();
  __syncwarp();
}

__global__ void trap(Toy toy) {
  if (threadIdx.x == static_cast<unsigned>(toy.option)) __trap();
}

const struct {
  const char* name;
  void (*kernel)(Toy);
} kToys[] = {
    {"indices", indices},
    {"shuffle_float", shuffle<float>},
    {"shuffle_int64", shuffle<int64_t>},
    {"votes", votes},
    {"block_votes", block_votes},
    {"product_half", product<Half>},
    {"product_bfloat16", product<BFloat16>},
    {"matrices", matrices},
    {"conversions_half", conversions<Half>},
    {"conversions_bfloat16", conversions<BFloat16>},
    {"exponentials", exponentials},
    {"reverse", reverse},
    {"copies", copies},
    {"fresh_memory", fresh_memory},
    {"early_end", early_end},
    {"misplaced_matrices", misplaced_matrices},
    {"misplaced_copy", misplaced_copy},
    {"misaligned_source", misaligned_source},
    {"store_behind", store_behind},
    {"two_shuffles_that_meet", two_shuffles_that_meet},
    {"half_a_warp", half_a_warp},
    {"barrier_in_half_a_warp", barrier_in_half_a_warp},
    {"trap", trap},
};

}  // namespace
}  // namespace led::cuda

// Runs the kernel of that name -> empty, or the text of the error.
extern "C" __attribute__((visibility("default"))) const char* run_toy(const char* name, const unsigned* grid,
                                                                      const unsigned* block,
                                                                      size_t shared_bytes, const void* in,
                                                                      void* out, int option) {
  static std::string error;
  error.clear();
  led::cuda::Toy toy{in, out, option};
  void* arguments[] = {&toy};
  for (const auto& [known, kernel] : led::cuda::kToys) {
    if (std::strcmp(known, name) != 0) continue;
    try {
      const cudaError_t status =
          cudaLaunchKernel(kernel, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]),
                           arguments, shared_bytes, nullptr);
      if (status != cudaSuccess) error = cudaGetErrorString(status);
    } catch (const std::exception& failure) {
      error = failure.what();
    }
    return error.c_str();
  }
  return "no such kernel";
}
