// Vectors as wide as the instruction set this file is compiled for, in the compiler's own vector types, so that
// one source serves AVX-512, AVX2 and any other processor (16 bytes: SSE2 on x86-64, NEON on Arm).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace corrmatch::CORRMATCH_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kVectorRegisters = 16;
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kVectorRegisters = 16;
#endif

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
};

template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
using Int = typename Simd<T>::Int;
template <class T>
inline constexpr int kLanes = kVectorBytes / int(sizeof(T));
template <class T>
using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;  // of an Int<T>

// Pointers of load and store have to be aligned to the vector.
template <class T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}
template <class T>
inline Int<T> load_lanes(const Lane<T>* p) {
  return *reinterpret_cast<const Int<T>*>(p);
}
template <class T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<Vec<T>*>(p) = v;
}
template <class T>
inline Vec<T> load_unaligned(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline void store_unaligned(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}
template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};  // compilers turn this into a broadcast, but not a sum with 0, which turns -0 into 0
}

// The maximum, or NaN if one of both is NaN.
template <class T>
inline Vec<T> max_nan(Vec<T> a, Vec<T> b) {
  const Vec<T> larger = b > a ? b : a;  // a where either is NaN
  return b != b ? b : larger;
}

template <class T>
inline T max_nan(T a, T b)
  requires std::is_floating_point_v<T>
{
  return b > a || b != b ? b : a;
}
template <class T>
inline T max_lanes(Vec<T> v) {
  T largest = v[0];
  for (int i = 1; i < kLanes<T>; ++i) largest = max_nan(largest, T(v[i]));
  return largest;
}

template <class T>
inline T sum_lanes(Vec<T> v) {
  T total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += v[i];
  return total;
}

template <class T>
inline constexpr T kLog2e = T(1.44269504088896340735992468100189214L);

// 2^x by rounding to the nearest integer and a minimax polynomial on [-1/2, 1/2] (minimax.py made it): relative error
// below 9.2e-8 before rounding in float32 (three quarters of a unit in the last place), 4e-18 in float64. NaN stays
// NaN. The caller must keep x below the overflow bound. With `Clamp`, x below the smallest exponent gives exactly 0;
// without it such x is not allowed.
template <bool Clamp>
inline Vec<float> exp2(Vec<float> x) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
  if constexpr (Clamp) {
    const Vec<float> lowest = splat(-127.0f);
    x = x < lowest ? lowest : x;
  }
  const Vec<float> shifted = x + magic;
  const Vec<float> f = x - (shifted - magic);
  Vec<float> p = splat(1.32647271973e-3f);
  p = p * f + 9.67151263965e-3f;
  p = p * f + 5.55073374325e-2f;
  p = p * f + 2.40222420854e-1f;
  p = p * f + 6.93146977599e-1f;
  p = p * f + 1.0f;  // exact at 0
  // The shift drops everything of `shifted` but the exponent; -127 + bias is an exponent field of 0, the value 0.
  const Int<float> power = (reinterpret_cast<Int<float>>(shifted) << 23) + (127 << 23);
  return p * reinterpret_cast<Vec<float>>(power);
}

template <bool Clamp>
inline Vec<double> exp2(Vec<double> x) {
  constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52
  if constexpr (Clamp) {
    const Vec<double> lowest = splat(-1023.0);
    x = x < lowest ? lowest : x;
  }
  const Vec<double> shifted = x + magic;
  const Vec<double> f = x - (shifted - magic);
  Vec<double> p = splat(4.4352809446103361609e-10);
  p = p * f + 7.0741056262456593708e-9;
  p = p * f + 1.0178198033328527662e-7;
  p = p * f + 1.3215433089594629037e-6;
  p = p * f + 1.52527334899608046e-5;
  p = p * f + 1.5403530462514613026e-4;
  p = p * f + 1.3333558146789950323e-3;
  p = p * f + 9.6181291075883350833e-3;
  p = p * f + 5.5504108664819921483e-2;
  p = p * f + 2.4022650695910156205e-1;
  p = p * f + 6.9314718055994533046e-1;
  p = p * f + 9.999999999999999971e-1;
  const Int<double> power = (reinterpret_cast<Int<double>>(shifted) << 52) + (int64_t(1023) << 52);
  return p * reinterpret_cast<Vec<double>>(power);
}

template <class T>
inline Vec<T> exp(Vec<T> x) {
  return exp2<true>(x * kLog2e<T>);
}

// Natural logarithm of normal numbers: x = 2^n m with m around 1, and log m = 2 artanh((m - 1) / (m + 1)). NaN stays
// NaN.
template <class T>
inline Vec<T> log(Vec<T> x) {
  constexpr int mantissa = sizeof(T) == 4 ? 23 : 52, terms = sizeof(T) == 4 ? 5 : 12;
  const Int<T> bits = reinterpret_cast<Int<T>>(x);
  const Int<T> n = (bits - reinterpret_cast<Int<T>>(splat(T(0.70710678118654752440)))) >> mantissa;
  const Vec<T> m = reinterpret_cast<Vec<T>>(bits - (n << mantissa));  // sqrt(1/2) to sqrt(2)
  const Vec<T> s = (m - 1) / (m + 1), z = s * s;
  Vec<T> series = splat(T(1) / (2 * terms - 1));
  for (int i = terms - 2; i >= 0; --i) series = series * z + T(1) / (2 * i + 1);
  const Vec<T> result = __builtin_convertvector(n, Vec<T>) * T(0.69314718055994530942) + 2 * s * series;
  return x == x ? result : x;
}

}  // namespace corrmatch::CORRMATCH_ISA
