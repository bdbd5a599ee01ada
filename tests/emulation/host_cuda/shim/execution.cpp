#include "execution.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <sstream>
#include <vector>

#include "fiber.h"

#if defined(__SANITIZE_ADDRESS__)
  #include <sanitizer/asan_interface.h>
#endif

namespace host_cuda {
namespace {

constexpr unsigned char kPoison = 0xFF;  // NaN in every format
constexpr unsigned char kGuard = 0xA5;
constexpr size_t kGuardBytes = 1024;  // before and behind shared memory
constexpr size_t kSharedAlignment = 128;

enum class State { kReady, kAtWarp, kAtBlock, kDone };

struct Copy {
  void* shared;
  const void* global;
  bool exists;
  size_t group;
};

struct Thread {
  Fiber fiber;
  uint3 index = {};
  int linear = 0;
  State state = State::kDone;
  const char* waits_at = nullptr;  // instruction
  Site site = {};
  void* operand = nullptr;
  bool block_result = false;
  std::vector<Copy> copies;  // not landed yet, in order
  size_t committed_groups = 0;
};

struct Warp {
  int arrived = 0;
  Operation operation = nullptr;
  const Thread* first_arrived = nullptr;
};

// Shared memory of one block, with guards around it.
class SharedMemory {
 public:
  void reset(size_t bytes) {
    const size_t padding = (kSharedAlignment - bytes % kSharedAlignment) % kSharedAlignment;
    unpoison();
    buffer_.assign(bytes + padding + 2 * kGuardBytes + kSharedAlignment, kGuard);
    const auto start = reinterpret_cast<uintptr_t>(buffer_.data()) + kGuardBytes;
    data_ = buffer_.data() + kGuardBytes + (kSharedAlignment - start % kSharedAlignment) % kSharedAlignment;
    bytes_ = bytes;
    std::memset(data_, kPoison, bytes);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(data_ - kGuardBytes, kGuardBytes);
    __asan_poison_memory_region(data_ + bytes, kGuardBytes);
#endif
  }

  ~SharedMemory() { unpoison(); }

  bool holds(const void* address, size_t bytes) const {
    const auto* begin = static_cast<const unsigned char*>(address);
    return begin >= data_ && begin + bytes <= data_ + bytes_;
  }

  bool guards_are_whole() {
    unpoison();
    const auto is_guard = [](unsigned char byte) { return byte == kGuard; };
    return std::all_of(data_ - kGuardBytes, data_, is_guard) &&
           std::all_of(data_ + bytes_, data_ + bytes_ + kGuardBytes, is_guard);
  }

  unsigned char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void unpoison() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(buffer_.data(), buffer_.size());
#endif
  }

  std::vector<unsigned char> buffer_;
  unsigned char* data_ = nullptr;
  size_t bytes_ = 0;
};

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;  // their stacks are kept for the next block
  std::vector<Warp> warps;
  int size = 0;
  int live = 0;
  int at_barrier = 0;
  bool barrier_predicate = false;
  SharedMemory shared;
  std::exception_ptr failure;
  void (*kernel)(const void*) = nullptr;
  const void* argument = nullptr;
};

Block block;
Thread* current = nullptr;

std::string name_of(const Site& site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string name_of_block() {
  std::ostringstream text;
  text << "block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z << ")";
  return text.str();
}

void wait(State state, const char* instruction, Site site) {
  current->state = state;
  current->waits_at = instruction;
  current->site = site;
}

void open_barrier() {
  for (int i = 0; i < block.size; ++i) {
    Thread& thread = *block.threads[i];
    if (thread.state != State::kAtBlock) continue;
    thread.block_result = block.barrier_predicate;
    thread.state = State::kReady;
  }
  block.at_barrier = 0;
  block.barrier_predicate = false;
}

void run_thread() {
  try {
    block.kernel(block.argument);
  } catch (...) {
    block.failure = std::current_exception();
  }
  current->state = State::kDone;
  if (--block.live == block.at_barrier && block.live > 0) open_barrier();
  current->fiber.suspend();
}

// Until the thread waits -> whether it could run
bool step(int linear) {
  Thread& thread = *block.threads[linear];
  if (thread.state != State::kReady) return false;
  current = &thread;
  threadIdx = thread.index;
  thread.fiber.resume();
  if (block.failure) std::rethrow_exception(block.failure);
  return true;
}

// Whether any thread could run
bool run_lockstep() {
  bool ran = false;
  for (int i = 0; i < block.size; ++i) ran |= step(i);
  return ran;
}

bool run_greedy(bool reversed) {
  bool ran = false;
  const int warps = block.size / kWarpSize;
  for (int i = 0; i < warps; ++i) {
    const int first = (reversed ? warps - 1 - i : i) * kWarpSize;
    for (bool again = true; again;) {
      again = false;
      for (int lane = 0; lane < kWarpSize; ++lane) {
        again |= step(first + (reversed ? kWarpSize - 1 - lane : lane));
      }
      ran |= again;
    }
  }
  return ran;
}

[[noreturn]] void fail_deadlock() {
  std::ostringstream text;
  text << name_of_block() << ": deadlock, no thread can go on.";
  for (int first = 0; first < block.size; first += kWarpSize) {
    std::vector<std::pair<std::string, int>> places;  // and how many lanes are there
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const Thread& thread = *block.threads[first + lane];
      const std::string place = thread.state == State::kDone ? "have ended"
                                                             : "wait at " + std::string(thread.waits_at) +
                                                                   " in " + name_of(thread.site);
      if (places.empty() || places.back().first != place) places.emplace_back(place, 0);
      ++places.back().second;
    }
    text << " Warp " << first / kWarpSize << ":";
    for (const auto& [place, lanes] : places) text << " " << lanes << " lanes " << place << ";";
  }
  throw Failure(text.str());
}

