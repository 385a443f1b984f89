// A fiber: a function with a stack of its own that can be left in the middle and gone on with later.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Pushes what a called function has to keep, changes stacks, pops the same of the other fiber.
asm(R"(
  .text
  .hidden corrmatch_emulator_switch
  .globl corrmatch_emulator_switch
  .type corrmatch_emulator_switch, @function
corrmatch_emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov (%rsi), %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
extern "C" void corrmatch_emulator_switch(void** from, void** to);
#else
#include <ucontext.h>  // slower: every switch is a system call
#endif

namespace corrmatch_emulator {

#if defined(__x86_64__)
using Context = void*;  // the stack pointer
inline void switch_context(Context& from, Context& to) { corrmatch_emulator_switch(&from, &to); }
inline void make_context(Context& context, std::byte* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes) - 2;
  top[0] = reinterpret_cast<void*>(entry);  // where the switch returns to
  top[1] = nullptr;                         // entry's own return address: it never returns
  context = top - 6;                        // six registers
}
#else
using Context = ucontext_t;
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
inline void make_context(Context& context, std::byte* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

class Fiber {
 public:
  explicit Fiber(size_t number) : size_(kBytes - number % 32 * 128) {  // tops at one offset would share few cache lines
    void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stack_ = static_cast<std::byte*>(memory);
    mprotect(stack_, 4096, PROT_NONE);  // an overflow stops here
  }
  Fiber(const Fiber&) = delete;
  ~Fiber() { munmap(stack_, kBytes); }

  // The next resume() calls body, which must end in suspend(true). What ran on this stack before is forgotten.
  void start(void (*body)()) {
    body_ = body;
#if defined(__SANITIZE_ADDRESS__)
    if (!ended_) __asan_unpoison_memory_region(stack_, kBytes);
    fake_stack_ = nullptr;
#endif
    ended_ = false;
    make_context(context_, stack_, size_, &enter);
  }

  // From the scheduler into the fiber, until it calls suspend().
  void resume() {
    running_ = this;
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, stack_, size_);
#endif
    switch_context(scheduler_, context_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  // From the fiber back to the scheduler; for good at its end.
  void suspend(bool for_good = false) {
    ended_ = for_good;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, scheduler_stack_, scheduler_bytes_);
#endif
    switch_context(context_, scheduler_);
    arrived();
  }

 private:
  static constexpr size_t kBytes = 128 * 1024;

  static void enter() {
    running_->arrived();
    running_->body_();
  }
  void arrived() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, &scheduler_stack_, &scheduler_bytes_);
#endif
  }

  Context context_{};
  std::byte* stack_ = nullptr;
  size_t size_;
  void (*body_)() = nullptr;
  bool ended_ = true;

  static inline Fiber* running_ = nullptr;
  static inline Context scheduler_{};
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack_ = nullptr;
  static inline const void* scheduler_stack_ = nullptr;
  static inline size_t scheduler_bytes_ = 0;
#endif
};

}  // namespace corrmatch_emulator
