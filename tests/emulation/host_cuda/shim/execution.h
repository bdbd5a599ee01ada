// The CUDA execution model on the CPU: a fiber for each thread, blocks one after another. What goes wrong in
// a kernel comes out of its launch as a Failure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace host_cuda {

constexpr int kWarpSize = 32;

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Of a call in a kernel; as a default argument it is the caller's.
struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

inline bool operator==(const Site& a, const Site& b) {
  return a.line == b.line && a.file == b.file;
}

// Throws a Failure that names the running thread.
[[noreturn]] void fail(const std::string& what, Site site);

// Runs `kernel(argument)` in every thread. LED_HOST_CUDA_SCHEDULE chooses who runs when a thread has to wait:
//   greedy     the other threads of its warp; another warp once none of them can go on (the default)
//   reversed   the same, from the last thread of the last warp on
//   lockstep   the next thread of the block
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(const void*), const void* argument);

unsigned char* shared_memory();

// Fails unless shared memory holds the 16 bytes at `address`, and they are aligned.
void check_shared_row(const void* address, const char* instruction, Site site);

// All lanes of a warp meet. The last one calls operation(operands) for all of them; results go to the
// operands, which lie on the lanes' stacks.
using Operation = void (*)(void* const* operands);
void meet_warp(const char* instruction, Operation operation, void* operand, Site site);

// All threads of the block that still run meet -> whether `predicate` is true in one of them.
bool meet_block(bool predicate, Site site);

// Asynchronous copies: the destination holds NaNs until a wait covers the copy's group.
void start_copy(void* shared, const void* global, bool exists, Site site);
void commit_copies();
void wait_for_copies(size_t pending_groups);

}  // namespace host_cuda
