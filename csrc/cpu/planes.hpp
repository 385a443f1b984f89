// Channels of strided tensors of any floating dtype, to and from contiguous planes in the accumulation type.
#pragma once

#include <bit>
#include <limits>

#include "../tensor.hpp"
#include "simd.hpp"

namespace corrmatch::CORRMATCH_ISA {

// Bit patterns of magnitudes, as a half and as a float.
inline constexpr uint32_t kHalfInfinity = 0x7c00, kHalfQuietNan = 0x7e00, kHalfMantissa = 0x3ff;
inline constexpr uint32_t kInfinity = std::bit_cast<uint32_t>(std::numeric_limits<float>::infinity());
inline constexpr uint32_t kBeyondHalf = std::bit_cast<uint32_t>(65536.0f);
inline constexpr uint32_t kLeastNormalHalf = std::bit_cast<uint32_t>(0x1p-14f);
inline constexpr uint32_t kBiasDifference = (127 - 15) << 23;  // of the exponents of a float and a half
inline constexpr uint32_t kOneHalf = std::bit_cast<uint32_t>(0.5f);

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline float widen(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= kHalfInfinity) return std::bit_cast<float>(sign | kInfinity | (magnitude & kHalfMantissa) << 13);
  // The exponent bias moves from 15 to 127 by a multiplication, which also normalises subnormal halves.
  const float value = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
}

// Rounds to nearest, ties to even.
inline void narrow(double x, double& out) { out = x; }
inline void narrow(double x, float& out) { out = float(x); }
inline void narrow(float x, float& out) { out = x; }
inline void narrow(float x, double& out) { out = x; }
inline void narrow(float x, BFloat16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const bool nan = (bits & 0x7fffffff) > kInfinity;
  out.bits = nan ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float x, Half& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (magnitude >= kBeyondHalf) {  // inf and NaN as well
    out.bits = uint16_t(sign | (magnitude > kInfinity ? kHalfQuietNan : kHalfInfinity));
  } else if (magnitude < kLeastNormalHalf) {  // a subnormal half: float addition at 1/2 rounds at its last place
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    out.bits = uint16_t(sign | (std::bit_cast<uint32_t>(shifted) - kOneHalf));
  } else {
    out.bits = uint16_t(sign | (magnitude - kBiasDifference + 0xfff + (magnitude >> 13 & 1)) >> 13);
  }
}
template <class S>
inline void narrow(double x, S& out) {
  narrow(float(x), out);
}

// Channel c of picture b as H * W values.
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

// The reverse, into a contiguous tensor.
template <class T>
void write_plane(const Tensor& t, int64_t b, int64_t c, const T* in) {
  visit_floating(t.dtype, [&](auto zero) {
    using S = decltype(zero);
    S* out = t.at<S>(b, c);
    for (int64_t i = 0; i < t.size[2] * t.size[3]; ++i) narrow(in[i], out[i]);
  });
}

}  // namespace corrmatch::CORRMATCH_ISA
