// Fibers: functions with stacks of their own that give way to each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define CUDA_ON_CPU_ADDRESS_SANITIZER 1
#else
#define CUDA_ON_CPU_ADDRESS_SANITIZER 0
#endif

namespace cuda_on_cpu {

constexpr size_t kStackBytes = CUDA_ON_CPU_ADDRESS_SANITIZER ? 256 << 10 : 64 << 10;

struct Fiber {
  std::function<void()> body;
  std::unique_ptr<char[]> stack;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

// The context that entered the fiber which runs.
#if defined(__x86_64__)
inline void* outside = nullptr;
#else
inline ucontext_t outside;
#endif
inline const void* outside_stack = nullptr;
inline size_t outside_stack_bytes = 0;
inline Fiber* running = nullptr;

#if defined(__x86_64__)
// Saves the registers that a function must keep, changes stacks, and loads them from there.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(R"(
.text
.weak cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
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
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");
#endif

inline void leave_fiber(Fiber& fiber);

inline void fiber_main() {
#if CUDA_ON_CPU_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(nullptr, &outside_stack, &outside_stack_bytes);
#endif
  Fiber& self = *running;
  self.body();
  for (;;) leave_fiber(self);
}

inline void start_fiber(Fiber& fiber, std::function<void()> body) {
  fiber.body = std::move(body);
  if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStackBytes);
#if defined(__x86_64__)
  // Six registers, then the address that `ret` takes; at entry the stack is 8 bytes off 16.
  const uintptr_t top =
      reinterpret_cast<uintptr_t>(fiber.stack.get() + kStackBytes) & ~uintptr_t(15);
  void** place = reinterpret_cast<void**>(top) - 2;
  *place = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--place = nullptr;
  fiber.stack_pointer = place;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &fiber_main, 0);
#endif
}

inline void enter_fiber(Fiber& fiber) {
  running = &fiber;
#if CUDA_ON_CPU_ADDRESS_SANITIZER
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), kStackBytes);
#endif
#if defined(__x86_64__)
  cuda_on_cpu_switch(&outside, fiber.stack_pointer);
#else
  swapcontext(&outside, &fiber.context);
#endif
#if CUDA_ON_CPU_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

inline void leave_fiber(Fiber& fiber) {
#if CUDA_ON_CPU_ADDRESS_SANITIZER
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, outside_stack, outside_stack_bytes);
#endif
#if defined(__x86_64__)
  cuda_on_cpu_switch(&fiber.stack_pointer, outside);
#else
  swapcontext(&fiber.context, &outside);
#endif
#if CUDA_ON_CPU_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(fake_stack, &outside_stack, &outside_stack_bytes);
#endif
}

}  // namespace cuda_on_cpu
