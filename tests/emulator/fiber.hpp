// A fiber: a function with a stack of its own that can be left in the middle and gone on with later.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>

#if defined(__SANITIZE_ADDRESS__)  // it has to know which stack is in use
#include <sanitizer/asan_interface.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
inline void __sanitizer_set_death_callback(void (*)()) {}
inline void __asan_unpoison_memory_region(const void*, size_t) {}
#endif

#if defined(__x86_64__)
// Pushes what a called function has to keep, changes stacks, pops the same of the other fiber.
asm(R"(
  .text
  .local corrmatch_emulator_switch
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
    if (!ended_) __asan_unpoison_memory_region(stack_, kBytes);
    ended_ = false;
    body_ = body;
    fake_stack_ = nullptr;
    make_context(context_, stack_, size_, &enter);
  }

  // From the scheduler into the fiber, until it calls suspend().
  void resume() {
    running_ = this;
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, stack_, size_);
    switch_context(scheduler_, context_);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  }

  // From the fiber back to the scheduler; for good at its end.
  void suspend(bool for_good = false) {
    ended_ = for_good;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, scheduler_stack_, scheduler_bytes_);
    switch_context(context_, scheduler_);
    __sanitizer_finish_switch_fiber(fake_stack_, &scheduler_stack_, &scheduler_bytes_);
  }

 private:
  static constexpr size_t kBytes = 128 * 1024;

  static void enter() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_, &scheduler_bytes_);
    running_->body_();
  }

  Context context_{};
  std::byte* stack_ = nullptr;
  size_t size_;
  void (*body_)() = nullptr;
  bool ended_ = true;
  void* fake_stack_ = nullptr;

  static inline Fiber* running_ = nullptr;
  static inline Context scheduler_{};
  static inline const void* scheduler_stack_ = nullptr;
  static inline size_t scheduler_bytes_ = 0;
};

}  // namespace corrmatch_emulator
