// Copies of channels: strided tensors of any floating dtype to contiguous planes in the accumulation type, and back.
#pragma once

#include <bit>
#include <limits>

#include "../tensor.hpp"
#include "simd.hpp"

namespace corrmatch::CORRMATCH_ISA {

// Bit patterns of IEEE half (1 sign, 5 exponent, 10 mantissa bits), of bfloat16 (1, 8, 7) and of float (1, 8, 23).
inline constexpr uint32_t kHalfSign = 0x8000, kHalfMagnitude = 0x7fff, kHalfMantissa = 0x3ff;
inline constexpr uint32_t kHalfInfinity = 0x7c00, kHalfQuietNan = 0x7e00;
inline constexpr uint32_t kBFloat16QuietBit = 0x40;
inline constexpr uint32_t kFloatMagnitude = 0x7fffffff;
inline constexpr int kHalfShift = 23 - 10, kBFloat16Shift = 23 - 7, kSignShift = 31 - 15;  // to the bits of a float
inline constexpr uint32_t kInfinity = std::bit_cast<uint32_t>(std::numeric_limits<float>::infinity());
inline constexpr uint32_t kBeyondHalf = std::bit_cast<uint32_t>(65536.0f);
inline constexpr uint32_t kLeastNormalHalf = std::bit_cast<uint32_t>(0x1p-14f);
inline constexpr uint32_t kBiasDifference = (127 - 15) << 23;  // of the exponents of a float and a half
inline constexpr float kBiasFactor = 0x1p112f;                 // 2^(127 - 15)
inline constexpr uint32_t kOneHalf = std::bit_cast<uint32_t>(0.5f);

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << kBFloat16Shift); }
inline float widen(Half x) {
  const uint32_t sign = (x.bits & kHalfSign) << kSignShift, magnitude = x.bits & kHalfMagnitude;
  if (magnitude >= kHalfInfinity)
    return std::bit_cast<float>(sign | kInfinity | (magnitude & kHalfMantissa) << kHalfShift);
  // The multiplication changes the exponent bias from 15 to 127. It also normalises subnormal halves.
  const float value = std::bit_cast<float>(magnitude << kHalfShift) * kBiasFactor;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
}

// Removes the last `shift` bits, rounding to nearest, ties to even: it adds just under half of the last place that
// stays, and 1 more if this place is odd.
inline uint32_t rounded_off(uint32_t bits, int shift) {
  return (bits + (1u << (shift - 1)) - 1 + (bits >> shift & 1)) >> shift;
}

// Rounds to nearest, ties to even.
inline void narrow(double x, double& out) { out = x; }
inline void narrow(double x, float& out) { out = float(x); }
inline void narrow(float x, float& out) { out = x; }
inline void narrow(float x, double& out) { out = x; }
inline void narrow(float x, BFloat16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const bool nan = (bits & kFloatMagnitude) > kInfinity;
  out.bits = uint16_t(nan ? bits >> kBFloat16Shift | kBFloat16QuietBit : rounded_off(bits, kBFloat16Shift));
}
inline void narrow(float x, Half& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & kFloatMagnitude;
  const uint32_t sign = bits >> kSignShift & kHalfSign;
  if (magnitude >= kBeyondHalf) {  // also true for inf and NaN
    out.bits = uint16_t(sign | (magnitude > kInfinity ? kHalfQuietNan : kHalfInfinity));
  } else if (magnitude < kLeastNormalHalf) {  // a subnormal half: float addition at 1/2 rounds at its last place
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    out.bits = uint16_t(sign | (std::bit_cast<uint32_t>(shifted) - kOneHalf));
  } else {
    out.bits = uint16_t(sign | rounded_off(magnitude - kBiasDifference, kHalfShift));
  }
}
template <class S>
inline void narrow(double x, S& out) {
  narrow(float(x), out);
}

// Copies channel c of image b to H * W values.
template <class T>
void read_plane(const Tensor& t, int64_t b, int64_t c, T* out) {
  visit_floating(t.dtype, [&](auto zero) {
    using S = decltype(zero);
    for (int64_t y = 0; y < t.size[2]; ++y, out += t.size[3]) {
      const S* row = t.at<const S>(b, c, y);
      if (t.stride[3] == 1) {
        for (int64_t x = 0; x < t.size[3]; ++x) out[x] = T(widen(row[x]));
      } else {
        for (int64_t x = 0; x < t.size[3]; ++x) out[x] = T(widen(row[x * t.stride[3]]));
      }
    }
  });
}

// The reverse copy, into a contiguous tensor.
template <class T>
void write_plane(const Tensor& t, int64_t b, int64_t c, const T* in) {
  visit_floating(t.dtype, [&](auto zero) {
    using S = decltype(zero);
    S* out = t.at<S>(b, c);
    for (int64_t i = 0; i < t.size[2] * t.size[3]; ++i) narrow(in[i], out[i]);
  });
}

}  // namespace corrmatch::CORRMATCH_ISA
