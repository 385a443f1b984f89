// A fiber: a function with its own stack, which can be suspended and continued later.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <new>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)  // it has to know which stack is in use
#include <sanitizer/asan_interface.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
inline void __sanitizer_set_death_callback(void (*)()) {}
inline void __asan_unpoison_memory_region(const void*, size_t) {}
#endif

namespace corrmatch_emulator {

class Fiber {
 public:
  // Runs body again and again, suspended after each time. A fiber that goes in the middle of it is not unwound.
  Fiber(void (*body)(), size_t number) : body_(body) {
    void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, 4096, PROT_NONE);  // an overflow stops here
    getcontext(&start_);
    start_.uc_stack.ss_sp = memory;
    start_.uc_stack.ss_size = kBytes - number % 32 * 128;  // tops at one offset would share few cache lines
    makecontext(&start_, &enter, 0);
  }
  Fiber(const Fiber&) = delete;
  ~Fiber() {
    __asan_unpoison_memory_region(start_.uc_stack.ss_sp, kBytes);
    munmap(start_.uc_stack.ss_sp, kBytes);
  }

  // From the scheduler into the fiber, until it calls suspend().
  void resume() {
    running_ = this;
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, start_.uc_stack.ss_sp, start_.uc_stack.ss_size);
    change(scheduler_, place_, std::exchange(started_, true) ? nullptr : &start_);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  }

  // From the fiber back to the scheduler.
  void suspend() {
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, scheduler_stack_, scheduler_bytes_);
    change(place_, scheduler_);
    __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack_, &scheduler_bytes_);
  }

 private:
  static constexpr size_t kBytes = 128 * 1024;
  using Place = void* [5];

  // Jumps to a place, or to a start. Returns when something jumps to `from`. Like swapcontext without its system calls.
  [[gnu::noinline, gnu::no_sanitize("address")]] static void change(Place& from, Place& to,
                                                                    const ucontext_t* start = nullptr) {
    if (__builtin_setjmp(from)) return;
    if (start) setcontext(start);
    __builtin_longjmp(to, 1);
  }

  static void enter() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_, &scheduler_bytes_);
    for (Fiber& self = *running_;; self.suspend()) self.body_();
  }

  void (*body_)();
  ucontext_t start_;
  bool started_ = false;
  Place place_;

  static inline Fiber* running_ = nullptr;
  static inline Place scheduler_;
  static inline const void* scheduler_stack_ = nullptr;
  static inline size_t scheduler_bytes_ = 0;
};

}  // namespace corrmatch_emulator