void run_block(const std::string& schedule, size_t shared_bytes) {
  block.shared.reset(shared_bytes);
  block.warps.assign(block.size / kWarpSize, {});
  block.live = block.size;
  block.at_barrier = 0;
  block.barrier_predicate = false;
  block.failure = nullptr;
  for (int i = 0; i < block.size; ++i) {
    Thread& thread = *block.threads[i];
    const unsigned linear = i;
    thread.index = {linear % blockDim.x, linear / blockDim.x % blockDim.y,
                    linear / (blockDim.x * blockDim.y)};
    thread.linear = i;
    thread.state = State::kReady;
    thread.copies.clear();
    thread.committed_groups = 0;
    thread.fiber.start(run_thread);
  }
  while (block.live > 0) {
    const bool ran = schedule == "lockstep" ? run_lockstep() : run_greedy(schedule == "reversed");
    if (!ran) fail_deadlock();
  }
  if (!block.shared.guards_are_whole()) {
    throw Failure(name_of_block() + ": a store outside of the shared memory.");
  }
}

std::string chosen_schedule() {
  const char* chosen = std::getenv("LED_HOST_CUDA_SCHEDULE");
  const std::string schedule = chosen ? chosen : "greedy";
  if (schedule != "greedy" && schedule != "reversed" && schedule != "lockstep") {
    throw Failure("LED_HOST_CUDA_SCHEDULE is '" + schedule + "'; give greedy, reversed or lockstep.");
  }
  return schedule;
}

}  // namespace

void fail(const std::string& what, Site site) {
  throw Failure(name_of_block() + ", thread " + std::to_string(current->linear) + ": " + what + " (" +
                name_of(site) + ").");
}

void run_grid(dim3 grid, dim3 threads, size_t shared_bytes, void (*kernel)(const void*),
              const void* argument) {
  static std::mutex one_launch;
  const std::lock_guard<std::mutex> lock(one_launch);
  const std::string schedule = chosen_schedule();
  gridDim = grid;
  blockDim = threads;
  block.size = static_cast<int>(threads.x * threads.y * threads.z);
  block.kernel = kernel;
  block.argument = argument;
  while (block.threads.size() < static_cast<size_t>(block.size))
    block.threads.push_back(std::make_unique<Thread>());
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        run_block(schedule, shared_bytes);
      }
    }
  }
}

unsigned char* shared_memory() {
  return block.shared.data();
}

void check_shared_row(const void* address, const char* instruction, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
    fail(std::string(instruction) + ": misaligned address in shared memory", site);
  }
  if (!block.shared.holds(address, 16)) {
    const auto offset = static_cast<const unsigned char*>(address) - block.shared.data();
    fail(std::string(instruction) + ": out of bounds, byte " + std::to_string(offset) + " of " +
             std::to_string(block.shared.bytes()) + " in shared memory",
         site);
  }
}

void meet_warp(const char* instruction, Operation operation, void* operand, Site site) {
  const int first = current->linear / kWarpSize * kWarpSize;
  Warp& warp = block.warps[first / kWarpSize];
  current->operand = operand;
  wait(State::kAtWarp, instruction, site);
  if (warp.arrived == 0) {
    warp.operation = operation;
    warp.first_arrived = current;
  } else if (const Thread& other = *warp.first_arrived;
             warp.operation != operation || !(other.site == site)) {
    fail("divergence, the lane is at " + std::string(instruction) + " and lane " +
             std::to_string(other.linear - first) + " of its warp at " + other.waits_at + " in " +
             name_of(other.site),
         site);
  }
  if (++warp.arrived < kWarpSize) {
    current->fiber.suspend();
    return;
  }
  void* operands[kWarpSize];
  for (int lane = 0; lane < kWarpSize; ++lane) operands[lane] = block.threads[first + lane]->operand;
  operation(operands);
  for (int lane = 0; lane < kWarpSize; ++lane) block.threads[first + lane]->state = State::kReady;
  warp.arrived = 0;
}

bool meet_block(bool predicate, Site site) {
  const int first = current->linear / kWarpSize * kWarpSize;
  for (int i = first; i < first + kWarpSize; ++i) {
    const Thread& other = *block.threads[i];
    if (other.state != State::kAtBlock) continue;
    if (other.site == site) break;
    fail("divergence, the lane is at a barrier and lane " + std::to_string(i - first) +
             " of its warp at that of " + name_of(other.site),
         site);
  }
  wait(State::kAtBlock, "__syncthreads", site);
  block.barrier_predicate |= predicate;
  if (++block.at_barrier == block.live) {
    open_barrier();
  } else {
    current->fiber.suspend();
  }
  return current->block_result;
}

void start_copy(void* shared, const void* global, bool exists, Site site) {
  check_shared_row(shared, "copy_async", site);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail("copy_async: misaligned address in global memory", site);
  std::memset(shared, kPoison, 16);
  current->copies.push_back({shared, global, exists, current->committed_groups});
}

void commit_copies() {
  ++current->committed_groups;
}

void wait_for_copies(size_t pending_groups) {
  std::vector<Copy>& copies = current->copies;
  const auto landed = std::find_if(copies.begin(), copies.end(), [&](const Copy& copy) {
    return copy.group + pending_groups >= current->committed_groups;
  });
  std::for_each(copies.begin(), landed, [](const Copy& copy) {
    if (copy.exists) {
      std::memcpy(copy.shared, copy.global, 16);
    } else {
      std::memset(copy.shared, 0, 16);
    }
  });
  copies.erase(copies.begin(), landed);
}

}  // namespace host_cuda
