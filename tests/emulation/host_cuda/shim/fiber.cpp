#include "fiber.h"

#include <cstdint>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
  #include <sanitizer/asan_interface.h>
  #include <sanitizer/common_interface_defs.h>
#endif

namespace host_cuda {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackSize = 512 << 10;
#else
constexpr size_t kStackSize = 128 << 10;
#endif
constexpr size_t kPoisoned = 16 << 10;  // at the start of the stack: more than a kernel's frame
constexpr std::align_val_t kPage{4096};

Fiber* running = nullptr;

}  // namespace

#if defined(__x86_64__)

// Saves what a call preserves and the stack pointer to *save, and goes on where `load` was saved.
extern "C" void host_cuda_switch_stack(void** save, void* load);
asm(R"(
.text
.p2align 4
.type host_cuda_switch_stack, @function
.hidden host_cuda_switch_stack
.globl host_cuda_switch_stack
host_cuda_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size host_cuda_switch_stack, . - host_cuda_switch_stack
)");

void Fiber::start(void (*function)()) {
  function_ = function;
  #if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, kStackSize);
  #endif
  std::memset(stack_ + kStackSize - kPoisoned, 0xFF, kPoisoned);
  auto** top = reinterpret_cast<void**>(stack_ + kStackSize);
  *--top = nullptr;  // entry's return address
  *--top = reinterpret_cast<void*>(&Fiber::entry);
  for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
  stack_pointer_ = top;
}

void Fiber::switch_to_fiber() {
  host_cuda_switch_stack(&caller_stack_pointer_, stack_pointer_);
}

void Fiber::switch_to_caller() {
  host_cuda_switch_stack(&stack_pointer_, caller_stack_pointer_);
}

#else

void Fiber::start(void (*function)()) {
  function_ = function;
  std::memset(stack_ + kStackSize - kPoisoned, 0xFF, kPoisoned);
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackSize;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::entry, 0);
}

void Fiber::switch_to_fiber() {
  swapcontext(&caller_context_, &context_);
}

void Fiber::switch_to_caller() {
  swapcontext(&context_, &caller_context_);
}

#endif

Fiber::Fiber() : stack_(static_cast<unsigned char*>(::operator new(kStackSize, kPage))) {}

Fiber::~Fiber() {
  ::operator delete(stack_, kPage);
}

void Fiber::entry() {
  running->enter();
}

void Fiber::enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &caller_stack_, &caller_stack_size_);
#endif
  function_();
}

void Fiber::resume() {
  running = this;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&caller_fake_stack_, stack_, kStackSize);
#endif
  switch_to_fiber();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(caller_fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::suspend() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_stack_, caller_stack_, caller_stack_size_);
#endif
  switch_to_caller();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, &caller_stack_, &caller_stack_size_);
#endif
}

}  // namespace host_cuda
