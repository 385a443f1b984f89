// Vectors, fences, atomics and cached loads.
#pragma once

#include "warp.hpp"

namespace corrmatch_emulator::cuda {

inline constexpr int warpSize = 32;

#define CORRMATCH_VECTORS(T, name)                           \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };         \
  struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };   \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CORRMATCH_VECTORS(int, int)
CORRMATCH_VECTORS(unsigned, uint)
CORRMATCH_VECTORS(float, float)
#undef CORRMATCH_VECTORS

// Memory is sequentially consistent here: a fence only gives others a turn.
inline void __threadfence(CORRMATCH_WHERE) { yield(where); }
inline void __threadfence_block(CORRMATCH_WHERE) { yield(where); }
inline void __threadfence_system(CORRMATCH_WHERE) { yield(where); }
inline void __nanosleep(unsigned, CORRMATCH_WHERE) { yield(where); }
[[noreturn]] inline void __trap(CORRMATCH_WHERE) { fail("__trap", where); }

#define CORRMATCH_ATOMIC(name, operation, ...)                                 \
  template <one_of<__VA_ARGS__> T>                                             \
  T name(T* address, std::type_identity_t<T> value, CORRMATCH_WHERE) {         \
    maybe_yield(where);                                                        \
    const T before = *address;                                                 \
    *address = operation(before, value);                                       \
    return before;                                                             \
  }                                                                            \
  template <one_of<__VA_ARGS__> T>                                             \
  T name##_block(T* address, std::type_identity_t<T> value, CORRMATCH_WHERE) { \
    return name(address, value, where);                                        \
  }
CORRMATCH_ATOMIC(atomicAdd, plus, int, unsigned, unsigned long long, float, double)
CORRMATCH_ATOMIC(atomicSub, minus, int, unsigned)
CORRMATCH_ATOMIC(atomicMin, smaller, int, unsigned, long long, unsigned long long)
CORRMATCH_ATOMIC(atomicMax, larger, int, unsigned, long long, unsigned long long)
CORRMATCH_ATOMIC(atomicAnd, both, int, unsigned, unsigned long long)
CORRMATCH_ATOMIC(atomicOr, either, int, unsigned, unsigned long long)
CORRMATCH_ATOMIC(atomicXor, differ, int, unsigned, unsigned long long)
CORRMATCH_ATOMIC(atomicExch, second, int, unsigned, unsigned long long, float)
#undef CORRMATCH_ATOMIC

template <one_of<int, unsigned, unsigned long long> T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value, CORRMATCH_WHERE) {
  maybe_yield(where);
  const T before = *address;
  if (before == compare) *address = value;
  return before;
}
template <class T>
T atomicCAS_block(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value, CORRMATCH_WHERE) {
  return atomicCAS(address, compare, value, where);
}

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address, CORRMATCH_WHERE) {
  maybe_yield(where);  // a loop may wait by it
  return *address;
}
template <class T>
void __stcg(T* address, std::type_identity_t<T> value) {
  *address = value;
}

}  // namespace corrmatch_emulator::cuda
