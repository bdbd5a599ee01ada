// Coroutines with stacks of their own: one for each CUDA thread.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
  #include <ucontext.h>
#endif

namespace host_cuda {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() calls `function`, which suspends in place of returning. The stack holds NaNs.
  void start(void (*function)());
  // Runs the fiber until it suspends.
  void resume();
  // Back to resume(), from within the fiber.
  void suspend();

 private:
  static void entry();
  void enter();
  void switch_to_fiber();
  void switch_to_caller();

  unsigned char* stack_;
  void (*function_)() = nullptr;
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
  void* caller_stack_pointer_ = nullptr;
#else
  ucontext_t context_;
  ucontext_t caller_context_;
#endif
  // of AddressSanitizer
  void* fake_stack_ = nullptr;
  void* caller_fake_stack_ = nullptr;
  const void* caller_stack_ = nullptr;
  size_t caller_stack_size_ = 0;
};

}  // namespace host_cuda
