// Lets whoever called a kernel give it up while it runs, as Ctrl-C does. Kernels ask between blocks.
#pragma once

#include <atomic>
#include <chrono>
#include <thread>

#include "attention_params.h"

namespace led {

// Whoever called a kernel that was given up throws this: its results are none.
struct Interrupted {};

class Interruption {
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kPeriod{50};

 public:
  // `asked` is called every 50 ms, on the constructing thread alone, which is one of those that compute.
  explicit Interruption(bool (*asked)()) : asked_(asked), next_(Clock::now() + kPeriod) {}

  bool stops() {
    if (!stopped_.load(std::memory_order_relaxed) && std::this_thread::get_id() == owner_ &&
        Clock::now() >= next_) {
      if (asked_()) stopped_.store(true, std::memory_order_relaxed);
      next_ = Clock::now() + kPeriod;
    }
    return stopped_.load(std::memory_order_relaxed);
  }

 private:
  bool (*const asked_)();
  const std::thread::id owner_ = std::this_thread::get_id();
  Clock::time_point next_;
  std::atomic<bool> stopped_{false};
};

inline bool CpuExecution::stops() const {
  return interruption != nullptr && interruption->stops();
}

}  // namespace led
