// Working memory of the operators.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace corrmatch::CORRMATCH_ISA {

// Uninitialised memory, aligned to a cache line.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(T) + kAlignment) / kAlignment * kAlignment;
    memory_.reset(static_cast<T*>(std::aligned_alloc(kAlignment, bytes)));
    if (!memory_) throw std::bad_alloc();
  }
  operator T*() { return memory_.get(); }
  operator const T*() const { return memory_.get(); }

 private:
  static constexpr size_t kAlignment = 64;
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> memory_;
};

}  // namespace corrmatch::CORRMATCH_ISA
