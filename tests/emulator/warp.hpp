// Calls that threads make together: barriers of a block; shuffles, votes, matches and folds of a warp.
#pragma once

#include <concepts>
#include <cstring>
#include <type_traits>

#include "emulator.hpp"

#define CORRMATCH_WHERE Where where = Where::current()  // of the call in the kernel

namespace corrmatch_emulator {

template <class T, class... Types>
concept one_of = (std::same_as<T, Types> || ...);

template <class T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Shuffles work on segments of `width` lanes; a lane whose source lies past its segment reads itself.
struct Segment {
  int lane, first, last;
  Segment(int width, const Where& where) : lane(int(thread_rank() % 32)) {
    if (width <= 0 || width > 32 || (width & (width - 1))) fail("the width of a shuffle is no power of two", where);
    first = lane & -width;
    last = first + width - 1;
  }
};
template <class T>
T shuffle(const Collective& what, uint32_t mask, T value, int source, const Where& where) {
  static_assert(one_of<T, int, unsigned, long, unsigned long, long long, unsigned long long, float, double>);
  if (!(mask >> source & 1)) fail("a shuffle reads from a lane that its mask does not name", where);
  return from_bits<T>(collective(what, mask, to_bits(value), source, where));
}
inline uint64_t take(const Lanes& lanes, int, int source) { return lanes.value[source]; }

// The lanes that passed true, and those that passed the same as this one.
inline uint64_t voters(const Lanes& lanes) {
  uint64_t found = 0;
  for (int i = 0; i < 32; ++i) found |= uint64_t{lanes.value[i] && (lanes.mask >> i & 1)} << i;
  return found;
}
inline uint64_t equals(const Lanes& lanes, int lane) {
  uint64_t found = 0;
  for (int i = 0; i < 32; ++i) found |= uint64_t{lanes.value[i] == lanes.value[lane] && (lanes.mask >> i & 1)} << i;
  return found;
}

// Of folds and of atomics. Sums of integers wrap.
inline constexpr auto plus = []<class T>(T a, T b) {
  if constexpr (std::integral<T>) return T(std::make_unsigned_t<T>(a) + std::make_unsigned_t<T>(b));
  if constexpr (!std::integral<T>) return a + b;
};
inline constexpr auto minus = [](auto a, auto b) { return plus(a, plus(decltype(b)(~b), decltype(b)(1))); };
inline constexpr auto smaller = [](auto a, auto b) { return b < a ? b : a; };
inline constexpr auto larger = [](auto a, auto b) { return a < b ? b : a; };
inline constexpr auto both = [](auto a, auto b) { return a & b; };
inline constexpr auto either = [](auto a, auto b) { return a | b; };
inline constexpr auto differ = [](auto a, auto b) { return a ^ b; };
inline constexpr auto second = [](auto, auto b) { return b; };

template <class T, auto Operation>
uint64_t fold(const Lanes& lanes, int, int) {
  int i = 0;
  while (!(lanes.mask >> i & 1)) ++i;
  T result = from_bits<T>(lanes.value[i]);
  while (++i < 32)
    if (lanes.mask >> i & 1) result = Operation(result, from_bits<T>(lanes.value[i]));
  return to_bits(result);
}

namespace cuda {

inline void __syncthreads(CORRMATCH_WHERE) { barrier(Scope::block, "__syncthreads", false, where); }
inline int __syncthreads_count(int predicate, CORRMATCH_WHERE) {
  return barrier(Scope::block, "__syncthreads_count", predicate != 0, where);
}
inline int __syncthreads_or(int predicate, CORRMATCH_WHERE) {
  return barrier(Scope::block, "__syncthreads_or", predicate != 0, where) != 0;
}
inline int __syncthreads_and(int predicate, CORRMATCH_WHERE) {
  return barrier(Scope::block, "__syncthreads_and", predicate == 0, where) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffff, CORRMATCH_WHERE) {
  static constexpr Collective what{"__syncwarp", take};
  collective(what, mask, 0, 0, where);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, CORRMATCH_WHERE) {
  static constexpr Collective what{"__shfl_sync", take};
  return shuffle(what, mask, value, Segment(width, where).first + (lane & (width - 1)), where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, CORRMATCH_WHERE) {
  static constexpr Collective what{"__shfl_up_sync", take};
  const Segment in(width, where);
  const int source = in.lane - int(by & 31);
  return shuffle(what, mask, value, source < in.first ? in.lane : source, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, CORRMATCH_WHERE) {
  static constexpr Collective what{"__shfl_down_sync", take};
  const Segment in(width, where);
  const int source = in.lane + int(by & 31);
  return shuffle(what, mask, value, source > in.last ? in.lane : source, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32, CORRMATCH_WHERE) {
  static constexpr Collective what{"__shfl_xor_sync", take};
  const Segment in(width, where);
  const int source = in.lane ^ (by & 31);
  return shuffle(what, mask, value, source > in.last ? in.lane : source, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CORRMATCH_WHERE) {
  static constexpr Collective what{"__ballot_sync", [](const Lanes& lanes, int, int) { return voters(lanes); }};
  return unsigned(collective(what, mask, predicate != 0, 0, where));
}
inline int __any_sync(unsigned mask, int predicate, CORRMATCH_WHERE) {
  static constexpr Collective what{"__any_sync",
                                   [](const Lanes& lanes, int, int) { return uint64_t{voters(lanes) != 0}; }};
  return int(collective(what, mask, predicate != 0, 0, where));
}
inline int __all_sync(unsigned mask, int predicate, CORRMATCH_WHERE) {
  static constexpr Collective what{"__all_sync",
                                   [](const Lanes& lanes, int, int) { return uint64_t{voters(lanes) == lanes.mask}; }};
  return int(collective(what, mask, predicate != 0, 0, where));
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, CORRMATCH_WHERE) {
  static constexpr Collective what{"__match_any_sync",
                                   [](const Lanes& lanes, int lane, int) { return equals(lanes, lane); }};
  return unsigned(collective(what, mask, to_bits(value), 0, where));
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* all, CORRMATCH_WHERE) {
  static constexpr Collective what{"__match_all_sync", [](const Lanes& lanes, int lane, int) {
                                     return equals(lanes, lane) == lanes.mask ? uint64_t{lanes.mask} : 0;
                                   }};
  const auto found = unsigned(collective(what, mask, to_bits(value), 0, where));
  *all = found != 0;
  return found;
}
// Hardware promises no more than the caller.
inline unsigned __activemask() { return 1u << thread_rank() % 32; }

#define CORRMATCH_REDUCE(name, operation, ...)                             \
  template <one_of<__VA_ARGS__> T>                                         \
  T name(unsigned mask, T value, CORRMATCH_WHERE) {                        \
    static constexpr Collective what{#name, fold<T, operation>};           \
    return from_bits<T>(collective(what, mask, to_bits(value), 0, where)); \
  }
CORRMATCH_REDUCE(__reduce_add_sync, plus, int, unsigned)
CORRMATCH_REDUCE(__reduce_min_sync, smaller, int, unsigned)
CORRMATCH_REDUCE(__reduce_max_sync, larger, int, unsigned)
CORRMATCH_REDUCE(__reduce_and_sync, both, unsigned)
CORRMATCH_REDUCE(__reduce_or_sync, either, unsigned)
CORRMATCH_REDUCE(__reduce_xor_sync, differ, unsigned)
#undef CORRMATCH_REDUCE

}  // namespace cuda
}  // namespace corrmatch_emulator
